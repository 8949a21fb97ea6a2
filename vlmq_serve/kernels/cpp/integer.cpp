// y = x W^T for W of 2, 3, 4 or 8-bit codes, with integer products.
//
// x is rounded to int16 or int8 with one scale for each row and block of 32, 64 or 128 columns that share a weight scale;
// codes are integers already; products of a block are summed in 32 bits without error and scaled in fp32. Layouts: codes.h.
#if defined(__GNUC__) && !defined(__clang__)
// These passes make gcc hold every sum twice, or reorder additions until the registers do not suffice.
#pragma GCC optimize("no-tree-ch", "no-tree-reassoc", "no-tree-ter")
#endif
#include "panels.h"

namespace {

#if VLMQ_REGISTERS == 32
constexpr int FUSED_LIMIT = MAX_ROWS;  // rows of 16-bit x up to which fused() is faster than unpacked panels: all
#else
constexpr int FUSED_LIMIT = 48;
#endif

template <class A, int BITS>
void multiply(const Weight& w, const Input& in, const void* x, int64_t stride, int type, void* y, int64_t features,
              int threads) {
  const int64_t blocks = w.cols / in.block;
  const bool few = std::is_same_v<A, Int8> || in.rows <= FUSED_LIMIT;
  const int64_t step = few ? ROWS : PANEL, panels = (features + step - 1) / step;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (int64_t m = 0; m < in.rows; ++m)
      for (int64_t b = 0; b < blocks; ++b) switch (type) {
          case FLOAT32: quantize<A, BITS, F32>(x, stride, in, m, b); break;
          case BFLOAT16: quantize<A, BITS, BF16>(x, stride, in, m, b); break;
          default: quantize<A, BITS, F16>(x, stride, in, m, b);
        }
#pragma omp for
    for (int64_t p = 0; p < panels; ++p) {
      if (few)
        fused_rows<A, BITS>(w, in, p, type, y, features);
      else if constexpr (FUSED_LIMIT < MAX_ROWS)
        panel_rows<BITS>(w, in, p * PANEL, type, y, features);
    }
  }
}

template <class A>
void multiply_bits(int bits, const Weight& w, const Input& in, const void* x, int64_t stride, int type, void* y,
                   int64_t features, int threads) {
  switch (bits) {
    case 2: return multiply<A, 2>(w, in, x, stride, type, y, features, threads);
    case 3: return multiply<A, 3>(w, in, x, stride, type, y, features, threads);
    case 4: return multiply<A, 4>(w, in, x, stride, type, y, features, threads);
    default: return multiply<A, 8>(w, in, x, stride, type, y, features, threads);
  }
}

// W transposed, rounded once to bf16: out [K, blocks * 32] for blocks of 32 rows from `first` on.
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

#pragma GCC visibility push(default)
extern "C" {

// Rows of x that vlmq_gemm takes at once.
int vlmq_max_rows() { return MAX_ROWS; }

// Bytes that vlmq_gemm needs to hold x: codes, scales and sums.
int64_t vlmq_scratch(int64_t rows, int64_t cols) { return rows * cols * 2 + rows * (cols / 32) * 8; }

// Checkpoint words [N, K bits/32] to the layout of codes.h; rows from `rows` to `padded`, a multiple of ROWS, are `mid`.
void vlmq_pack(const uint32_t* from, int64_t rows, int64_t cols, int bits, int64_t padded, int32_t* to, int threads) {
  const int pairs = 16 / bits, whole = pairs * bits;
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < padded / ROWS; ++block)
    for (int64_t c = 0; c < cols / COLS; ++c) {
      int32_t* words = to + (block * (cols / COLS) + c) * bits * ROWS;
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = block * ROWS + r;
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

// x [M, K] (row stride given, in elements) to y [M, N], both of `type`, with x rounded to `x_bits`, 16 or 8; scratch as
// vlmq_scratch says.
void vlmq_gemm(const void* x, int64_t stride, int type, int64_t rows, const int32_t* codes, const void* scales,
               int scale_type, const uint8_t* zeros, int bits, int64_t cols, int64_t groups, int64_t features, void* y,
               void* scratch, int x_bits, int threads) {
  const int64_t group_cols = cols / groups;
  int block = 128;
  while (group_cols % block) block /= 2;
  const Weight w = {codes, scales, zeros, scale_type, 1 << (bits - 1), cols, groups};
  float* x_scales = (float*)((int16_t*)scratch + rows * cols);
  const Input in = {scratch, x_scales, (int32_t*)(x_scales + rows * (cols / 32)), rows, block};
  if (x_bits == 8)
    multiply_bits<Int8>(bits, w, in, x, stride, type, y, features, threads);
  else
    multiply_bits<Int16>(bits, w, in, x, stride, type, y, features, threads);
}

// See dequantize().
void vlmq_dequantize(const int32_t* codes, const void* scales, int scale_type, const uint8_t* zeros, int bits,
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
#pragma GCC visibility pop
