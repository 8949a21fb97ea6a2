// Codes are unpacked again for every few rows of x and used at once.
#pragma once
#include "inputs.h"

#include <utility>

constexpr int MAX_ROWS = 256;  // of x in one pass; the caller splits more
// Words of 4 bytes. A core's own prefetching stops at the end of a page, that is every 4 KiB; ours may be told addresses
// past the end, which it ignores.
constexpr int AHEAD = 4096;

// `count` values to y from element `at` on; `from` holds LANES.
static void store_row(int type, void* y, int64_t at, const float* from, int64_t count) {
  if (count >= LANES) {
    VF v = loadf(from);
    switch (type) {
      case FLOAT32: return store_float(F32(), (float*)y + at, v);
      case BFLOAT16: return store_float(BF16(), (uint16_t*)y + at, v);
      default: return store_float(F16(), (uint16_t*)y + at, v);
    }
  }
  alignas(64) unsigned char whole[LANES * sizeof(float)];
  store_row(type, whole, 0, from, LANES);
  size_t size = type == FLOAT32 ? 4 : 2;
  std::memcpy((char*)y + at * size, whole, count * size);
}

// R rows of x with one block of columns of LANES rows of W, codes used as they are unpacked: y [R, ROWS] += products.
template <class A, int BITS, int R>
static void fused(const int32_t* words, const int32_t* x, int64_t x_stride, int inner, VI zeros, VF scales,
                  const float* x_scales, const int32_t* x_sums, float* y) {
  typename A::template Sum<BITS, R> s;
  for (int i = 0; i < inner; ++i) {
    s.block(words + i * BITS * ROWS, x + i * x_stride);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    VI exact = add(s.sum(r), mul(zeros, set1(-x_sums[r])));
    storef(y + r * ROWS, fma(to_float(exact), mulf(scales, set1f(x_scales[r])), loadf(y + r * ROWS)));
  }
}

using Fused = void (*)(const int32_t*, const int32_t*, int64_t, int, VI, VF, const float*, const int32_t*, float*);
template <class A, int BITS, size_t... R> static inline Fused fused_for(size_t rows, std::index_sequence<R...>) {
  static constexpr Fused all[] = {fused<A, BITS, R + 1>...};
  return all[rows - 1];
}

// All rows of x with 16 rows of W.
template <class A, int BITS>
static void fused_rows(const Weight& w, const Input& in, int64_t rows16, int type, void* y, int64_t features) {
  const int32_t* words = w.codes + rows16 * (w.cols / COLS) * BITS * ROWS;
  const int64_t blocks = w.cols / in.block, repeat = blocks / w.groups;
  const int64_t tiles = (in.rows + FUSED_ROWS - 1) / FUSED_ROWS;
  const int inner = in.block / COLS;
  alignas(64) float out[MAX_ROWS * ROWS];
  std::memset(out, 0, in.rows * ROWS * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t group = (rows16 * w.groups + b / repeat) * ROWS;
    const int32_t* x = (const int32_t*)((const typename A::Code*)in.codes + b * in.block * in.rows);
    for (int i = 0; i < inner * BITS; ++i) prefetch(words + AHEAD + i * ROWS);
    for (int v = 0; v < ROWS; v += LANES) {
      const VI zeros = load_zeros(w, group + v);
      const VF scales = load_scales(w, group + v);
      for (int64_t t = 0, m = 0; t < tiles; ++t) {
        const int64_t next = in.rows * (t + 1) / tiles;
        fused_for<A, BITS>(next - m, std::make_index_sequence<FUSED_ROWS>())(
            words + v, x + m * A::STEPS, in.rows * A::STEPS, inner, zeros, scales, in.scales + b * in.rows + m,
            in.sums + b * in.rows + m, out + m * ROWS + v);
        m = next;
      }
    }
    words += inner * BITS * ROWS;
  }
  for (int64_t m = 0; m < in.rows; ++m)
    for (int v = 0; v < ROWS; v += LANES) {
      int64_t at = rows16 * ROWS + v;
      if (at < features) store_row(type, y, m * features + at, out + m * ROWS + v, features - at);
    }
}
