// A graph lowered to stages over planned memory, and its replay: one call a step, no allocation in it.
//
// Python (backends/cpu/lowering.py) decides the stages and the place of every value; this file knows no graph. A stage is
// either row operators, done one after another on a range of rows by one thread, or the panels of linear operators that
// share an input, or paged attention. How a stage is cut into items changes no bit of any row.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "kv_pool.h"
#include "memory.h"
#include "thread_pool.h"
#include "weights.h"

namespace octavo {

// Where a value lies: bytes from the start of the arena, row-major [max rows][features] float32. -1: none.
using Place = int64_t;

// Rows of int8 codes with scales and sums: four places, and what they were rounded for.
struct QuantizedPlace {
  Place codes = -1, scales = -1, sums = -1, scaled_sums = -1;
  int64_t features = 0;
  int32_t group = 0;
};

struct RowOp {
  enum class Kind { kInput, kEmbed, kSelect, kCopy, kRmsNorm, kAdd, kSiluMul, kGeluMul, kQuantize, kRope, kWriteKv };
  Kind kind;
  int64_t features = 0;      // of the output (kWriteKv: of K)
  Place a = -1, b = -1, out = -1;
  int weight = -1;           // matrix (kEmbed) or vector (kRmsNorm)
  float eps = 0.0f;
  float scale = 1.0f;        // kEmbed
  int quantized = -1;        // kQuantize
  int table = -1;            // kRope
  int32_t num_heads = 0;     // kRope, kRmsNorm
  int cache = -1;            // kWriteKv: attention geometry, and the layer
  int input = -1;            // kInput: number of the named input
};

struct LinearPart {
  int weight;
  Place out;
  int bias = -1;             // vector or -1
  Place residual = -1;
};

struct CacheGeometry {       // of one attention operator
  int64_t layer;             // position in the pool
  int32_t num_heads, num_kv_heads, head_dim;
  float scale;
  int64_t window;            // max_model_len: none
  float soft_cap;            // 0: none
  int factors, inverses;     // vectors [num_kv_heads * head_dim]; -1 unless K and V are int8
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Stage {
  enum class Kind { kRows, kLinear, kAttention, kMerge };
  Kind kind;
  bool selected = false;     // rows are those of logits_rows
  std::vector<RowOp> ops;    // kRows
  Place x = -1;              // kLinear (dense) and kAttention: the input
  int quantized = -1;        // kLinear with grouped weights
  std::vector<LinearPart> parts;
  int cache = -1;            // kAttention, kMerge
  Place out = -1;            // kAttention, kMerge
};

// The angles of one Rope: [positions][cos of head_dim / 2, sin of head_dim / 2], filled as positions come up.
struct RopeTable {
  std::vector<float> inv_freq;
  Mapping values;
  int64_t filled = 0;
  std::vector<const float*> rows;  // of the tokens of this step
  void fill(int64_t positions);
};

struct Limits {
  int64_t block_size, max_num_tokens, max_num_rows, max_model_len;
  KvKind kv_kind;
};

// Pointers to the arrays of graph/batch.py (Batch), checked by Program::run.
struct BatchView {
  int64_t num_tokens, num_sequences, num_selected, table_width;
  const int32_t *token_ids, *positions, *query_start_loc, *seq_lens, *block_table, *slots, *logits_rows;
  std::vector<const float*> inputs;
};

// Pointers to the arrays of SamplingRows and StepOutput; null num_logprobs: nothing is sampled.
struct SamplingView {
  const float *temperature, *top_p, *min_p, *repetition, *presence, *frequency;
  const int32_t *top_k, *index, *position;
  const uint64_t* seed;
  const int32_t *seen_start, *seen_ids, *seen_counts, *bias_start, *bias_ids;
  const float* bias_values;
  const int32_t* num_logprobs;
  int64_t num_seen, num_bias;
  int32_t* tokens;
  float* logprobs;
  int32_t* top_ids;
  float* top_logprobs;
  int64_t top_width;
};

class Program final : private Job {
 public:
  // Throws std::invalid_argument if the machine lacks the named instruction set.
  Program(const char* isa_or_null, int num_threads, const Limits& limits);

