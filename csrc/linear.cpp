// out = (x w^T + bias) + residual over panels of 32 columns of a packed weight (layout: pack.cpp); also embed_row.
//
// Grouped weights, a row and a column at a time, with the row rounded to int8 in the same groups (quantize.cpp):
//   c = 0; for each group, ascending:
//     dot = sum of (code_w - zero) * code_x                                  exact, int32
//     c = fma(float(dot), scale_w * scale_x, c)                              scale_w * scale_x rounded once
//     with minimums: c = fma(minimum_w, scale_x * float(sum of code_x), c)   scale_x * float(sum) rounded once
// Dense weights: c = 0; for each k, ascending: c = fma(float(w), x, c).
// Nothing else happens to a sum, in whatever tile it stands, so a row's bits depend on neither its neighbours nor the
// instruction set. K is never split between threads.
//
// A tile is kTileRows rows by 32 columns: AVX-512 6 x 2 vectors (12 sums of a group, 12 of the row, 2 of weights and
// some scales in 32 registers: one load of nibbles and six of activations feed twelve vpdpbusd); AVX2 2 x 4 vectors.
// Nibbles are split anew for each tile: three cheap instructions beside twelve products. Splitting them once into
// scratch instead was 2 % slower at 64 rows, 13 % at 256 and half as fast at 6 (it doubles the cache traffic). Each
// step of a tile fetches 4 KB ahead, over the page's end where the hardware stops: that took six rows from 380 to 500
// GOP/s. Zero points become a number a row and group, -zero * sum of code_x, with which the integer sum begins; these
// numbers are made kRowBlock rows at a time. Measured 2026-11-23 on a 2-core AMD EPYC Zen 5 VM, one thread
// (tests/linear_bench.cpp): 4-bit codes with minimums, per cent of the int8 limit of the same run (1,040 GOP/s): 44 to
// 51 at 6 rows, 51 to 56 at 16, 53 to 64 at 64, 56 to 66 at 256 (the product and the two FMAs that follow each group
// leave 73); one row reads 24 to 46 GB/s, all that the memory gave in that minute; float16 and bfloat16 240 GFLOP/s at
// 64 rows, 97 % of fp32's limit. AVX2: 200 GOP/s at 64 rows.
#include "kernel_functions.h"
#include "simd.h"

