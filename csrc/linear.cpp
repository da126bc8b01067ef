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
#include "grouped.h"
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {

namespace {

Output output_of(const LinearArgs& args, int64_t panel) {
  const int64_t column = panel * kPanel;
  return at_column({args.out, args.bias, args.residual, args.out_stride, args.weight->n}, column);
}

void grouped_linear(const LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  const PackedWeight& weight = *args.weight;
  const GroupedLayout layout = layout_of(weight);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const uint8_t* data = weight.data + p * layout.panel;
    const GroupedPanel panel = {data, layout, weight.k / weight.group, weight.zero, weight.has_minimums};
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
  clear(c);
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
  if constexpr (kRows <= kRowsOfWholePanels) {
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
    const Output to = output_of(args, p);
    for_tiles(args.rows, [&](auto rows, int64_t row) OCTAVO_INLINE_LAMBDA {
      dense_tiles<kKind, decltype(rows)::value>(data, args.x + row * k, k, at_row(to, row));
    });
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
