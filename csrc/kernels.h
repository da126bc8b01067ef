// The contract between the program (plans memory, splits work over threads) and the kernels (arithmetic).
//
// A kernel file is written once over simd.h, compiled once an instruction set in a namespace of its own, and reaches the
// program through one KernelTable an instruction set. Kernels never allocate, throw, lock or start threads; whatever the
// table, the tile or the number of rows beside it, a row's result has the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

// Columns (output features) of a panel: the unit of packing and of work for a linear operator.
constexpr int64_t kPanel = 32;

// Rows of a linear operator that are multiplied at once, and the other unit of its work: their codes stay in the second cache while panels
// pass, and unpacking a panel's codes is shared by all of them.
constexpr int64_t kRowBlock = 96;

enum class WeightKind : int32_t { kGrouped, kF32, kF16, kBF16 };

// A weight repacked for linear and embed_row: panels of 32 columns, the last one padded with zeros, about as large as in the file.
// Layout: see pack.cpp. The buffer is owned by whoever packed it (weights.cpp).
struct PackedWeight {
  WeightKind kind;
  int64_t n;          // output features
  int64_t k;          // input features, a multiple of group for integers
  int32_t bits;       // of a code as kept: 2 to 6, or 8; 0 for dense
  int32_t group;      // 16 or 32; 0 for dense
  int32_t zero;       // the code that stands for 0
  bool two_level;     // scales are a float16 a block of 256 times an int8 a group, else a float16 a group
  bool has_minimums;
  const uint8_t* data;
};

// Where things lie in a panel of a grouped weight, which is a sequence of blocks; bytes but for block_columns.
struct GroupedLayout {
  int64_t block_columns;  // k's of a block: 256, or 32 if the scales have one level
  int64_t factors;        // of a block: where its int8 factors begin, 0 if the scales have one level
  int64_t header;         // of a block: scales, minimums and factors; then its codes
  int64_t unit;           // codes of 32 k's
  int64_t block, panel;
};

static inline GroupedLayout layout_of(const PackedWeight& w) {
  const int64_t kinds = w.has_minimums ? 2 : 1, columns = w.two_level ? 256 : 32, groups = columns / w.group;
  const int64_t factors = w.two_level ? kinds * kPanel * 2 : 0;
  const int64_t header = w.two_level ? factors + kinds * groups * kPanel : kinds * groups * kPanel * 2;
  const int64_t unit = kPanel * 32 * w.bits / 8, block = header + columns / 32 * unit;
  return {columns, factors, header, unit, block, (w.k + columns - 1) / columns * block};
}

// Rows rounded to int8 as graph/ops.py (Linear) says, a group of columns after the other, so that the rows of a tile lie side by side.
struct QuantizedRows {
  int8_t* codes;       // [k / group][stride][group]
  float* scales;       // [k / group][stride]
  int16_t* sums;       // [k / group][stride][2], sums of the group's codes with k % 4 < 2 and of the others
  float* scaled_sums;  // [k / group][stride], scale * sum rounded once
  int64_t stride;      // at least the rows, see quantized_stride
};

// The rows from `row` on, the columns from group g on.
static inline QuantizedRows rows_from(const QuantizedRows& rows, int64_t row, int64_t g, int64_t group) {
  const int64_t at = g * rows.stride + row;
  return {rows.codes + at * group, rows.scales + at, rows.sums + 2 * at, rows.scaled_sums + at, rows.stride};
}

// Odd, so that groups do not fall onto the same lines of a cache.
static inline int64_t quantized_stride(int64_t rows) { return rows | 1; }

struct LinearArgs {
  const PackedWeight* weight;
  int64_t rows;            // at most kRowBlock
  const float* x;          // [rows][k], dense weights
  QuantizedRows quantized; // grouped weights
  float* out;              // [rows][out_stride]
  int64_t out_stride;
  const float* bias;       // [n] or null
  const float* residual;   // [rows][out_stride] or null; out = (x w + bias) + residual; may alias out
};

// Keys and values are attended in segments of so many tokens at absolute positions, each by itself, and the segments of a row
// are merged in order: whether one thread does them all or several share them changes no bit.
constexpr int64_t kAttentionSegment = 512;

// How K and V are kept. kInt8: codes, with a float32 scale a token and kv head (graph/ops.py, PagedAttention).
enum class KvKind : int32_t { kF16, kInt8 };

// One paged attention problem over the cache of one layer.
// Both caches: [num_blocks][num_kv_heads][head_bytes], where the part of a kv head is, of K, [head_dim][block_size] elements
// (tokens in lanes), of V, [block_size][head_dim], and for kInt8 behind them the scales [block_size].
struct AttentionArgs {
  const float* query;         // [tokens][num_heads * head_dim]
  float* out;                 // same shape
  uint8_t* k_cache;
  uint8_t* v_cache;
  KvKind kind;
  int64_t head_bytes;
  const float* factors;       // kInt8: [num_kv_heads][head_dim]; query is multiplied by them
  const float* inverses;      // kInt8: 1 / factors; K is multiplied by them
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  float scale;
  int64_t window;             // a row at position p attends to p - window + 1 to p
  float soft_cap;             // scores become soft_cap * tanh(score / soft_cap); 0: they stay
  const int32_t* positions;   // [tokens]
};

