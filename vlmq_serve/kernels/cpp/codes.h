// Packed codes. A block of 16 rows and 32 columns is `BITS` vectors of 16 words, word i of a vector belonging to row i.
// The halves of a word hold codes of column 2p (low) and 2p + 1 (high), pair p at bit BITS * (p % P) of word p / P, with
// P = 16 / BITS pairs a word. 3 bits: five pairs a word, and pair 15 in bit 15 of the three words.
#pragma once
#include "simd.h"

constexpr int ROWS = 16;   // of a block
constexpr int COLS = 32;   // of a block
constexpr int PAIRS = 16;  // of columns in a block

// Codes minus zeros (int16 pairs) of LANES rows, pair p to out + p * stride.
template <int BITS> static inline void unpack(const int32_t* words, VI zeros, int32_t* out, int stride);

template <> inline void unpack<8>(const int32_t* words, VI zeros, int32_t* out, int stride) {
  const VI mask = set1(0x00FF00FF);
  for (int w = 0; w < 8; ++w, out += 2 * stride) {
    VI x = load(words + w * ROWS);
    store(out, sub16(both(x, mask), zeros));
    store(out + stride, sub16(right16<8>(x), zeros));
  }
}
template <> inline void unpack<4>(const int32_t* words, VI zeros, int32_t* out, int stride) {
  const VI mask = set1(0x000F000F);
  for (int w = 0; w < 4; ++w, out += 4 * stride) {
    VI x = load(words + w * ROWS);
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
    VI x = load(words + w * ROWS);
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
    VI x = load(words + w * ROWS);
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

// Integer products of R rows of x with LANES rows of codes. Codes are masked where they stand and not shifted down:
// those at bit s are summed apart, as multiples of 2^s, and shifted once at the end. s stays small enough (6 at most)
// for sums over 128 columns to fit in 32 bits. x of row r lies at x + r * PAIRS.
template <int R> static inline void accumulate(VI (&sums)[R], VI codes, const int32_t* x) {
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) sums[r] = dot(sums[r], codes, set1(x[r * PAIRS]));
}

template <int BITS, int R> struct Sums;

template <int R> struct Sums<8, R> {
  VI a[R] = {}, b[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI mask = set1(0x00FF00FF);
    for (int w = 0; w < 8; ++w) {
      VI v = load(words + w * ROWS);
      accumulate(a, both(v, mask), x + 2 * w);
      accumulate(b, right16<8>(v), x + 2 * w + 1);
    }
  }
  inline VI sum(int r) const { return add(a[r], b[r]); }
};
template <int R> struct Sums<4, R> {
  VI a[R] = {}, b[R] = {}, c[R] = {}, d[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI low = set1(0x000F000F), high = set1(0x00F000F0);
    for (int w = 0; w < 4; ++w) {
      VI v = load(words + w * ROWS), u = right16<8>(v);
      accumulate(a, both(v, low), x + 4 * w);
      accumulate(b, both(v, high), x + 4 * w + 1);
      accumulate(c, both(u, low), x + 4 * w + 2);
      accumulate(d, both(u, high), x + 4 * w + 3);
    }
  }
  inline VI sum(int r) const { return add(add(a[r], c[r]), right32<4>(add(b[r], d[r]))); }
};
template <int R> struct Sums<3, R> {
  VI a[R] = {}, b[R] = {}, c[R] = {}, d[R] = {}, e[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI m0 = set1(0x00070007), m3 = set1(0x00380038), m6 = set1(0x01C001C0), m15 = set1(0x01000100);
    VI last = zero();
    for (int w = 0; w < 3; ++w) {
      VI v = load(words + w * ROWS), u = right16<9>(v);
      accumulate(a, both(v, m0), x + 5 * w);
      accumulate(b, both(v, m3), x + 5 * w + 1);
      accumulate(c, both(v, m6), x + 5 * w + 2);
      accumulate(d, both(u, m0), x + 5 * w + 3);
      accumulate(e, both(u, m3), x + 5 * w + 4);
      last = either(right16<1>(last), both(right16<7>(v), m15));
    }
    accumulate(c, last, x + 15);
  }
  inline VI sum(int r) const { return add(add(a[r], d[r]), add(right32<3>(add(b[r], e[r])), right32<6>(c[r]))); }
};
template <int R> struct Sums<2, R> {
  VI a[R] = {}, b[R] = {}, c[R] = {}, d[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI m0 = set1(0x00030003), m2 = set1(0x000C000C), m4 = set1(0x00300030), m6 = set1(0x00C000C0);
    for (int w = 0; w < 2; ++w) {
      VI v = load(words + w * ROWS), u = right16<8>(v);
      accumulate(a, both(v, m0), x + 8 * w);
      accumulate(b, both(v, m2), x + 8 * w + 1);
      accumulate(c, both(v, m4), x + 8 * w + 2);
      accumulate(d, both(v, m6), x + 8 * w + 3);
      accumulate(a, both(u, m0), x + 8 * w + 4);
      accumulate(b, both(u, m2), x + 8 * w + 5);
      accumulate(c, both(u, m4), x + 8 * w + 6);
      accumulate(d, both(u, m6), x + 8 * w + 7);
    }
  }
  inline VI sum(int r) const { return add(add(a[r], right32<2>(b[r])), add(right32<4>(c[r]), right32<6>(d[r]))); }
};

// The same for more rows, of which each has registers for one sum only: codes are shifted down.
template <int BITS, int R> struct Shifted {
  VI a[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    constexpr int P = 16 / BITS;
    const VI mask = set1((1 << BITS) - 1 | ((1 << BITS) - 1) << 16);
    VI last = zero();
    for (int w = 0; w < BITS; ++w, x += P) {
      VI v = load(words + w * ROWS);
      if (BITS == 3) last = either(right16<1>(last), both(right16<13>(v), set1(0x00040004)));
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p, v = right16<BITS>(v)) accumulate(a, both(v, mask), x + p);
    }
    if (BITS == 3) accumulate(a, last, x);
  }
  inline VI sum(int r) const { return a[r]; }
};
