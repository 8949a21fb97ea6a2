// y = x W^T for W of 2, 3, 4 or 8-bit codes, with integer products.
//
// x is rounded to int16 with one scale for each row and block of 32, 64 or 128 columns that share a weight scale; codes
// are integers already; products of a block are summed in 32 bits without error and scaled in fp32. Layouts: codes.h.
#if defined(__GNUC__) && !defined(__clang__)
// These passes make gcc hold every sum twice, or reorder additions until the registers do not suffice.
#pragma GCC optimize("no-tree-ch", "no-tree-reassoc", "no-tree-ter")
#endif
#include "codes.h"

#include <cmath>
#include <type_traits>
#include <utility>

namespace {

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

#if VLMQ_REGISTERS == 32
constexpr int FEW_ROWS = 4;       // of x, with registers for several sums each
constexpr int FUSED_ROWS = 16;    // of x, in one call of fused()
constexpr int FUSED_LIMIT = 256;  // rows of x up to which fused() is faster than unpacked panels: all
#else
constexpr int FEW_ROWS = 2;
constexpr int FUSED_ROWS = 8;
constexpr int FUSED_LIMIT = 48;
#endif
constexpr int TILE_ROWS = 6;             // of x, in one call of tile(): 12 sums, and registers left for W and x
constexpr int VECTORS = 2;               // of W, in a panel
constexpr int PANEL = VECTORS * LANES;   // rows of W whose codes are unpacked together
constexpr int PANEL_BYTES = 16 << 10;    // unpacked codes that stay in the first cache while all rows of x pass
constexpr int PANEL_COLS = PANEL_BYTES / (2 * PANEL);
constexpr int MAX_ROWS = 256;            // of x in one pass; the caller splits more

struct Weight {
  const int32_t* codes;   // [N/16, K/32, bits, 16]
  const void* scales;     // [N/16, G, 16]
  const uint8_t* zeros;   // [N/16, G, 16], or null: all are `mid`
  int scale_type, mid;
  int64_t cols;           // K
  int64_t groups;         // G
};

struct Input {
  int16_t* codes;   // [K/32, M, 32]
  float* scales;    // [K/block, M]
  int32_t* sums;    // [K/block, M]: of codes
  int64_t rows;     // M
  int block;        // columns with one scale: 32, 64 or 128
};

inline VF load_scales(const Weight& w, int64_t at) {
  switch (w.scale_type) {
    case FLOAT32: return load_as_float(F32(), (const float*)w.scales + at);
    case BFLOAT16: return load_as_float(BF16(), (const uint16_t*)w.scales + at);
    default: return load_as_float(F16(), (const uint16_t*)w.scales + at);
  }
}

inline VI load_zeros(const Weight& w, int64_t at) { return w.zeros ? widen(w.zeros + at) : set1(w.mid); }

template <class X> void quantize(const void* x, int64_t stride, const Input& in, int64_t row, int64_t block) {
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
  float inverse = some ? 32767.0f / largest : 0.0f;
  VI sum = zero();
  for (int k = 0; k < in.block; k += LANES) {
    VI q = some ? to_int(mulf(load_as_float(X(), from + k), set1f(inverse))) : zero();
    sum = add(sum, q);
    int64_t column = block * in.block + k;
    store_as_16(in.codes + (column / COLS * in.rows + row) * COLS + column % COLS, q);
  }
  in.scales[block * in.rows + row] = finite ? (some ? largest / 32767.0f : 0.0f) : NAN;
  in.sums[block * in.rows + row] = total(sum);
}

void store_row(int type, void* y, int64_t at, const float* from, int64_t count) {
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
template <int BITS, int R>
void fused(const int32_t* words, const int32_t* x, int64_t x_stride, int inner, VI zeros, VF scales,
           const float* x_scales, const int32_t* x_sums, float* y) {
  std::conditional_t<(R <= FEW_ROWS), Sums<BITS, R>, Shifted<BITS, R>> s;
  for (int i = 0; i < inner; ++i) {
    s.block(words + i * BITS * ROWS, x + i * x_stride);
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    VI exact = add(s.sum(r), mul(zeros, set1(-x_sums[r])));
    storef(y + r * ROWS, fma(to_float(exact), mulf(scales, set1f(x_scales[r])), loadf(y + r * ROWS)));
  }
}

using Fused = void (*)(const int32_t*, const int32_t*, int64_t, int, VI, VF, const float*, const int32_t*, float*);
template <int BITS, size_t... R> inline Fused fused_for(size_t rows, std::index_sequence<R...>) {
  static constexpr Fused all[] = {fused<BITS, R + 1>...};
  return all[rows - 1];
}

// All rows of x with 16 rows of W.
template <int BITS>
void fused_rows(const Weight& w, const Input& in, int64_t rows16, int type, void* y, int64_t features) {
  const int32_t* words = w.codes + rows16 * (w.cols / COLS) * BITS * ROWS;
  const int64_t blocks = w.cols / in.block, repeat = blocks / w.groups;
  const int64_t tiles = (in.rows + FUSED_ROWS - 1) / FUSED_ROWS;
  const int inner = in.block / COLS;
  alignas(64) float out[MAX_ROWS * ROWS];
  std::memset(out, 0, in.rows * ROWS * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t group = (rows16 * w.groups + b / repeat) * ROWS;
    const int32_t* x = (const int32_t*)(in.codes + b * in.block * in.rows);
    for (int v = 0; v < ROWS; v += LANES) {
      const VI zeros = load_zeros(w, group + v);
      const VF scales = load_scales(w, group + v);
      for (int64_t t = 0, m = 0; t < tiles; ++t) {
        const int64_t next = in.rows * (t + 1) / tiles;
        fused_for<BITS>(next - m, std::make_index_sequence<FUSED_ROWS>())(
            words + v, x + m * PAIRS, in.rows * PAIRS, inner, zeros, scales, in.scales + b * in.rows + m,
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

// Codes minus zeros of a panel's columns [first, first + count) as int16 pairs: out [count/2, PANEL].
template <int BITS>
void unpack_panel(const Weight& w, int64_t row, int64_t first, int count, int64_t group_cols, int32_t* out) {
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t rows16 = (row + v * LANES) / ROWS, lane = (row + v * LANES) % ROWS;
    const int32_t* words = w.codes + (rows16 * (w.cols / COLS) + first / COLS) * BITS * ROWS + lane;
    for (int c = 0; c < count; c += COLS) {
      VI z = load_zeros(w, (rows16 * w.groups + (first + c) / group_cols) * ROWS + lane);
      z = either(z, upper_half(z));
      unpack<BITS>(words + c * BITS * ROWS / COLS, z, out + c / 2 * PANEL + v * LANES, PANEL);
    }
  }
}

// Rows of x with one block of a panel: y [rows, PANEL] += scaled integer products. The sums, one for each row and vector,
// are a pack of arguments: compilers keep those in registers, and an array of them in memory.
template <size_t... I, class... Sum>
inline void tile(std::index_sequence<I...>, const int32_t* panel, const int32_t* x, int64_t x_stride, int inner,
                 const VF (&scales)[VECTORS], const float* x_scales, float* y, Sum... sum) {
  for (int i = 0; i < inner; ++i, x += x_stride)
    for (int p = 0; p < PAIRS; ++p, panel += PANEL) {
      const VI w[] = {load(panel), load(panel + LANES)};
      ((sum = dot(sum, w[I % VECTORS], set1(x[I / VECTORS * PAIRS + p]))), ...);
    }
  (storef(y + I * LANES, fma(to_float(sum), mulf(scales[I % VECTORS], set1f(x_scales[I / VECTORS])),
                             loadf(y + I * LANES))), ...);
}
template <size_t... I>
inline void start_tile(std::index_sequence<I...> all, const int32_t* panel, const int32_t* x, int64_t x_stride,
                       int inner, const VF (&scales)[VECTORS], const float* x_scales, float* y) {
  tile(all, panel, x, x_stride, inner, scales, x_scales, y, ((void)I, zero())...);
}
template <int R>
void tile(const int32_t* panel, const int32_t* x, int64_t x_stride, int inner, const VF (&scales)[VECTORS],
          const float* x_scales, float* y) {
  start_tile(std::make_index_sequence<R * VECTORS>(), panel, x, x_stride, inner, scales, x_scales, y);
}

using Tile = void (*)(const int32_t*, const int32_t*, int64_t, int, const VF (&)[VECTORS], const float*, float*);
const Tile TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// All rows of x with one panel of W: unpacked once, then used by every tile.
template <int BITS>
void panel_rows(const Weight& w, const Input& in, int64_t row, int type, void* y, int64_t features) {
  alignas(64) int32_t panel[PANEL_BYTES / 4];
  alignas(64) float sums[MAX_ROWS * PANEL];
  std::memset(sums, 0, in.rows * PANEL * sizeof(float));
  const int64_t group_cols = w.cols / w.groups, tiles = (in.rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t first = 0; first < w.cols; first += PANEL_COLS) {
    const int count = (int)(w.cols - first < PANEL_COLS ? w.cols - first : PANEL_COLS);
    unpack_panel<BITS>(w, row, first, count, group_cols, panel);
    for (int c = 0; c < count; c += in.block) {
      VF scales[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t at = row + v * LANES;
        scales[v] = load_scales(w, (at / ROWS * w.groups + (first + c) / group_cols) * ROWS + at % ROWS);
      }
      const int16_t* x = in.codes + (first + c) / COLS * in.rows * COLS;
      const float* x_scales = in.scales + (first + c) / in.block * in.rows;
      for (int64_t t = 0, m = 0; t < tiles; ++t) {
        const int64_t next = in.rows * (t + 1) / tiles;
        TILES[next - m](panel + c / 2 * PANEL, (const int32_t*)(x + m * COLS), in.rows * PAIRS, in.block / COLS,
                        scales, x_scales + m, sums + m * PANEL);
        m = next;
      }
    }
  }
  for (int64_t m = 0; m < in.rows; ++m)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = row + v * LANES;
      if (at < features) store_row(type, y, m * features + at, sums + m * PANEL + v * LANES, features - at);
    }
}

template <int BITS>
void multiply(const Weight& w, const Input& in, const void* x, int64_t stride, int type, void* y, int64_t features,
              int threads) {
  const int64_t blocks = w.cols / in.block;
  const bool few = in.rows <= FUSED_LIMIT;
  const int64_t step = few ? ROWS : PANEL, panels = (features + step - 1) / step;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (int64_t m = 0; m < in.rows; ++m)
      for (int64_t b = 0; b < blocks; ++b) switch (type) {
          case FLOAT32: quantize<F32>(x, stride, in, m, b); break;
          case BFLOAT16: quantize<BF16>(x, stride, in, m, b); break;
          default: quantize<F16>(x, stride, in, m, b);
        }
#pragma omp for
    for (int64_t p = 0; p < panels; ++p) {
      if (few)
        fused_rows<BITS>(w, in, p, type, y, features);
      else
        panel_rows<BITS>(w, in, p * PANEL, type, y, features);
    }
  }
}

// W transposed, rounded once to bf16: out [K, blocks * 16] for blocks of 16 rows from `first` on.
template <int BITS> void dequantize(const Weight& w, int64_t first, int64_t blocks, uint16_t* out, int threads) {
  const int64_t chunks = w.cols / COLS, group_cols = w.cols / w.groups, width = blocks * ROWS;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < chunks; ++c)
      for (int v = 0; v < ROWS; v += LANES) {
        const int64_t group = ((first + b) * w.groups + c * COLS / group_cols) * ROWS + v;
        const VI z = load_zeros(w, group);
        const VF scales = load_scales(w, group);
        alignas(64) int32_t codes[PAIRS * LANES];
        unpack<BITS>(w.codes + ((first + b) * chunks + c) * BITS * ROWS + v, either(z, upper_half(z)), codes, LANES);
        uint16_t* to = out + c * COLS * width + b * ROWS + v;
        for (int p = 0; p < PAIRS; ++p, to += 2 * width) {
          const VI pair = load(codes + p * LANES);
          store_float(BF16(), to, mulf(to_float(right32<16>(upper_half(pair))), scales));
          store_float(BF16(), to + width, mulf(to_float(right32<16>(pair)), scales));
        }
      }
}

inline uint32_t code_at(const uint32_t* row, int64_t index, int bits) {
  const int64_t bit = index * bits, word = bit / 32, shift = bit % 32;
  uint32_t code = row[word] >> shift;
  if (shift + bits > 32) code |= row[word + 1] << (32 - shift);
  return code & ((1u << bits) - 1);
}

}  // namespace

extern "C" {

// Rows of x that vlmq_int16_gemm takes at once.
int vlmq_int16_max_rows() { return MAX_ROWS; }

// Bytes that vlmq_int16_gemm needs to hold x: codes, scales and sums.
int64_t vlmq_int16_scratch(int64_t rows, int64_t cols) { return rows * cols * 2 + rows * (cols / 32) * 8; }

// Checkpoint words [N, K bits/32] to the layout of codes.h; rows up to the next multiple of PANEL are `mid`.
void vlmq_int16_pack(const uint32_t* from, int64_t rows, int64_t cols, int bits, int64_t padded, int32_t* to, int threads) {
  const int pairs = 16 / bits, whole = pairs * bits;
#pragma omp parallel for num_threads(threads)
  for (int64_t r16 = 0; r16 < padded / ROWS; ++r16)
    for (int64_t c = 0; c < cols / COLS; ++c) {
      int32_t* words = to + (r16 * (cols / COLS) + c) * bits * ROWS;
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = r16 * ROWS + r;
        uint32_t out[8] = {0};
        for (int k = 0; k < COLS; ++k) {
          uint32_t code = row < rows ? code_at(from + row * (cols * bits / 32), c * COLS + k, bits) : 1u << (bits - 1);
          const int pair = k / 2, high = k % 2 * 16;
          if (pair < pairs * bits)
            out[pair / pairs] |= code << (high + pair % pairs * bits);
          else  // pair 15 of 3 bits
            for (int b = 0; b < bits; ++b) out[b] |= ((code >> b) & 1u) << (high + whole);
        }
        for (int b = 0; b < bits; ++b) words[b * ROWS + r] = (int32_t)out[b];
      }
    }
}

// x [M, K] (row stride given, in elements) to y [M, N], both of `type`; scratch as vlmq_int16_scratch says.
void vlmq_int16_gemm(const void* x, int64_t stride, int type, int64_t rows, const int32_t* codes, const void* scales,
                     int scale_type, const uint8_t* zeros, int bits, int64_t cols, int64_t groups, int64_t features,
                     void* y, void* scratch, int threads) {
  const int64_t group_cols = cols / groups;
  int block = 128;
  while (group_cols % block) block /= 2;
  const Weight w = {codes, scales, zeros, scale_type, 1 << (bits - 1), cols, groups};
  int16_t* x_codes = (int16_t*)scratch;
  float* x_scales = (float*)(x_codes + rows * cols);
  const Input in = {x_codes, x_scales, (int32_t*)(x_scales + rows * (cols / 32)), rows, block};
  switch (bits) {
    case 2: return multiply<2>(w, in, x, stride, type, y, features, threads);
    case 3: return multiply<3>(w, in, x, stride, type, y, features, threads);
    case 4: return multiply<4>(w, in, x, stride, type, y, features, threads);
    default: return multiply<8>(w, in, x, stride, type, y, features, threads);
  }
}

// See dequantize().
void vlmq_int16_dequantize(const int32_t* codes, const void* scales, int scale_type, const uint8_t* zeros, int bits,
                           int64_t cols, int64_t groups, int64_t first, int64_t blocks, void* out, int threads) {
  const Weight w = {codes, scales, zeros, scale_type, 1 << (bits - 1), cols, groups};
  switch (bits) {
    case 2: return dequantize<2>(w, first, blocks, (uint16_t*)out, threads);
    case 3: return dequantize<3>(w, first, blocks, (uint16_t*)out, threads);
    case 4: return dequantize<4>(w, first, blocks, (uint16_t*)out, threads);
    default: return dequantize<8>(w, first, blocks, (uint16_t*)out, threads);
  }
}
}