  const char* isa() const { return kernels_.isa; }
  int num_threads() const { return pool_.num_threads(); }
  size_t weights_bytes() const { return weights_.bytes(); }

  // ---- building: in this order, then finish() once -------------------------------------------------------------------
  Weights& weights() { return weights_; }
  ThreadPool& pool() { return pool_; }
  int add_rope_table(std::vector<float> inv_freq);
  int add_cache_geometry(const CacheGeometry& geometry);
  int add_quantized(const QuantizedPlace& place);
  void add_stage(Stage stage) { stages_.push_back(std::move(stage)); }
  void add_attention(int cache, Place query, Place out);
  // Takes the activations' memory; `logits` is -1 for a graph that samples nothing.
  void finish(size_t arena_bytes, Place logits, int64_t vocab);

  void allocate_cache(int64_t num_layers, int64_t num_blocks);

  // Whole blocks over all layers, between steps. Each throws std::invalid_argument, having changed nothing, if an id is none.
  int64_t block_bytes() const;
  void copy_blocks(const int32_t* pairs, int64_t count);            // [count][source, destination], one after another
  void read_blocks(const int32_t* ids, int64_t count, uint8_t* out);  // out: [count][block_bytes]
  void write_blocks(const int32_t* ids, int64_t count, const uint8_t* data);

  // One step. Throws std::invalid_argument, having changed nothing, if the batch is outside its contract.
  void run(const BatchView& batch, const SamplingView* sampling);
  const float* value(Place place) const { return reinterpret_cast<const float*>(arena_.data() + place); }

 private:
  struct AttentionItem {
    int64_t row_begin, row_end;
    int64_t sequence;
  };

  // Job
  int64_t num_stages() const override;
  int64_t num_items(int64_t stage) const override;
  void work(int64_t stage, int64_t item, int thread) override;

  void check(const BatchView& batch) const;
  void check_sequences(const BatchView& batch) const;
  void check(const BatchView& batch, const SamplingView& sampling) const;
  void plan_step();
  template <typename Move>
  void move_blocks(const int32_t* ids, int64_t num_ids, int64_t count, Move move);
  int64_t count_items(const Stage& stage, int64_t* chunk) const;
  void run_rows(const Stage& stage, int64_t begin, int64_t end);
  void run_row_op(const RowOp& op, int64_t begin, int64_t end, int64_t stage_rows);
  void run_linear(const Stage& stage, int64_t item, int64_t chunk);
  void run_attention(const Stage& stage, int64_t item, int thread);
  void run_merge(const Stage& stage, int64_t item);
  float* partials(const CacheGeometry& geometry, const AttentionItem& tile, int64_t kv_head, int64_t* stride);
  int64_t choose_segments() const;
  void run_sample(int64_t row, int thread);
  int64_t head_bytes(const CacheGeometry& geometry) const;  // of a kv head's part of a block of K or V
  AttentionArgs attention_args(const CacheGeometry& geometry) const;
  float* at(Place place) { return reinterpret_cast<float*>(arena_.data() + place); }
  QuantizedRows quantized_rows(int id, int64_t rows);

  const KernelTable& kernels_;
  const Limits limits_;
  ThreadPool pool_;
  Weights weights_;
  std::vector<Stage> stages_;
  std::vector<QuantizedPlace> quantized_;
  std::vector<RopeTable> ropes_;
  std::vector<CacheGeometry> caches_;
  std::unique_ptr<KvPool> kv_;
  Mapping arena_;
  Place logits_ = -1;
  int64_t vocab_ = 0;
  std::vector<Mapping> attention_scratch_, sample_scratch_;  // one a thread
  Mapping partials_;         // attention's segments

  std::mutex running_;

  // Of the step that runs.
  const BatchView* batch_ = nullptr;
  const SamplingView* sampling_ = nullptr;
  std::vector<int64_t> items_, chunks_;  // one a stage
  std::vector<AttentionItem> attention_items_;
  int64_t attention_tile_ = 1;
  int64_t segments_ = 1;     // that threads share a sequence's context by; 1: a tile does its own
};

}  // namespace octavo
