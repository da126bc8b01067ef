// What the tiles of linear.cpp share: their sizes, unrolled loops, and the end of a sum.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace octavo {
namespace OCTAVO_NS {

namespace {

// Loops over the rows and vectors of a tile: unrolled where the sums live in registers.
#if defined(OCTAVO_ISA_AVX512) || defined(OCTAVO_ISA_AVX2)
#define OCTAVO_UNROLL _Pragma("GCC unroll 8")
#else
#define OCTAVO_UNROLL _Pragma("GCC unroll 1")
#endif
#define OCTAVO_INLINE_LAMBDA __attribute__((always_inline))

#if defined(OCTAVO_ISA_AVX512)
constexpr int kTileRows = 6, kTileVectors = 2, kRowsOfWholePanels = 6;
#elif defined(OCTAVO_ISA_AVX2)
constexpr int kTileRows = 6, kTileVectors = 1, kRowsOfWholePanels = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2, kRowsOfWholePanels = 4;
#endif
constexpr int kHalves = 2;        // vectors of columns a panel
constexpr int64_t kAhead = 4096;  // bytes

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// f(Int<0>()) to f(Int<kCount - 1>()).
template <int kCount, typename F>
OCTAVO_INLINE void for_each(const F& f) {
  if constexpr (kCount > 0) {
    for_each<kCount - 1>(f);
    f(Int<kCount - 1>());
  }
}

// f(rows, row) for tiles of `count` rows, as equal as can be; rows is one of Int<1> to Int<kTileRows>.
template <typename F>
OCTAVO_INLINE void for_tiles(int64_t count, const F& f) {
  int64_t row = 0;
  for (int64_t tiles = (count + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t taken = (count - row + tiles - 1) / tiles;
    for_each<kTileRows>([&](auto index) OCTAVO_INLINE_LAMBDA {
      if (taken == decltype(index)::value + 1) f(Int<decltype(index)::value + 1>(), row);
    });
    row += taken;
  }
}

template <int kRows, int kVectors>
OCTAVO_INLINE void clear(f32x16 (&c)[kRows][kVectors]) {
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    OCTAVO_UNROLL
    for (int v = 0; v < kVectors; ++v) c[i][v] = set1(0.0f);
  }
}

struct Output {  // of a tile: its first row, its first column
  float* out;
  const float* bias;      // or null
  const float* residual;  // like out, or null
  int64_t stride;
  int64_t columns;        // from the first one on that exist
};

// Bias and residual, and only the columns that exist.
template <int kRows, int kVectors>
OCTAVO_INLINE void finish(const f32x16 (&c)[kRows][kVectors], const Output& to) {
  OCTAVO_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = v * kLanes, left = to.columns - first;
    if (left <= 0) break;
    const bool whole = left >= kLanes;
    f32x16 bias = set1(0.0f);
    if (to.bias) bias = whole ? load(to.bias + first) : load_partial(to.bias + first, left);
    OCTAVO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      f32x16 value = c[i][v];
      const int64_t at = i * to.stride + first;
      if (to.bias) value = value + bias;
      if (to.residual) value = value + (whole ? load(to.residual + at) : load_partial(to.residual + at, left));
      if (whole) {
        store(to.out + at, value);
      } else {
        store_partial(to.out + at, value, left);
      }
    }
  }
}

OCTAVO_INLINE Output at_column(const Output& to, int64_t column) {
  return {to.out + column, to.bias ? to.bias + column : nullptr, to.residual ? to.residual + column : nullptr, to.stride,
          to.columns - column};
}

OCTAVO_INLINE Output at_row(const Output& to, int64_t row) {
  const int64_t at = row * to.stride;
  return {to.out + at, to.bias, to.residual ? to.residual + at : nullptr, to.stride, to.columns};
}

}  // namespace

}  // namespace OCTAVO_NS
}  // namespace octavo
