// Products with 8-bit inputs: 32 bits hold four columns of a row of W, a code in each byte.
//
// A word of pairs.h has pair p in bits BITS * p of both halves. Masked by bytes it yields two pairs at once, p and the one
// that stands 8 bits higher, so the same words in memory serve; it is x whose columns are put in that order.
#pragma once
#include "codes.h"

constexpr int QUADS = COLS / 4;  // of columns in a block

// Codes of a block for each product in turn, as bytes of LANES rows, V vectors of them at once:
// use(product, codes).
template <int BITS> struct Bytes {
  static constexpr int PER_WORD = 8 / BITS;
  template <int V, class Use> static inline void each(const int32_t* words, Use use) {
    const VI mask = set1((int)(0x01010101u * ((1u << BITS) - 1)));
#pragma GCC unroll 8
    for (int w = 0; w < BITS; ++w) {
      VI v[V];
      for (int s = 0; s < V; ++s) v[s] = load_once(words + w * ROWS + s * LANES);
      for (int i = 0; i < PER_WORD; ++i) {
        VI codes[V];
        for (int s = 0; s < V; ++s) codes[s] = BITS == 8 ? v[s] : both(v[s], mask);
        use(w * PER_WORD + i, codes);
        for (int s = 0; s < V; ++s) v[s] = right16<BITS>(v[s]);
      }
    }
  }
  static constexpr int pair(int product, int byte) {
    return product / PER_WORD * (16 / BITS) + product % PER_WORD + byte * PER_WORD;
  }
};
// No two pairs of 3 bits are 8 bits apart: 0 with 4 and 1 with 3 of a word, 2 with the next word's, or with pair 15.
template <> struct Bytes<3> {
  template <int V, class Use> static inline void each(const int32_t* words, Use use) {
    const VI low = set1(0x00070007), high = set1(0x07000700);
    VI all[3][V], codes[V];
    for (int w = 0; w < 3; ++w)
      for (int s = 0; s < V; ++s) all[w][s] = load_once(words + w * ROWS + s * LANES);
#pragma GCC unroll 3
    for (int w = 0; w < 3; ++w) {
      for (int s = 0; s < V; ++s) codes[s] = either(both(all[w][s], low), both(right16<4>(all[w][s]), high));
      use(2 * w, codes);
      for (int s = 0; s < V; ++s) codes[s] = either(both(right16<3>(all[w][s]), low), both(right16<1>(all[w][s]), high));
      use(2 * w + 1, codes);
    }
    for (int s = 0; s < V; ++s) codes[s] = either(both(right16<6>(all[0][s]), low), both(left16<2>(all[1][s]), high));
    use(6, codes);
    for (int s = 0; s < V; ++s) {
      const VI last = either(both(right16<7>(all[0][s]), set1(0x01000100)),
                             either(both(right16<6>(all[1][s]), set1(0x02000200)), both(right16<5>(all[2][s]), set1(0x04000400))));
      codes[s] = either(both(right16<6>(all[2][s]), low), last);
    }
    use(7, codes);
  }
  static constexpr int pair(int product, int byte) {
    constexpr int PAIR[QUADS][2] = {{0, 4}, {1, 3}, {5, 9}, {6, 8}, {10, 14}, {11, 13}, {2, 7}, {12, 15}};
    return PAIR[product][byte];
  }
};

// Byte i of a block of x is of column `column[i]`.
template <int BITS> struct Order {
  int8_t column[COLS] = {};
  constexpr Order() {
    for (int i = 0; i < COLS; ++i) column[i] = (int8_t)(2 * Bytes<BITS>::pair(i / 4, i % 2) + i / 2 % 2);
  }
  static const Order ALL;
};
template <int BITS> constexpr Order<BITS> Order<BITS>::ALL;

// Integer products of R rows of x with LANES rows of codes. A sum waits four cycles for itself: where there are
// registers for it, a row has several that take turns.
template <int BITS, int R, int V> struct Quads {
  static constexpr int TURNS = R > 4 ? 1 : 4 / R;
  VI a[TURNS][V][R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    Bytes<BITS>::template each<V>(words, [&](int product, const VI (&codes)[V]) {
      products<QUADS>(a[product % TURNS], codes, x + product, dot8<BITS>);
    });
  }
  inline VI sum(int s, int r) const {
    VI all = a[0][s][r];
    for (int t = 1; t < TURNS; ++t) all = add(all, a[t][s][r]);
    return all;
  }
};

// x as int8, in the order in which bytes of words hold its columns.
struct Int8 {
  using Code = int8_t;
  static constexpr int LIMIT = 127;
  static constexpr int STEPS = QUADS;  // products in a block
  template <int BITS, int R> static constexpr int VECTORS = ABREAST;
  template <int BITS, int R> using Sum = Quads<BITS, R, ABREAST>;
};
