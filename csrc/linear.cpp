// out = (x w^T + bias) + residual over panels of 32 columns of a packed weight (layout: pack.cpp); also embed_row.
//
// Grouped weights, a row and a column at a time, with the row rounded to int8 in the same groups (quantize.cpp):
//   c = 0; for each group, ascending:
//     dot = sum of (code_w - zero) * code_x                                  exact, int32
//     c = fma(float(dot), scale_w * scale_x, c)                              scale_w * scale_x rounded once
//     with minimums: c = fma(minimum_w, scale_x * float(sum of code_x), c)   scale_x * float(sum) rounded once
// where a two-level scale_w is d * factor, exact in float32. Dense weights: c = 0; for each k, ascending: c = fma(float(w), x, c).
// Nothing else happens to a sum, in whatever tile it stands, so a row's bits depend on neither its neighbours nor the
// instruction set. K is never split between threads.
//
// Tiles. AVX-512: up to 6 rows by 2 vectors of 16 columns, so that two vectors of weights and six of activations feed twelve
// vpdpbusd into twelve sums of a group. AVX2 has half the registers of half the width: 3 to 6 rows by one vector of 16 columns
// (two registers), twelve 16-bit sums, and the float sums wait in memory for the end of a group; one or two rows, where
// memory is the limit, take both vectors at once. Codes of 6 and 8 bits leave 16 bits after two and one steps, so sums are 32-bit
// and rows come before steps, four at a time. Codes are taken apart anew for each tile: a few cheap instructions beside twelve
// products. Each load of codes fetches 4 KB ahead, over the page's end where the hardware stops. Zero points become a number a
// row and group, -zero * sum of code_x, that is added to the sum in float32, exact since all of it stays below 2**24.
#include "kernel_functions.h"
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
constexpr int kTileRows = 6, kRowsOfWholePanels = 6;
#elif defined(OCTAVO_ISA_AVX2)
constexpr int kTileRows = 6, kRowsOfWholePanels = 2;
#else
constexpr int kTileRows = 4, kRowsOfWholePanels = 4;
#endif
constexpr int kHalves = 2;        // vectors of columns a panel
constexpr int kUnitSteps = 8;     // of four k's, in a unit of codes
constexpr int64_t kAhead = 4096;  // bytes

template <int kBits>
constexpr int kMostRows = kMostSteps<kBits> <= 2 && kTileRows > 4 ? 4 : kTileRows;

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

struct GroupedPanel {
  const uint8_t* data;
  GroupedLayout layout;
  int64_t groups;
  float shift;  // shift * sum of code_x is added to the integer sum
  bool has_minimums;
};

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

// ---- grouped weights ---------------------------------------------------------------------------------------------

// The vector of a plane that holds step kStep, one of kTogether steps in it.
template <int kStep, int kTogether>
OCTAVO_INLINE u8x64 fetch(const uint8_t* plane) {
  const uint8_t* p = plane + kStep / kTogether * 128;
  if constexpr (kStep % kTogether == 0) __builtin_prefetch(p + kAhead);
  return load_u8(p);
}

// The codes of a step of a unit for 16 columns; `unit` points at the first plane's bytes for them. The planes: pack.cpp.
template <int kBits, int kStep>
OCTAVO_INLINE u8x64 load_codes(const uint8_t* unit) {
  if constexpr (kBits == 8) {
    __builtin_prefetch(unit + kStep * 128 + kAhead);
    return load_bytes(unit + kStep * 128);
  } else if constexpr (kBits >= 4) {
    const u8x64 low = move_bits<kStep % 2 * 4, 0, 15>(fetch<kStep, 2>(unit));
    if constexpr (kBits == 5) return low | move_bits<kStep, 4, 1>(fetch<kStep, 8>(unit + 512));
    if constexpr (kBits == 6) return low | move_bits<kStep % 4 * 2, 4, 3>(fetch<kStep, 4>(unit + 512));
    return low;
  } else {
    const u8x64 low = move_bits<kStep % 4 * 2, 0, 3>(fetch<kStep, 4>(unit));
    if constexpr (kBits == 3) return low | move_bits<kStep, 2, 1>(fetch<kStep, 8>(unit + 256));
    return low;
  }
}