namespace octavo {
namespace OCTAVO_NS {

namespace {

// Loops over the rows and halves of a tile: unrolled where the sums live in registers.
#if defined(OCTAVO_ISA_AVX512) || defined(OCTAVO_ISA_AVX2)
#define OCTAVO_UNROLL _Pragma("GCC unroll 8")
#else
#define OCTAVO_UNROLL _Pragma("GCC unroll 1")
#endif

#if defined(OCTAVO_ISA_AVX512)
constexpr int kTileRows = 6;
#elif defined(OCTAVO_ISA_AVX2)
constexpr int kTileRows = 2;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kHalves = 2;        // vectors of columns a panel
constexpr int64_t kAhead = 4096;  // bytes

struct GroupedPanel {
  const uint8_t* codes;   // of the panel
  const uint8_t* scales;  // [groups][32], float16 or float32
  const uint8_t* minimums;
  bool scales_f32;
  int64_t groups;
};

struct GroupedRows {         // of a tile's first row
  const int8_t* codes;       // [rows][groups * group]
  const float* scales;       // [rows][groups]
  const int32_t* offsets;    // [rows][groups] the integer sum begins here
  const float* scaled_sums;  // [rows][groups] scale * sum, for the minimums
};

struct Output {  // of a tile: its first row, the panel's first column
  float* out;
  const float* bias;      // of the panel, or null
  const float* residual;  // like out, or null
  int64_t stride;
  int64_t columns;  // of the panel that exist
};

OCTAVO_INLINE f32x16 load_scales(const uint8_t* scales, int64_t index, bool is_f32) {
  if (is_f32) return load(reinterpret_cast<const float*>(scales) + index);
  return load_f16(reinterpret_cast<const uint16_t*>(scales) + index);
}

OCTAVO_INLINE float load_scale(const uint8_t* scales, int64_t index, bool is_f32) {
  if (is_f32) return reinterpret_cast<const float*>(scales)[index];
  return f16_to_f32(reinterpret_cast<const uint16_t*>(scales)[index]);
}

// Bias and residual, and only the columns that exist.
template <int kRows>
OCTAVO_INLINE void finish(const f32x16 (&sums)[kRows][kHalves], const Output& to) {
  OCTAVO_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    const int64_t first = h * kLanes, left = to.columns - first;
    if (left <= 0) break;
    const bool whole = left >= kLanes;
    f32x16 bias = set1(0.0f);
    if (to.bias) bias = whole ? load(to.bias + first) : load_partial(to.bias + first, left);
    OCTAVO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      f32x16 value = sums[i][h];
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

// How the codes of a weight are read and multiplied: nibbles' products may be summed in fewer bits meanwhile.
struct Nibbles {
  using Sums = nibble_sums;
  static constexpr int64_t kStep = 64;  // bytes of four k's
};
struct WholeBytes {
  using Sums = i32x16;
  static constexpr int64_t kStep = 128;
};

OCTAVO_INLINE void load_step(Nibbles, const uint8_t* codes, u8x64 (&w)[kHalves]) {
  __builtin_prefetch(codes + kAhead);
  const u8x64 packed = load_u8(codes);
  w[0] = low_nibbles(packed);
  w[1] = high_nibbles(packed);
}
OCTAVO_INLINE void load_step(WholeBytes, const uint8_t* codes, u8x64 (&w)[kHalves]) {
  __builtin_prefetch(codes + kAhead);
  __builtin_prefetch(codes + kAhead + 64);
  w[0] = load_bytes(codes);
  w[1] = load_bytes(codes + 64);
}
OCTAVO_INLINE nibble_sums start(Nibbles, int32_t offset) { return start_nibbles(offset); }
OCTAVO_INLINE i32x16 start(WholeBytes, int32_t offset) { return set1_i32(offset); }
OCTAVO_INLINE nibble_sums dot(Nibbles, nibble_sums sum, u8x64 w, u8x64 x) { return dot_nibbles(sum, w, x); }
OCTAVO_INLINE i32x16 dot(WholeBytes, i32x16 sum, u8x64 w, u8x64 x) { return dot_bytes(sum, w, x); }
OCTAVO_INLINE i32x16 end(Nibbles, nibble_sums sum, int32_t offset) { return end_nibbles(sum, offset); }
OCTAVO_INLINE i32x16 end(WholeBytes, i32x16 sum, int32_t) { return sum; }

template <typename Codes, int kRows, int kGroup, bool kMinimums>
void grouped_tile(const GroupedPanel& panel, const GroupedRows& rows, const Output& to) {
  const int64_t groups = panel.groups, k = groups * kGroup;
  constexpr Codes kCodes;
  f32x16 c[kRows][kHalves];
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) c[i][0] = c[i][1] = set1(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    typename Codes::Sums sums[kRows][kHalves];
    OCTAVO_UNROLL
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = start(kCodes, rows.offsets[i * groups + g]);
    const uint8_t* codes = panel.codes + g * (kGroup / 4) * Codes::kStep;
    OCTAVO_UNROLL
    for (int q = 0; q < kGroup / 4; ++q) {
      u8x64 w[kHalves];
      load_step(kCodes, codes + q * Codes::kStep, w);
      OCTAVO_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const u8x64 x = broadcast_x4(rows.codes + i * k + g * kGroup + 4 * q);
        sums[i][0] = dot(kCodes, sums[i][0], w[0], x);
        sums[i][1] = dot(kCodes, sums[i][1], w[1], x);
      }
    }
    OCTAVO_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      const int64_t at = g * kPanel + h * kLanes;
      const f32x16 scale = load_scales(panel.scales, at, panel.scales_f32);
      OCTAVO_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const i32x16 sum = end(kCodes, sums[i][h], rows.offsets[i * groups + g]);
        c[i][h] = fma(to_f32(sum), scale * set1(rows.scales[i * groups + g]), c[i][h]);
      }
      if constexpr (kMinimums) {
        const f32x16 minimum = load_scales(panel.minimums, at, panel.scales_f32);
        OCTAVO_UNROLL
        for (int i = 0; i < kRows; ++i) c[i][h] = fma(minimum, set1(rows.scaled_sums[i * groups + g]), c[i][h]);
      }
    }
  }
  finish<kRows>(c, to);
}

