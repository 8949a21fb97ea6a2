// x as integers: one scale for each row and block of columns that share a scale of W.
#pragma once
#include "pairs.h"
#include "quads.h"

#include <cmath>

struct Input {
  void* codes;      // [K/32, M, 32] of Int16::Code or Int8::Code
  float* scales;    // [K/block, M]
  int32_t* sums;    // [K/block, M]: of codes, times -1
  int64_t rows;     // M
  int block;        // columns with one scale: 32, 64 or 128
};

template <int BITS> static inline void store_codes(Int16, int16_t* to, const VI* q) {
  for (int k = 0; k < COLS; k += LANES) store_as_16(to + k, q[k / LANES]);
}
template <int BITS> static inline void store_codes(Int8, int8_t* to, const VI* q) {
  _mm256_storeu_si256((__m256i*)to, permute(as_bytes(q), Order<BITS>::ALL.column));
}

// Row `row` and block `block` of x, of type X, to codes of type A for weights of BITS bits.
template <class A, int BITS, class X>
static void quantize(const void* x, int64_t stride, const Input& in, int64_t row, int64_t block) {
  using T = typename X::T;
  const T* from = (const T*)x + row * stride + block * in.block;
  VI top = zero();
  for (int k = 0; k < in.block; k += LANES)
    top = max_unsigned(top, both(as_bits(load_as_float(X(), from + k)), set1(0x7FFFFFFF)));
  uint32_t bits = highest(top);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  // Not finite: nan for the whole row, as any dense product gives nan or infinity. Next to nothing: zero.
  bool finite = bits < 0x7F800000u, some = finite && largest > 1e-30f;
  float inverse = some ? A::LIMIT / largest : 0.0f;
  VI sum = zero();
  for (int k = 0; k < in.block; k += COLS) {
    VI q[COLS / LANES];
    for (int i = 0; i < COLS / LANES; ++i) {
      q[i] = some ? to_int(mulf(load_as_float(X(), from + k + i * LANES), set1f(inverse))) : zero();
      sum = add(sum, q[i]);
    }
    store_codes<BITS>(A(), (typename A::Code*)in.codes + ((block * in.block + k) / COLS * in.rows + row) * COLS, q);
  }
  in.scales[block * in.rows + row] = finite ? (some ? largest / A::LIMIT : 0.0f) : NAN;
  in.sums[block * in.rows + row] = -total(sum);
}
