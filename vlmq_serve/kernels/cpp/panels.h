// 16-bit inputs, many rows: codes are unpacked once into the first cache.
#pragma once
#include "fused.h"

constexpr int TILE_ROWS = 6;             // of x, in one call of tile(): 12 sums, and registers left for W and x
constexpr int VECTORS = 2;               // of W, in a panel
constexpr int PANEL = VECTORS * LANES;   // rows of W whose codes are unpacked together
constexpr int PANEL_BYTES = 16 << 10;    // unpacked codes that stay in the first cache while all rows of x pass
constexpr int PANEL_COLS = PANEL_BYTES / (2 * PANEL);

// Codes minus zeros of a panel's columns [first, first + count) as int16 pairs: out [count/2, PANEL].
template <int BITS>
static void unpack_panel(const Weight& w, int64_t row, int64_t first, int count, int64_t group_cols, int32_t* out) {
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t block = (row + v * LANES) / ROWS, lane = (row + v * LANES) % ROWS;
    const int32_t* words = w.codes + (block * (w.cols / COLS) + first / COLS) * BITS * ROWS + lane;
    for (int c = 0; c < count; c += COLS) {
      VI z = load_zeros(w, (block * w.groups + (first + c) / group_cols) * ROWS + lane);
      z = either(z, upper_half(z));
      unpack<BITS>(words + c * BITS * ROWS / COLS, z, out + c / 2 * PANEL + v * LANES, PANEL);
    }
  }
}

// Rows of x with one block of a panel: y [rows, PANEL] += scaled integer products. The sums, one for each row and vector,
// are a pack of arguments: compilers keep those in registers, and an array of them in memory.
template <size_t... I, class... Sum>
static inline void tile(std::index_sequence<I...>, const int32_t* panel, const int32_t* x, int64_t x_stride, int inner,
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
static inline void start_tile(std::index_sequence<I...> all, const int32_t* panel, const int32_t* x, int64_t x_stride,
                              int inner, const VF (&scales)[VECTORS], const float* x_scales, float* y) {
  tile(all, panel, x, x_stride, inner, scales, x_scales, y, ((void)I, zero())...);
}
template <int R>
static void tile(const int32_t* panel, const int32_t* x, int64_t x_stride, int inner, const VF (&scales)[VECTORS],
                 const float* x_scales, float* y) {
  start_tile(std::make_index_sequence<R * VECTORS>(), panel, x, x_stride, inner, scales, x_scales, y);
}

using Tile = void (*)(const int32_t*, const int32_t*, int64_t, int, const VF (&)[VECTORS], const float*, float*);
static const Tile TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// All rows of x with one panel of W: unpacked once, then used by every tile.
template <int BITS>
static void panel_rows(const Weight& w, const Input& in, int64_t row, int type, void* y, int64_t features) {
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
      const int16_t* x = (const int16_t*)in.codes + (first + c) / COLS * in.rows * COLS;
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