// Rows count of one panel, in tiles as equal as can be.
template <typename Codes, int kGroup, bool kMinimums>
void grouped_rows(const GroupedPanel& panel, GroupedRows rows, Output to, int64_t count) {
  const int64_t k = panel.groups * kGroup;
  for (int64_t tiles = (count + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t taken = (count + tiles - 1) / tiles;
    switch (taken) {
      case 1: grouped_tile<Codes, 1, kGroup, kMinimums>(panel, rows, to); break;
      case 2: grouped_tile<Codes, 2, kGroup, kMinimums>(panel, rows, to); break;
#if !defined(OCTAVO_ISA_AVX2)
      case 3: grouped_tile<Codes, 3, kGroup, kMinimums>(panel, rows, to); break;
      case 4: grouped_tile<Codes, 4, kGroup, kMinimums>(panel, rows, to); break;
#endif
#if defined(OCTAVO_ISA_AVX512)
      case 5: grouped_tile<Codes, 5, kGroup, kMinimums>(panel, rows, to); break;
      case 6: grouped_tile<Codes, 6, kGroup, kMinimums>(panel, rows, to); break;
#endif
      default: break;
    }
    rows.codes += taken * k;
    rows.scales += taken * panel.groups;
    rows.offsets += taken * panel.groups;
    rows.scaled_sums += taken * panel.groups;
    to.out += taken * to.stride;
    if (to.residual) to.residual += taken * to.stride;
    count -= taken;
  }
}

template <typename Codes>
void grouped_rows(const PackedWeight& weight, const GroupedPanel& panel, const GroupedRows& rows, const Output& to,
                  int64_t count) {
  if (weight.group == 32) {
    if (weight.minimums) grouped_rows<Codes, 32, true>(panel, rows, to, count);
    else grouped_rows<Codes, 32, false>(panel, rows, to, count);
  } else {
    if (weight.minimums) grouped_rows<Codes, 16, true>(panel, rows, to, count);
    else grouped_rows<Codes, 16, false>(panel, rows, to, count);
  }
}

Output output_of(const LinearArgs& args, int64_t row, int64_t panel) {
  const int64_t column = panel * kPanel, at = row * args.out_stride + column;
  return {args.out + at, args.bias ? args.bias + column : nullptr, args.residual ? args.residual + at : nullptr,
          args.out_stride, args.weight->n - column};
}

void grouped_linear(const LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  const PackedWeight& weight = *args.weight;
  const int64_t k = weight.k, groups = k / weight.group;
  const bool nibbles = weight.kind == WeightKind::kInt4;
  const int64_t step_bytes = nibbles ? 64 : 128;
  const int64_t scale_bytes = weight.scales_f32 ? 4 : 2;
  const auto* scales = static_cast<const uint8_t*>(weight.scales);
  const auto* minimums = static_cast<const uint8_t*>(weight.minimums);
  const int32_t shift = (nibbles ? 0 : kBytesZero) - weight.zero;
  auto* offsets = reinterpret_cast<int32_t*>(args.scratch);
  auto* scaled_sums = reinterpret_cast<float*>(offsets + kRowBlock * groups);
  for (int64_t row = 0; row < args.rows; row += kRowBlock) {
    const int64_t count = args.rows - row < kRowBlock ? args.rows - row : kRowBlock;
    const GroupedRows rows = {args.quantized.codes + row * k, args.quantized.scales + row * groups, offsets,
                              scaled_sums};
    const int32_t* sums = args.quantized.sums + row * groups;
    for (int64_t i = 0; i < count * groups; ++i) {
      offsets[i] = static_cast<int32_t>(static_cast<uint32_t>(shift) * static_cast<uint32_t>(sums[i]));
      scaled_sums[i] = rows.scales[i] * static_cast<float>(sums[i]);
    }
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const int64_t first = p * groups * kPanel * scale_bytes;
      const GroupedPanel panel = {weight.codes + p * (k / 4) * step_bytes, scales + first,
                                  minimums ? minimums + first : nullptr, weight.scales_f32, groups};
      const Output to = output_of(args, row, p);
      if (nibbles) {
        grouped_rows<Nibbles>(weight, panel, rows, to, count);
      } else {
        grouped_rows<WholeBytes>(weight, panel, rows, to, count);
      }
    }
  }
}

// ---- dense weights -----------------------------------------------------------------------------------------------

