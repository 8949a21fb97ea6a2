// Products with 16-bit inputs: 32 bits hold two columns of a row of W, a code in each half.
#pragma once
#include "codes.h"

#include <type_traits>

constexpr int PAIRS = COLS / 2;  // of columns in a block

// Integer products of R rows of x with LANES rows of codes. Codes are masked where they stand and not shifted down:
// those at bit s are summed apart, as multiples of 2^s, and shifted once at the end. s stays small enough (6 at most)
// for sums over 128 columns to fit in 32 bits. x of row r lies at x + r * PAIRS.
template <int R> static inline void accumulate(VI (&sums)[R], VI codes, const int32_t* x) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r] = dot(sums[r], codes, set1(x[r * PAIRS]));
}

template <int BITS, int R> struct Sums;

template <int R> struct Sums<8, R> {
  VI a[R] = {}, b[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI mask = set1(0x00FF00FF);
    for (int w = 0; w < 8; ++w) {
      VI v = load_once(words + w * ROWS);
      accumulate(a, both(v, mask), x + 2 * w);
      accumulate(b, right16<8>(v), x + 2 * w + 1);
    }
  }
  inline VI sum(int, int r) const { return add(a[r], b[r]); }
};
template <int R> struct Sums<4, R> {
  VI a[R] = {}, b[R] = {}, c[R] = {}, d[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI low = set1(0x000F000F), high = set1(0x00F000F0);
    for (int w = 0; w < 4; ++w) {
      VI v = load_once(words + w * ROWS), u = right16<8>(v);
      accumulate(a, both(v, low), x + 4 * w);
      accumulate(b, both(v, high), x + 4 * w + 1);
      accumulate(c, both(u, low), x + 4 * w + 2);
      accumulate(d, both(u, high), x + 4 * w + 3);
    }
  }
  inline VI sum(int, int r) const { return add(add(a[r], c[r]), right32<4>(add(b[r], d[r]))); }
};
template <int R> struct Sums<3, R> {
  VI a[R] = {}, b[R] = {}, c[R] = {}, d[R] = {}, e[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI m0 = set1(0x00070007), m3 = set1(0x00380038), m6 = set1(0x01C001C0), m15 = set1(0x01000100);
    VI last = zero();
    for (int w = 0; w < 3; ++w) {
      VI v = load_once(words + w * ROWS), u = right16<9>(v);
      accumulate(a, both(v, m0), x + 5 * w);
      accumulate(b, both(v, m3), x + 5 * w + 1);
      accumulate(c, both(v, m6), x + 5 * w + 2);
      accumulate(d, both(u, m0), x + 5 * w + 3);
      accumulate(e, both(u, m3), x + 5 * w + 4);
      last = either(right16<1>(last), both(right16<7>(v), m15));
    }
    accumulate(c, last, x + 15);
  }
  inline VI sum(int, int r) const { return add(add(a[r], d[r]), add(right32<3>(add(b[r], e[r])), right32<6>(c[r]))); }
};
template <int R> struct Sums<2, R> {
  VI a[R] = {}, b[R] = {}, c[R] = {}, d[R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    const VI m0 = set1(0x00030003), m2 = set1(0x000C000C), m4 = set1(0x00300030), m6 = set1(0x00C000C0);
    for (int w = 0; w < 2; ++w) {
      VI v = load_once(words + w * ROWS), u = right16<8>(v);
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
  inline VI sum(int, int r) const { return add(add(a[r], right32<2>(b[r])), add(right32<4>(c[r]), right32<6>(d[r]))); }
};

// The same for more rows, of which each has registers for one sum only for each of V vectors: codes are shifted down.
template <int BITS, int R, int V> struct Shifted {
  VI a[V][R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    constexpr int P = 16 / BITS;
    const VI mask = set1(0x00010001 * ((1 << BITS) - 1));
    VI last[V], v[V], codes[V];
    for (int s = 0; s < V; ++s) last[s] = zero();
    for (int w = 0; w < BITS; ++w, x += P) {
      for (int s = 0; s < V; ++s) {
        v[s] = load_once(words + w * ROWS + s * LANES);
        if (BITS == 3) last[s] = either(right16<1>(last[s]), both(right16<13>(v[s]), set1(0x00040004)));
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        for (int s = 0; s < V; ++s) codes[s] = both(v[s], mask);
        products<PAIRS>(a, codes, x + p, dot);
        for (int s = 0; s < V; ++s) v[s] = right16<BITS>(v[s]);
      }
    }
    if (BITS == 3) products<PAIRS>(a, last, x, dot);
  }
  inline VI sum(int s, int r) const { return a[s][r]; }
};

// x as int16, in the order of its columns.
struct Int16 {
  using Code = int16_t;
  static constexpr int LIMIT = 32767;
  static constexpr int STEPS = PAIRS;  // products in a block
  template <int BITS, int R> static constexpr bool FEW = R <= (BITS == 8 ? 1 : FEW_ROWS);
  template <int BITS, int R> static constexpr int VECTORS = FEW<BITS, R> ? 1 : ABREAST;
  template <int BITS, int R> using Sum = std::conditional_t<FEW<BITS, R>, Sums<BITS, R>, Shifted<BITS, R, ABREAST>>;
};