// Scales (kind 0) or minimums (kind 1) of group g of a block for 16 columns.
OCTAVO_INLINE f32x16 load_scales(const GroupedPanel& panel, const uint8_t* block, int64_t groups, int64_t g, int kind,
                                 int64_t column) {
  const auto* halves = reinterpret_cast<const uint16_t*>(block);
  if (panel.layout.factors == 0) return load_f16(halves + (kind * groups + g) * kPanel + column);
  const auto* factors = reinterpret_cast<const int8_t*>(block + panel.layout.factors);
  return load_f16(halves + kind * kPanel + column) * load_i8(factors + (kind * groups + g) * kPanel + column);
}

OCTAVO_INLINE Output at_column(const Output& to, int64_t column) {
  return {to.out + column, to.bias ? to.bias + column : nullptr, to.residual ? to.residual + column : nullptr, to.stride,
          to.columns - column};
}

#if defined(OCTAVO_ISA_AVX512) || defined(OCTAVO_ISA_AVX2)

// The integer sums of the group whose first step of a unit is kFirst.
template <int kBits, int kGroup, int kRows, int kVectors, int kFirst>
OCTAVO_INLINE void multiply_group(const uint8_t* unit, const int8_t* x, i32x16 (&totals)[kRows][kVectors]) {
  constexpr int kSteps = kGroup / 4, kSpan = kMostSteps<kBits> < kSteps ? kMostSteps<kBits> : kSteps;
  for_each<kSteps / kSpan>([&](auto span) OCTAVO_INLINE_LAMBDA {
    constexpr int kBegin = decltype(span)::value * kSpan;
    const auto take = [&](int i, int v, sums sum) OCTAVO_INLINE_LAMBDA {
      totals[i][v] = kBegin == 0 ? last_sums(sum) : add_sums(totals[i][v], sum);
    };
    if constexpr (kSpan <= 2) {
      u8x64 w[kSpan][kVectors];
      for_each<kSpan>([&](auto step) OCTAVO_INLINE_LAMBDA {
        constexpr int kStep = decltype(step)::value;
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) w[kStep][v] = load_codes<kBits, kFirst + kBegin + kStep>(unit + v * 64);
      });
      OCTAVO_UNROLL
      for (int i = 0; i < kRows; ++i) {
        sums sum[kVectors];
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[v] = no_sums();
        OCTAVO_UNROLL
        for (int s = 0; s < kSpan; ++s) {
          const u8x64 xi = broadcast_x4(x + i * kGroup + 4 * (kBegin + s));
          OCTAVO_UNROLL
          for (int v = 0; v < kVectors; ++v) sum[v] = add_products<kBits>(sum[v], w[s][v], xi);
        }
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) take(i, v, sum[v]);
      }
    } else {
      sums sum[kRows][kVectors];
      OCTAVO_UNROLL
      for (int i = 0; i < kRows; ++i) {
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] = no_sums();
      }
      for_each<kSpan>([&](auto step) OCTAVO_INLINE_LAMBDA {
        constexpr int kStep = kBegin + decltype(step)::value;
        u8x64 w[kVectors];
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) w[v] = load_codes<kBits, kFirst + kStep>(unit + v * 64);
        OCTAVO_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const u8x64 xi = broadcast_x4(x + i * kGroup + 4 * kStep);
          OCTAVO_UNROLL
          for (int v = 0; v < kVectors; ++v) sum[i][v] = add_products<kBits>(sum[i][v], w[v], xi);
        }
      });
      OCTAVO_UNROLL
      for (int i = 0; i < kRows; ++i) {
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) take(i, v, sum[i][v]);
      }
    }
  });
}

