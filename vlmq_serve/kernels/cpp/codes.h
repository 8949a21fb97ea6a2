// Packed codes. A block of 16 rows and 32 columns is `BITS` vectors of 16 words, word i of a vector belonging to row i.
// The halves of a word hold codes of column 2p (low) and 2p + 1 (high), pair p at bit BITS * (p % P) of word p / P, with
// P = 16 / BITS pairs a word. 3 bits: five pairs a word, and pair 15 in bit 15 of the three words.
#pragma once
#include "simd.h"

constexpr int ROWS = 16;   // of a block
constexpr int COLS = 32;   // of a block
constexpr int PAIRS = 16;  // of columns in a block

// Codes of all pairs of LANES rows as int16 pairs.
template <int BITS> static inline void unpack(const int32_t* words, VI (&out)[PAIRS]);

template <> inline void unpack<8>(const int32_t* words, VI (&out)[PAIRS]) {
  const VI mask = set1(0x00FF00FF);
  for (int w = 0; w < 8; ++w) {
    VI x = load(words + w * ROWS);
    out[2 * w] = both(x, mask);
    out[2 * w + 1] = right16<8>(x);
  }
}
template <> inline void unpack<4>(const int32_t* words, VI (&out)[PAIRS]) {
  const VI mask = set1(0x000F000F);
  for (int w = 0; w < 4; ++w) {
    VI x = load(words + w * ROWS);
    out[4 * w] = both(x, mask);
    out[4 * w + 1] = both(right16<4>(x), mask);
    out[4 * w + 2] = both(right16<8>(x), mask);
    out[4 * w + 3] = right16<12>(x);
  }
}
template <> inline void unpack<3>(const int32_t* words, VI (&out)[PAIRS]) {
  const VI mask = set1(0x00070007);
  VI x[3];
  for (int w = 0; w < 3; ++w) {
    x[w] = load(words + w * ROWS);
    out[5 * w] = both(x[w], mask);
    out[5 * w + 1] = both(right16<3>(x[w]), mask);
    out[5 * w + 2] = both(right16<6>(x[w]), mask);
    out[5 * w + 3] = both(right16<9>(x[w]), mask);
    out[5 * w + 4] = both(right16<12>(x[w]), mask);
  }
  out[15] = either(right16<15>(x[0]), either(left16<1>(right16<15>(x[1])), left16<2>(right16<15>(x[2]))));
}
template <> inline void unpack<2>(const int32_t* words, VI (&out)[PAIRS]) {
  const VI mask = set1(0x00030003);
  for (int w = 0; w < 2; ++w) {
    VI x = load(words + w * ROWS);
    out[8 * w] = both(x, mask);
    out[8 * w + 1] = both(right16<2>(x), mask);
    out[8 * w + 2] = both(right16<4>(x), mask);
    out[8 * w + 3] = both(right16<6>(x), mask);
    out[8 * w + 4] = both(right16<8>(x), mask);
    out[8 * w + 5] = both(right16<10>(x), mask);
    out[8 * w + 6] = both(right16<12>(x), mask);
    out[8 * w + 7] = right16<14>(x);
  }
}

// Integer product of one row of x with LANES rows of codes. Codes are masked where they stand and not shifted down:
// those at bit s are summed apart, as multiples of 2^s, and shifted once at the end. s stays small enough (6 at most)
// for sums over 128 columns to fit in 32 bits.
template <int BITS> struct Sums;

template <> struct Sums<8> {
  VI a = zero(), b = zero();
  inline void block(const int32_t* words, const int32_t* x) {
    const VI mask = set1(0x00FF00FF);
    for (int w = 0; w < 8; ++w) {
      VI v = load(words + w * ROWS);
      a = dot(a, both(v, mask), set1(x[2 * w]));
      b = dot(b, right16<8>(v), set1(x[2 * w + 1]));
    }
  }
  inline VI sum() const { return add(a, b); }
};
template <> struct Sums<4> {
  VI a = zero(), b = zero(), c = zero(), d = zero();
  inline void block(const int32_t* words, const int32_t* x) {
    const VI low = set1(0x000F000F), high = set1(0x00F000F0);
    for (int w = 0; w < 4; ++w) {
      VI v = load(words + w * ROWS), u = right16<8>(v);
      a = dot(a, both(v, low), set1(x[4 * w]));
      b = dot(b, both(v, high), set1(x[4 * w + 1]));
      c = dot(c, both(u, low), set1(x[4 * w + 2]));
      d = dot(d, both(u, high), set1(x[4 * w + 3]));
    }
  }
  inline VI sum() const { return add(add(a, c), right32<4>(add(b, d))); }
};
template <> struct Sums<3> {
  VI a = zero(), b = zero(), c = zero(), d = zero(), e = zero();
  inline void block(const int32_t* words, const int32_t* x) {
    const VI m0 = set1(0x00070007), m3 = set1(0x00380038), m6 = set1(0x01C001C0), m15 = set1(0x00400040);
    VI u[3];
    for (int w = 0; w < 3; ++w) {
      VI v = load(words + w * ROWS);
      u[w] = right16<9>(v);
      a = dot(a, both(v, m0), set1(x[5 * w]));
      b = dot(b, both(v, m3), set1(x[5 * w + 1]));
      c = dot(c, both(v, m6), set1(x[5 * w + 2]));
      d = dot(d, both(u[w], m0), set1(x[5 * w + 3]));
      e = dot(e, both(u[w], m3), set1(x[5 * w + 4]));
    }
    VI last = either(both(u[0], m15), either(left16<1>(both(u[1], m15)), left16<2>(both(u[2], m15))));
    c = dot(c, last, set1(x[15]));
  }
  inline VI sum() const { return add(add(a, d), add(right32<3>(add(b, e)), right32<6>(c))); }
};
template <> struct Sums<2> {
  VI a = zero(), b = zero(), c = zero(), d = zero();
  inline void block(const int32_t* words, const int32_t* x) {
    const VI m0 = set1(0x00030003), m2 = set1(0x000C000C), m4 = set1(0x00300030), m6 = set1(0x00C000C0);
    for (int w = 0; w < 2; ++w) {
      VI v = load(words + w * ROWS), u = right16<8>(v);
      a = dot(a, both(v, m0), set1(x[8 * w]));
      b = dot(b, both(v, m2), set1(x[8 * w + 1]));
      c = dot(c, both(v, m4), set1(x[8 * w + 2]));
      d = dot(d, both(v, m6), set1(x[8 * w + 3]));
      a = dot(a, both(u, m0), set1(x[8 * w + 4]));
      b = dot(b, both(u, m2), set1(x[8 * w + 5]));
      c = dot(c, both(u, m4), set1(x[8 * w + 6]));
      d = dot(d, both(u, m6), set1(x[8 * w + 7]));
    }
  }
  inline VI sum() const { return add(add(a, right32<2>(b)), add(right32<4>(c), right32<6>(d))); }
};
