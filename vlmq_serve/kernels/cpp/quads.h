// Products with 8-bit inputs: 32 bits hold four columns of a row of W, a code in each byte.
//
// A word of pairs.h has pair p in bits BITS * p of both halves. Masked by bytes it yields two pairs at once, p and the one
// that stands 8 bits higher, so the same words in memory serve; it is x whose columns are put in that order.
#pragma once
#include "codes.h"

constexpr int QUADS = COLS / 4;  // of columns in a block

// Codes of a block for each product in turn, as bytes of LANES rows: use(product, codes).
template <int BITS> struct Bytes {
  static constexpr int PER_WORD = 8 / BITS;
  template <class Use> static inline void each(const int32_t* words, Use use) {
    const VI mask = set1((int)(0x01010101u * ((1u << BITS) - 1)));
    for (int w = 0; w < BITS; ++w) {
      VI v = load_once(words + w * ROWS);
      for (int i = 0; i < PER_WORD; ++i, v = right16<BITS>(v)) use(w * PER_WORD + i, BITS == 8 ? v : both(v, mask));
    }
  }
  static constexpr int pair(int product, int byte) {
    return product / PER_WORD * (16 / BITS) + product % PER_WORD + byte * PER_WORD;
  }
};
// No two pairs of 3 bits are 8 bits apart: 0 with 4 and 1 with 3 of a word, 2 with the next word's, or with pair 15.
template <> struct Bytes<3> {
  template <class Use> static inline void each(const int32_t* words, Use use) {
    const VI low = set1(0x00070007), high = set1(0x07000700), v0 = load_once(words), v1 = load_once(words + ROWS),
             v2 = load_once(words + 2 * ROWS), all[] = {v0, v1, v2};
#pragma GCC unroll 3
    for (int w = 0; w < 3; ++w) {
      use(2 * w, either(both(all[w], low), both(right16<4>(all[w]), high)));
      use(2 * w + 1, either(both(right16<3>(all[w]), low), both(right16<1>(all[w]), high)));
    }
    use(6, either(both(right16<6>(v0), low), both(left16<2>(v1), high)));
    const VI last = either(both(right16<7>(v0), set1(0x01000100)),
                           either(both(right16<6>(v1), set1(0x02000200)), both(right16<5>(v2), set1(0x04000400))));
    use(7, either(both(right16<6>(v2), low), last));
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
template <int BITS, int R> struct Quads {
  static constexpr int TURNS = R <= FEW_ROWS / 2 ? 4 : R <= FEW_ROWS ? 2 : 1;
  VI a[TURNS][R] = {};
  inline void block(const int32_t* words, const int32_t* x) {
    Bytes<BITS>::each(words, [&](int product, VI codes) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        VI& sum = a[product % TURNS][r];
        sum = dot8<BITS>(sum, codes, set1(x[r * QUADS + product]));
      }
    });
  }
  inline VI sum(int r) const {
    VI all = a[0][r];
    for (int t = 1; t < TURNS; ++t) all = add(all, a[t][r]);
    return all;
  }
};

// x as int8, in the order in which bytes of words hold its columns.
struct Int8 {
  using Code = int8_t;
  static constexpr int LIMIT = 127;
  static constexpr int STEPS = QUADS;  // products in a block
  template <int BITS, int R> using Sum = Quads<BITS, R>;
};