template <int kBits, int kGroup, int kRows, int kVectors>
void grouped_tile(const GroupedPanel& panel, int64_t column, const QuantizedRows& rows, const Output& to) {
  constexpr int kParts = 32 / kGroup;  // groups of a unit
  const GroupedLayout& layout = panel.layout;
  const int64_t groups = panel.groups, groups_of_block = layout.block_columns / kGroup;
  f32x16 c[kRows][kVectors];
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    OCTAVO_UNROLL
    for (int v = 0; v < kVectors; ++v) c[i][v] = set1(0.0f);
  }
  const uint8_t* block = panel.data;
  for (int64_t first = 0; first < groups; first += groups_of_block, block += layout.block) {
    const uint8_t* unit = block + layout.header + column * 4;
    for (int64_t in_block = 0; in_block < groups_of_block; in_block += kParts, unit += layout.unit) {
      for_each<kParts>([&](auto part) OCTAVO_INLINE_LAMBDA {
        constexpr int kPart = decltype(part)::value;
        const int64_t g = first + in_block + kPart;
        if (kPart > 0 && g >= groups) return;  // half a unit at the end
        const int64_t at = g * rows.stride;
        i32x16 totals[kRows][kVectors];
        multiply_group<kBits, kGroup, kRows, kVectors, kPart * kUnitSteps / kParts>(unit, rows.codes + at * kGroup, totals);
        OCTAVO_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const f32x16 scale = load_scales(panel, block, groups_of_block, in_block + kPart, 0, column + v * kLanes);
          const auto add_rows = [&](auto with_minimums) OCTAVO_INLINE_LAMBDA {
            f32x16 minimum = scale;
            if constexpr (decltype(with_minimums)::value) {
              minimum = load_scales(panel, block, groups_of_block, in_block + kPart, 1, column + v * kLanes);
            }
            OCTAVO_UNROLL
            for (int i = 0; i < kRows; ++i) {
              f32x16 sum = to_f32(totals[i][v]);
              if (panel.shift != 0.0f) sum = fma(set1(panel.shift), set1(rows.sums[at + i]), sum);
              c[i][v] = fma(sum, scale * set1(rows.scales[at + i]), c[i][v]);
              if constexpr (decltype(with_minimums)::value) {
                c[i][v] = fma(minimum, set1(rows.scaled_sums[at + i]), c[i][v]);
              }
            }
          };
          if (panel.has_minimums) {
            add_rows(Int<1>());
          } else {
            add_rows(Int<0>());
          }
        }
      });
    }
  }
  finish(c, to);
}

// kRows rows of one panel: both vectors of columns at once, or one after the other.
template <int kBits, int kGroup, int kRows>
OCTAVO_INLINE void grouped_tiles(const GroupedPanel& panel, const QuantizedRows& rows, const Output& to) {
  if constexpr (kRows > kMostRows<kBits>) {
  } else if constexpr (kRows <= kRowsOfWholePanels) {
    grouped_tile<kBits, kGroup, kRows, kHalves>(panel, 0, rows, to);
  } else {
    grouped_tile<kBits, kGroup, kRows, 1>(panel, 0, rows, to);
    if (to.columns > kLanes) grouped_tile<kBits, kGroup, kRows, 1>(panel, kLanes, rows, at_column(to, kLanes));
  }
}

// Rows count of one panel, in tiles as equal as can be.
template <int kBits, int kGroup>
void grouped_rows(const GroupedPanel& panel, QuantizedRows rows, Output to, int64_t count) {
  for (int64_t tiles = (count + kMostRows<kBits> - 1) / kMostRows<kBits>; tiles > 0; --tiles) {
    const int64_t taken = (count + tiles - 1) / tiles;
    switch (taken) {
      case 1: grouped_tiles<kBits, kGroup, 1>(panel, rows, to); break;
      case 2: grouped_tiles<kBits, kGroup, 2>(panel, rows, to); break;
      case 3: grouped_tiles<kBits, kGroup, 3>(panel, rows, to); break;
      case 4: grouped_tiles<kBits, kGroup, 4>(panel, rows, to); break;
      case 5: grouped_tiles<kBits, kGroup, 5>(panel, rows, to); break;
      default: grouped_tiles<kBits, kGroup, 6>(panel, rows, to); break;
    }
    rows.codes += taken * kGroup;
    rows.scales += taken;
    rows.sums += taken;
    rows.scaled_sums += taken;
    to.out += taken * to.stride;
    if (to.residual) to.residual += taken * to.stride;
    count -= taken;
  }
}