template <WeightKind kKind>
OCTAVO_INLINE f32x16 load_dense(const uint8_t* codes, int64_t index) {
  if constexpr (kKind == WeightKind::kF32) return load(reinterpret_cast<const float*>(codes) + index);
  else if constexpr (kKind == WeightKind::kF16) return load_f16(reinterpret_cast<const uint16_t*>(codes) + index);
  else return load_bf16(reinterpret_cast<const uint16_t*>(codes) + index);
}

template <WeightKind kKind, int kRows>
void dense_tile(const uint8_t* codes, const float* x, int64_t k, const Output& to) {
  f32x16 c[kRows][kHalves];
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) c[i][0] = c[i][1] = set1(0.0f);
  constexpr int64_t kStep = kPanel * (kKind == WeightKind::kF32 ? 4 : 2);
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(codes + j * kStep + kAhead + line);
    const f32x16 w0 = load_dense<kKind>(codes, j * kPanel), w1 = load_dense<kKind>(codes, j * kPanel + kLanes);
    OCTAVO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const f32x16 xi = set1(x[i * k + j]);
      c[i][0] = fma(w0, xi, c[i][0]);
      c[i][1] = fma(w1, xi, c[i][1]);
    }
  }
  finish<kRows>(c, to);
}

template <WeightKind kKind>
void dense_linear(const LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  const int64_t k = args.weight->k, element = kKind == WeightKind::kF32 ? 4 : 2;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const uint8_t* codes = args.weight->codes + p * k * kPanel * element;
    int64_t row = 0;
    for (int64_t tiles = (args.rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
      const int64_t taken = (args.rows - row + tiles - 1) / tiles;
      const float* x = args.x + row * k;
      const Output to = output_of(args, row, p);
      switch (taken) {
        case 1: dense_tile<kKind, 1>(codes, x, k, to); break;
        case 2: dense_tile<kKind, 2>(codes, x, k, to); break;
#if !defined(OCTAVO_ISA_AVX2)
        case 3: dense_tile<kKind, 3>(codes, x, k, to); break;
        case 4: dense_tile<kKind, 4>(codes, x, k, to); break;
#endif
#if defined(OCTAVO_ISA_AVX512)
        case 5: dense_tile<kKind, 5>(codes, x, k, to); break;
        case 6: dense_tile<kKind, 6>(codes, x, k, to); break;
#endif
        default: break;
      }
      row += taken;
    }
  }
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
  const int64_t k = weight->k, panel = row / kPanel, column = row % kPanel;
  const int64_t first = panel * k * kPanel;
  switch (weight->kind) {
    case WeightKind::kF32:
      for (int64_t j = 0; j < k; ++j)
        out[j] = reinterpret_cast<const float*>(weight->codes)[first + j * kPanel + column];
      return;
    case WeightKind::kF16:
      for (int64_t j = 0; j < k; ++j) {
        out[j] = f16_to_f32(reinterpret_cast<const uint16_t*>(weight->codes)[first + j * kPanel + column]);
      }
      return;
    case WeightKind::kBF16:
      for (int64_t j = 0; j < k; ++j) {
        out[j] = bf16_to_f32(reinterpret_cast<const uint16_t*>(weight->codes)[first + j * kPanel + column]);
      }
      return;
    default: break;
  }
  const bool nibbles = weight->kind == WeightKind::kInt4;
  const int shift = nibbles && column >= kLanes ? 4 : 0, mask = nibbles ? 15 : 255;
  const int64_t step = nibbles ? 64 : 128;
  const uint8_t* codes = weight->codes + panel * (k / 4) * step + 4 * (nibbles ? column % kLanes : column);
  const int64_t groups = k / weight->group;
  const auto* scales = static_cast<const uint8_t*>(weight->scales);
  const auto* minimums = static_cast<const uint8_t*>(weight->minimums);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = (panel * groups + g) * kPanel + column;
    const float scale = load_scale(scales, at, weight->scales_f32);
    const float minimum = minimums ? load_scale(minimums, at, weight->scales_f32) : 0.0f;
    for (int64_t j = g * weight->group; j < (g + 1) * weight->group; ++j) {
      const int32_t code = (codes[j / 4 * step + j % 4] >> shift) & mask;
      const float value = scale * static_cast<float>(code - weight->zero);
      out[j] = minimums ? value + minimum : value;
    }
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
