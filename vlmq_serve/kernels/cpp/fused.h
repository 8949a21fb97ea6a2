// Codes are unpacked again for every few rows of x and used at once.
#pragma once
#include "inputs.h"

#include <utility>

constexpr int MAX_ROWS = 256;  // of x in one pass; the caller splits more
// Words of 4 bytes. A core's own prefetching stops at the end of a page, that is every 4 KiB; ours may be told addresses
// past the end, which it ignores.
constexpr int AHEAD = 2048, LINE = 16;

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

// Columns that share a scale of x, of a block of rows of W: what is added to `y`.
struct Span {
  const int32_t* words;
  int inner;        // blocks of columns
  int64_t group;    // where its scales and zeros lie
};

// R rows of x with a span, codes used as they are unpacked: y [ROWS / LANES, R, LANES] += products; its vectors of rows
// of W are `y_apart` from each other.
template <class A, int BITS, int R>
static void fused(const Weight& w, const Span& span, const int32_t* x, int64_t x_stride, const float* x_scales,
                  const int32_t* x_sums, float* y, int64_t y_apart) {
  constexpr int V = A::template VECTORS<BITS, R>;
  for (int v = 0; v < ROWS; v += V * LANES) {
    typename A::template Sum<BITS, R> sum;
    for (int i = 0; i < span.inner; ++i) sum.block(span.words + i * BITS * ROWS + v, x + i * x_stride);
    for (int s = 0; s < V; ++s, y += y_apart) {
      const VI zeros = load_zeros(w, span.group + v + s * LANES);
      const VF scales = load_scales(w, span.group + v + s * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const VI exact = add(sum.sum(s, r), mul(zeros, set1(x_sums[r])));
        storef(y + r * LANES, fma(to_float(exact), mulf(scales, set1f(x_scales[r])), loadf(y + r * LANES)));
      }
    }
  }
}

using Fused = void (*)(const Weight&, const Span&, const int32_t*, int64_t, const float*, const int32_t*, float*, int64_t);
template <class A, int BITS, size_t... R> static inline Fused fused_for(size_t rows, std::index_sequence<R...>) {
  static constexpr Fused all[] = {fused<A, BITS, R + 1>...};
  return all[rows - 1];
}

// All rows of x with a block of rows of W.
template <class A, int BITS>
static void fused_rows(const Weight& w, const Input& in, int64_t block, int type, void* y, int64_t features) {
  const int64_t spans = w.cols / in.block, repeat = spans / w.groups, tiles = (in.rows + FUSED_ROWS - 1) / FUSED_ROWS;
  Span span = {w.codes + block * (w.cols / COLS) * BITS * ROWS, in.block / COLS, 0};
  alignas(64) float out[MAX_ROWS * ROWS];  // [ROWS / LANES, rows of x, LANES]
  std::memset(out, 0, in.rows * ROWS * sizeof(float));
  for (int64_t b = 0; b < spans; ++b) {
    const int32_t* x = (const int32_t*)((const typename A::Code*)in.codes + b * in.block * in.rows);
    const int words = span.inner * BITS * ROWS;
    for (int i = 0; i < words; i += LINE) prefetch(span.words + AHEAD + i);
    span.group = (block * w.groups + b / repeat) * ROWS;
    for (int64_t t = 0, m = 0; t < tiles; ++t) {
      const int64_t next = in.rows * (t + 1) / tiles, at = b * in.rows + m;
      fused_for<A, BITS>(next - m, std::make_index_sequence<FUSED_ROWS>())(
          w, span, x + m * A::STEPS, in.rows * A::STEPS, in.scales + at, in.sums + at, out + m * LANES, in.rows * LANES);
      m = next;
    }
    span.words += words;
  }
  for (int v = 0; v < ROWS; v += LANES)
    for (int64_t m = 0; m < in.rows; ++m) {
      const int64_t at = block * ROWS + v;
      if (at < features) store_row(type, y, m * features + at, out + v * in.rows + m * LANES, features - at);
    }
}