// The pairs that describe() makes (pack.cpp).
void grouped_rows(int32_t bits, int32_t group, const GroupedPanel& panel, const QuantizedRows& rows, const Output& to,
                  int64_t count) {
  if (group == 32) {
    if (bits == 4) return grouped_rows<4, 32>(panel, rows, to, count);
    if (bits == 5) return grouped_rows<5, 32>(panel, rows, to, count);
    return grouped_rows<8, 32>(panel, rows, to, count);
  }
  if (bits == 2) return grouped_rows<2, 16>(panel, rows, to, count);
  if (bits == 3) return grouped_rows<3, 16>(panel, rows, to, count);
  if (bits == 6) return grouped_rows<6, 16>(panel, rows, to, count);
  return grouped_rows<8, 16>(panel, rows, to, count);
}

#else

// Without vectors: the codes of a unit are taken apart once for up to kTileRows rows, then plain loops.
template <int kBits>
void decode_unit(const uint8_t* unit, uint8_t (&w)[kUnitSteps][kHalves][64]) {
  for_each<kUnitSteps>([&](auto step) {
    constexpr int kStep = decltype(step)::value;
    for (int v = 0; v < kHalves; ++v) {
      const u8x64 codes = load_codes<kBits, kStep>(unit + v * 64);
      memcpy(w[kStep][v], codes.v, sizeof codes.v);
    }
  });
}

void decode_unit(int32_t bits, const uint8_t* unit, uint8_t (&w)[kUnitSteps][kHalves][64]) {
  switch (bits) {
    case 2: return decode_unit<2>(unit, w);
    case 3: return decode_unit<3>(unit, w);
    case 4: return decode_unit<4>(unit, w);
    case 5: return decode_unit<5>(unit, w);
    case 6: return decode_unit<6>(unit, w);
    default: return decode_unit<8>(unit, w);
  }
}

// Adds one group of one row: `steps` steps of weights, four k's each.
void add_group(const GroupedPanel& panel, const uint8_t* block, int64_t groups_of_block, int64_t in_block,
               const uint8_t (*w)[kHalves][64], int64_t steps, const int8_t* x, float start, float scale, float scaled_sum,
               f32x16 (&c)[kHalves]) {
  for (int v = 0; v < kHalves; ++v) {
    i32x16 sum = set1_i32(0);
    for (int64_t s = 0; s < steps; ++s) sum = dot(sum, load_u8(w[s][v]), broadcast_x4(x + 4 * s));
    const int64_t column = v * kLanes;
    c[v] = fma(to_f32(sum) + set1(start), load_scales(panel, block, groups_of_block, in_block, 0, column) * set1(scale), c[v]);
    if (panel.has_minimums) {
      c[v] = fma(load_scales(panel, block, groups_of_block, in_block, 1, column), set1(scaled_sum), c[v]);
    }
  }
}

void grouped_rows(int32_t bits, int32_t group, const GroupedPanel& panel, const QuantizedRows& rows, const Output& to,
                  int64_t count) {
  const GroupedLayout& layout = panel.layout;
  const int64_t k = panel.groups * group, groups_of_block = layout.block_columns / group;
  for (int64_t row = 0; row < count; row += kTileRows) {
    const int64_t taken = count - row < kTileRows ? count - row : kTileRows;
    f32x16 c[kTileRows][kHalves];
    for (int i = 0; i < kTileRows; ++i) c[i][0] = c[i][1] = set1(0.0f);
    for (int64_t first = 0; first < k; first += 32) {
      const uint8_t* block = panel.data + first / layout.block_columns * layout.block;
      const int64_t in_block = first % layout.block_columns;
      uint8_t w[kUnitSteps][kHalves][64];
      decode_unit(bits, block + layout.header + in_block / 32 * layout.unit, w);
      for (int64_t i = 0; i < taken; ++i) {
        for (int64_t j = first; j < first + 32 && j < k; j += group) {
          const int64_t at = j / group * rows.stride + row + i;
          add_group(panel, block, groups_of_block, (in_block + j - first) / group, w + (j - first) / 4, group / 4,
                    rows.codes + at * group, panel.shift * rows.sums[at], rows.scales[at], rows.scaled_sums[at], c[i]);
        }
      }
    }
    for (int64_t i = 0; i < taken; ++i) {
      const f32x16 one[1][kHalves] = {{c[i][0], c[i][1]}};
      const int64_t shift = (row + i) * to.stride;
      finish(one, {to.out + shift, to.bias, to.residual ? to.residual + shift : nullptr, to.stride, to.columns});
    }
  }
}