struct SampleArgs {           // one row
  const float* logits;        // [vocab], not changed
  float* work;                // [4 * vocab] scratch
  int64_t vocab;
  float temperature, top_p, min_p, repetition, presence, frequency;
  int32_t top_k, index, position, num_logprobs;
  uint64_t seed;
  const int32_t* seen_ids; const int32_t* seen_counts; int32_t num_seen;
  const int32_t* bias_ids; const float* bias_values; int32_t num_bias;
  int32_t* token;             // out
  float* logprob;             // out
  int32_t* top_ids;           // out [num_logprobs]
  float* top_logprobs;        // out [num_logprobs]
};

struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avxvnni", "avx512"

  // linear.cpp
  void (*quantize_rows)(const float* x, int64_t x_stride, int64_t rows, int64_t k, int32_t group, int64_t first_row,
                        const QuantizedRows& out);
  void (*linear)(const LinearArgs* args, int64_t panel_begin, int64_t panel_end);
  void (*embed_row)(const PackedWeight* weight, int64_t row, float* out);

  // norm.cpp, rope.cpp, activation.cpp, attention.cpp, sample.cpp: program.cpp's neighbours, see there
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t features, float* out);
  void (*rope)(float* x, int64_t stride, int64_t rows, int32_t num_heads, int32_t head_dim, const float* const* cos_sin_rows);
  void (*write_kv)(const float* k, const float* v, int64_t stride, int64_t rows, const AttentionArgs* cache,
                   const int32_t* slots);
  // Rows row_begin..row_end (tokens of one sequence) of one kv head.
  void (*attention)(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end, int32_t kv_head,
                    float* scratch);
  // One segment of the same (nothing where it lies past the rows or before their windows); its result takes attention_partial_floats at `partial`.
  void (*attention_segment)(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end,
                            int32_t kv_head, int64_t segment, float* partial, float* scratch);
  // The rows' output from all their segments, `stride` floats apart; the first that they see is overwritten.
  void (*attention_merge)(const AttentionArgs* args, int64_t row_begin, int64_t row_end, int32_t kv_head, float* partials,
                          int64_t stride);
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*gelu_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*scale)(float* x, float factor, int64_t count);
  void (*add)(const float* a, const float* b, int64_t count, float* out);
  void (*sample)(const SampleArgs* args);
};

// ---- pack.cpp: from the stored forms of graph/tensors.py (numpy views, any strides, unaligned) to PackedWeight -------

struct PlaneView {
  const uint8_t* data;
  int64_t row_stride, block_stride, byte_stride;  // bytes
  const uint16_t* byte_of;                        // [block_len]
  const uint8_t* shift_of;                        // [block_len]
  int32_t block_len, bits, lift, flip;
};

// Codes whose bits lie in up to three planes; the code that stands for 0.
struct CodesView {
  int32_t num_planes, zero;
  PlaneView planes[3];
};

// Scales or minimums: float16 a group, or, with planes, d * (factor - zero) with float16 d a block and a factor a group.
struct ScaleView {
  const uint8_t* data;              // null: absent
  int64_t row_stride, step_stride;  // bytes
  CodesView factors;
  bool is_negated;                  // of the factors
};

struct GroupedView {
  int64_t n, k;
  int32_t group, bits;
  CodesView codes;
  ScaleView scales, minimums;
};

struct DenseView {
  int64_t n, k;
  WeightKind kind;
  const uint8_t* data;
  int64_t row_stride;  // bytes; columns are contiguous
};

// Describe the packed weight whose buffer of packed_bytes (64-byte aligned, zeroed) the caller allocated; then fill panels, from
// any thread, each panel once.
PackedWeight describe(const GroupedView& view, uint8_t* data);
PackedWeight describe(const DenseView& view, uint8_t* data);
size_t packed_bytes(const PackedWeight& weight);
void pack_panels(const GroupedView& view, PackedWeight* out, int64_t panel_begin, int64_t panel_end);
void pack_panels(const DenseView& view, PackedWeight* out, int64_t panel_begin, int64_t panel_end);

// Floats of attention's scratch for a tile of `tokens` query tokens, and of SampleArgs::work.
size_t attention_scratch_floats(int64_t tokens, int64_t group, int64_t head_dim);
size_t attention_partial_floats(int64_t tokens, int64_t group, int64_t head_dim);
size_t sample_scratch_floats(int64_t vocab);

// dispatch.cpp: the best table of this machine, or the named one; null when the machine lacks it or the name is unknown.
const KernelTable* kernel_table(const char* isa_or_null);

}  // namespace octavo
