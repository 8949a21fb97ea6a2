// Packed codes. A block of 32 rows and 32 columns is `BITS` times 32 words, word i of those belonging to row i.
// The halves of a word hold codes of column 2p (low) and 2p + 1 (high), pair p at bit BITS * (p % P) of word p / P, with
// P = 16 / BITS pairs a word. 3 bits: five pairs a word, and pair 15 in bit 15 of the three words.
#pragma once
#include "simd.h"

constexpr int ROWS = 32;   // of a block
constexpr int COLS = 32;   // of a block

// ABREAST vectors of rows of W are multiplied at once where that spares loads of x: a core with two products in a cycle
// has no more than two loads. Then rows of x for whose sums there are registers.
#if VLMQ_REGISTERS == 32
constexpr int ABREAST = 2;
constexpr int FEW_ROWS = 3;  // several each
#else
constexpr int ABREAST = 1;
constexpr int FEW_ROWS = 2;
#endif
constexpr int FUSED_ROWS = 8;  // one each for every vector

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Weight {
  const int32_t* codes;   // [N/32, K/32, bits, 32]
  const void* scales;     // [N/32, G, 32]
  const uint8_t* zeros;   // [N/32, G, 32], or null: all are `mid`
  int scale_type, mid;
  int64_t cols;           // K
  int64_t groups;         // G
};

static inline VF load_scales(const Weight& w, int64_t at) {
  switch (w.scale_type) {
    case FLOAT32: return load_as_float(F32(), (const float*)w.scales + at);
    case BFLOAT16: return load_as_float(BF16(), (const uint16_t*)w.scales + at);
    default: return load_as_float(F16(), (const uint16_t*)w.scales + at);
  }
}

static inline VI load_zeros(const Weight& w, int64_t at) { return w.zeros ? widen(w.zeros + at) : set1(w.mid); }

// sums[s][r] = product(sums[s][r], codes[s], x), x of row r at x + r * STEPS and loaded once for all V vectors of codes.
template <int STEPS, int V, int R, class Product>
static inline void products(VI (&sums)[V][R], const VI (&codes)[V], const int32_t* x, Product product) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    VI same = set1(x[r * STEPS]);
    if (V > 1) in_register(same);
    for (int s = 0; s < V; ++s) sums[s][r] = product(sums[s][r], codes[s], same);
  }
}

// Codes minus zeros (int16 pairs) of LANES rows, pair p to out + p * stride.
template <int BITS> static inline void unpack(const int32_t* words, VI zeros, int32_t* out, int stride);

template <> inline void unpack<8>(const int32_t* words, VI zeros, int32_t* out, int stride) {
  const VI mask = set1(0x00FF00FF);
  for (int w = 0; w < 8; ++w, out += 2 * stride) {
    VI x = load_once(words + w * ROWS);
    store(out, sub16(both(x, mask), zeros));
    store(out + stride, sub16(right16<8>(x), zeros));
  }
}
template <> inline void unpack<4>(const int32_t* words, VI zeros, int32_t* out, int stride) {
  const VI mask = set1(0x000F000F);
  for (int w = 0; w < 4; ++w, out += 4 * stride) {
    VI x = load_once(words + w * ROWS);
    store(out, sub16(both(x, mask), zeros));
    store(out + stride, sub16(both(right16<4>(x), mask), zeros));
    store(out + 2 * stride, sub16(both(right16<8>(x), mask), zeros));
    store(out + 3 * stride, sub16(right16<12>(x), zeros));
  }
}
template <> inline void unpack<3>(const int32_t* words, VI zeros, int32_t* out, int stride) {
  const VI mask = set1(0x00070007);
  VI last = zero();
  for (int w = 0; w < 3; ++w, out += 5 * stride) {
    VI x = load_once(words + w * ROWS);
    store(out, sub16(both(x, mask), zeros));
    store(out + stride, sub16(both(right16<3>(x), mask), zeros));
    store(out + 2 * stride, sub16(both(right16<6>(x), mask), zeros));
    store(out + 3 * stride, sub16(both(right16<9>(x), mask), zeros));
    store(out + 4 * stride, sub16(both(right16<12>(x), mask), zeros));
    // Bit 15 of word w becomes bit w.
    last = either(right16<1>(last), both(right16<13>(x), set1(0x00040004)));
  }
  store(out, sub16(last, zeros));
}
template <> inline void unpack<2>(const int32_t* words, VI zeros, int32_t* out, int stride) {
  const VI mask = set1(0x00030003);
  for (int w = 0; w < 2; ++w, out += 8 * stride) {
    VI x = load_once(words + w * ROWS);
    store(out, sub16(both(x, mask), zeros));
    store(out + stride, sub16(both(right16<2>(x), mask), zeros));
    store(out + 2 * stride, sub16(both(right16<4>(x), mask), zeros));
    store(out + 3 * stride, sub16(both(right16<6>(x), mask), zeros));
    store(out + 4 * stride, sub16(both(right16<8>(x), mask), zeros));
    store(out + 5 * stride, sub16(both(right16<10>(x), mask), zeros));
    store(out + 6 * stride, sub16(both(right16<12>(x), mask), zeros));
    store(out + 7 * stride, sub16(right16<14>(x), zeros));
  }
}