#endif

Output output_of(const LinearArgs& args, int64_t panel) {
  const int64_t column = panel * kPanel;
  return at_column({args.out, args.bias, args.residual, args.out_stride, args.weight->n}, column);
}

void grouped_linear(const LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  const PackedWeight& weight = *args.weight;
  const GroupedLayout layout = layout_of(weight);
  const auto shift = static_cast<float>((weight.bits == 8 ? kBytesZero : 0) - weight.zero);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const GroupedPanel panel = {weight.data + p * layout.panel, layout, weight.k / weight.group, shift, weight.has_minimums};
    grouped_rows(weight.bits, weight.group, panel, args.quantized, output_of(args, p), args.rows);
  }
}

// ---- dense weights -----------------------------------------------------------------------------------------------

template <WeightKind kKind>
OCTAVO_INLINE f32x16 load_dense(const uint8_t* data, int64_t index) {
  if constexpr (kKind == WeightKind::kF32) return load(reinterpret_cast<const float*>(data) + index);
  else if constexpr (kKind == WeightKind::kF16) return load_f16(reinterpret_cast<const uint16_t*>(data) + index);
  else return load_bf16(reinterpret_cast<const uint16_t*>(data) + index);
}

template <WeightKind kKind, int kRows, int kVectors>
void dense_tile(const uint8_t* data, const float* x, int64_t k, const Output& to) {
  f32x16 c[kRows][kVectors];
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    OCTAVO_UNROLL
    for (int v = 0; v < kVectors; ++v) c[i][v] = set1(0.0f);
  }
  constexpr int64_t kElement = kKind == WeightKind::kF32 ? 4 : 2;
  for (int64_t j = 0; j < k; ++j) {
    f32x16 w[kVectors];
    OCTAVO_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(data + (j * kPanel + v * kLanes) * kElement + kAhead);
      w[v] = load_dense<kKind>(data, j * kPanel + v * kLanes);
    }
    OCTAVO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const f32x16 xi = set1(x[i * k + j]);
      OCTAVO_UNROLL
      for (int v = 0; v < kVectors; ++v) c[i][v] = fma(w[v], xi, c[i][v]);
    }
  }
  finish(c, to);
}

template <WeightKind kKind, int kRows>
OCTAVO_INLINE void dense_tiles(const uint8_t* data, const float* x, int64_t k, const Output& to) {
  constexpr int64_t kElement = kKind == WeightKind::kF32 ? 4 : 2;
  if constexpr (kRows > kTileRows) {
  } else if constexpr (kRows <= kRowsOfWholePanels) {
    dense_tile<kKind, kRows, kHalves>(data, x, k, to);
  } else {
    dense_tile<kKind, kRows, 1>(data, x, k, to);
    if (to.columns > kLanes) dense_tile<kKind, kRows, 1>(data + kLanes * kElement, x, k, at_column(to, kLanes));
  }
}

template <WeightKind kKind>
void dense_linear(const LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  const int64_t k = args.weight->k;
  constexpr int64_t kElement = kKind == WeightKind::kF32 ? 4 : 2;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const uint8_t* data = args.weight->data + p * k * kPanel * kElement;
    const float* x = args.x;
    Output to = output_of(args, p);
    int64_t count = args.rows;
    for (int64_t tiles = (count + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
      const int64_t taken = (count + tiles - 1) / tiles;
      switch (taken) {
        case 1: dense_tiles<kKind, 1>(data, x, k, to); break;
        case 2: dense_tiles<kKind, 2>(data, x, k, to); break;
        case 3: dense_tiles<kKind, 3>(data, x, k, to); break;
        case 4: dense_tiles<kKind, 4>(data, x, k, to); break;
        case 5: dense_tiles<kKind, 5>(data, x, k, to); break;
        default: dense_tiles<kKind, 6>(data, x, k, to); break;
      }
      x += taken * k;
      to.out += taken * to.stride;
      if (to.residual) to.residual += taken * to.stride;
      count -= taken;
    }
  }
}

// ---- one row of a weight -------------------------------------------------------------------------------------------

template <WeightKind kKind>
void dense_row(const PackedWeight& weight, int64_t row, float* out) {
  const int64_t first = row / kPanel * weight.k * kPanel + row % kPanel;
  for (int64_t j = 0; j < weight.k; ++j) {
    const int64_t at = first + j * kPanel;
    if constexpr (kKind == WeightKind::kF32) out[j] = reinterpret_cast<const float*>(weight.data)[at];
    else if constexpr (kKind == WeightKind::kF16) out[j] = f16_to_f32(reinterpret_cast<const uint16_t*>(weight.data)[at]);
    else out[j] = bf16_to_f32(reinterpret_cast<const uint16_t*>(weight.data)[at]);
  }
}

// Code j of a unit; `unit` points at the first plane's byte for the column and j % 4.
int32_t code_at(const uint8_t* unit, int32_t bits, int64_t j) {
  const int64_t step = j / 4;
  const uint8_t* byte = unit + j % 4;
  if (bits == 8) return byte[step * 128];
  const uint8_t* rest = byte + (bits >= 4 ? 512 : 256);
  const int32_t pair_shift = static_cast<int32_t>(step % 4 * 2), shift = static_cast<int32_t>(step);
  const int32_t low = bits >= 4 ? byte[step / 2 * 128] >> step % 2 * 4 & 15 : byte[step / 4 * 128] >> pair_shift & 3;
  if (bits == 3) return low | (rest[0] >> shift & 1) << 2;
  if (bits == 5) return low | (rest[0] >> shift & 1) << 4;
  if (bits == 6) return low | (rest[step / 4 * 128] >> pair_shift & 3) << 4;
  return low;
}

float scale_at(const GroupedLayout& layout, const uint8_t* block, int64_t groups, int64_t g, int64_t kind, int64_t column) {
  const auto* halves = reinterpret_cast<const uint16_t*>(block);
  if (layout.factors == 0) return f16_to_f32(halves[(kind * groups + g) * kPanel + column]);
  const auto* factors = reinterpret_cast<const int8_t*>(block + layout.factors);
  return f16_to_f32(halves[kind * kPanel + column]) * static_cast<float>(factors[(kind * groups + g) * kPanel + column]);
}

}  // namespace

void linear(const LinearArgs* args, int64_t panel_begin, int64_t panel_end) {
  switch (args->weight->kind) {
    case WeightKind::kF32: return dense_linear<WeightKind::kF32>(*args, panel_begin, panel_end);
    case WeightKind::kF16: return dense_linear<WeightKind::kF16>(*args, panel_begin, panel_end);
    case WeightKind::kBF16: return dense_linear<WeightKind::kBF16>(*args, panel_begin, panel_end);
    default: return grouped_linear(*args, panel_begin, panel_end);
  }
}

// One row as GroupedTensor.dequantize has it: the product rounded, then the sum.
void embed_row(const PackedWeight* weight, int64_t row, float* out) {
  switch (weight->kind) {
    case WeightKind::kF32: return dense_row<WeightKind::kF32>(*weight, row, out);
    case WeightKind::kF16: return dense_row<WeightKind::kF16>(*weight, row, out);
    case WeightKind::kBF16: return dense_row<WeightKind::kBF16>(*weight, row, out);
    default: break;
  }
  const GroupedLayout layout = layout_of(*weight);
  const int64_t column = row % kPanel, half = column / kLanes * 64 + column % kLanes * 4;
  const int64_t groups = layout.block_columns / weight->group;
  const uint8_t* panel = weight->data + row / kPanel * layout.panel;
  for (int64_t j = 0; j < weight->k; ++j) {
    const uint8_t* block = panel + j / layout.block_columns * layout.block;
    const int64_t in_block = j % layout.block_columns, g = in_block / weight->group;
    const uint8_t* unit = block + layout.header + in_block / 32 * layout.unit + half;
    const float value = scale_at(layout, block, groups, g, 0, column) *
                        static_cast<float>(code_at(unit, weight->bits, in_block % 32) - weight->zero);
    out[j] = weight->has_minimums ? value + scale_at(layout, block, groups, g, 1, column) : value;
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
