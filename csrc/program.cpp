// Building a Program, checking a step, and cutting it into items. run.cpp does the items.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace octavo {
namespace {

const KernelTable& table_or_throw(const char* isa) {
  const KernelTable* table = kernel_table(isa);
  if (table == nullptr) throw std::invalid_argument(std::string("this machine cannot run instruction set ") + isa);
  return *table;
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Query rows (tokens times heads of a group) that share a tile of K and V: enough to pay for its conversion from float16.
constexpr int64_t kAttentionRows = 48;

// Row operators: floats of the widest value that make an item worth handing over.
constexpr int64_t kFloatsPerItem = 6144;

// Linear operators: multiply-adds of an item, with a row's worth added for reading the weights.
constexpr int64_t kOpsPerItem = 160'000;

// Up to so many tokens in a step, threads may share the context of a sequence: what one user alone waits for.
constexpr int64_t kSharedTokens = 8;

constexpr int64_t kMostItems = (int64_t{1} << 20) - 1;

}  // namespace

// attention.cpp, Partial: sums, sixteen lanes, a maximum.
size_t attention_partial_floats(int64_t tokens, int64_t group, int64_t head_dim) {
  return static_cast<size_t>(tokens * group * (head_dim + 16 + 1));
}

// attention.cpp, Scratch: queries, scores of 64 tokens, two partials.
size_t attention_scratch_floats(int64_t tokens, int64_t group, int64_t head_dim) {
  return static_cast<size_t>(tokens * group * (head_dim + 64)) + 2 * attention_partial_floats(tokens, group, head_dim);
}

// sample.cpp, draw: logits over temperature, their exponentials, ids, room for ids or exponentials of listed ids.
size_t sample_scratch_floats(int64_t vocab) { return static_cast<size_t>(4 * vocab); }

void RopeTable::fill(int64_t positions) {
  const auto half = static_cast<int64_t>(inv_freq.size());
  auto* table = reinterpret_cast<float*>(values.data());
  for (; filled < positions; ++filled) {
    float* row = table + filled * 2 * half;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(filled) * inv_freq[static_cast<size_t>(i)];
      row[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

Program::Program(const char* isa_or_null, int num_threads, const Limits& limits)
    : kernels_(table_or_throw(isa_or_null)), limits_(limits), pool_(num_threads) {
  const int64_t size = limits.block_size;
  require(size == 8 || size == 16 || size == 32 || size == 64, "block_size must be 8, 16, 32 or 64");
}

int Program::add_rope_table(std::vector<float> inv_freq) {
  RopeTable table;
  table.values = Mapping(static_cast<size_t>(limits_.max_model_len) * 2 * inv_freq.size() * sizeof(float));
  table.inv_freq = std::move(inv_freq);
  table.rows.resize(static_cast<size_t>(limits_.max_num_tokens));
  ropes_.push_back(std::move(table));
  return static_cast<int>(ropes_.size()) - 1;
}

int Program::add_cache_geometry(const CacheGeometry& geometry) {
  caches_.push_back(geometry);
  return static_cast<int>(caches_.size()) - 1;
}

int Program::add_quantized(const QuantizedPlace& place) {
  quantized_.push_back(place);
  return static_cast<int>(quantized_.size()) - 1;
}

void Program::add_attention(int cache, Place query, Place out) {
  for (const Stage::Kind kind : {Stage::Kind::kAttention, Stage::Kind::kMerge}) {
    Stage stage{};
    stage.kind = kind;
    stage.cache = cache;
    stage.x = query;
    stage.out = out;
    stages_.push_back(std::move(stage));
  }
}

void Program::finish(size_t arena_bytes, Place logits, int64_t vocab) {
  arena_ = Mapping(arena_bytes);
  logits_ = logits;
  vocab_ = vocab;
  size_t attention_floats = 0;
  int64_t group = 1;
  for (const CacheGeometry& cache : caches_) {
    group = std::max<int64_t>(group, cache.num_heads / cache.num_kv_heads);
  }
  attention_tile_ = std::clamp<int64_t>(kAttentionRows / group, 1, 32);
  for (const CacheGeometry& cache : caches_) {
    attention_floats = std::max(attention_floats, attention_scratch_floats(
                                                      attention_tile_, cache.num_heads / cache.num_kv_heads, cache.head_dim));
  }
  const int64_t most_segments = divide_up(limits_.max_model_len, kAttentionSegment);
  size_t partial_floats = 0;
  for (const CacheGeometry& cache : caches_) {
    partial_floats = std::max(partial_floats, attention_partial_floats(kSharedTokens, cache.num_heads, cache.head_dim));
  }
  partials_ = Mapping(partial_floats * static_cast<size_t>(most_segments) * sizeof(float));
  for (int i = 0; i < pool_.num_threads(); ++i) {
    attention_scratch_.emplace_back(attention_floats * sizeof(float));
    sample_scratch_.emplace_back(logits >= 0 ? sample_scratch_floats(vocab) * sizeof(float) : 0);
  }
  items_.resize(stages_.size() + 1);
  chunks_.resize(stages_.size() + 1);
  attention_items_.reserve(static_cast<size_t>(limits_.max_num_tokens));
}

int64_t Program::head_bytes(const CacheGeometry& geometry) const {
  const int64_t head_dim = geometry.head_dim;
  return limits_.block_size * (limits_.kv_kind == KvKind::kInt8 ? head_dim + 4 : 2 * head_dim);  // int8: a float32 scale
}

void Program::allocate_cache(int64_t num_layers, int64_t num_blocks) {
  require(kv_ == nullptr, "the KV cache is allocated already");
  require(num_blocks > 0, "a KV cache needs at least one block");
  require(!caches_.empty(), "a graph without attention needs no KV cache");
  kv_ = std::make_unique<KvPool>(num_layers, num_blocks, caches_[0].num_kv_heads * head_bytes(caches_[0]));
}

// ---- the contract of a step ------------------------------------------------------------------------------------------

void Program::check(const BatchView& b) const {
  require(b.num_tokens >= 1 && b.num_tokens <= limits_.max_num_tokens, "a step needs 1 to max_num_tokens tokens");
  require(b.num_selected <= limits_.max_num_rows, "logits_rows has more rows than max_num_rows");
  for (int64_t i = 0; i < b.num_selected; ++i) {
    require(b.logits_rows[i] >= 0 && b.logits_rows[i] < b.num_tokens, "logits_rows names a token outside the step");
  }
  if (!ropes_.empty() || !caches_.empty()) {
    for (int64_t i = 0; i < b.num_tokens; ++i) {
      require(b.positions[i] >= 0 && b.positions[i] < limits_.max_model_len, "a position is not below max_model_len");
    }
  }
  for (const Stage& stage : stages_) {
    for (const RowOp& op : stage.ops) {
      if (op.kind != RowOp::Kind::kEmbed) continue;
      const int64_t rows = weights_.matrix(op.weight).n;
      for (int64_t i = 0; i < b.num_tokens; ++i) {
        require(b.token_ids[i] >= 0 && b.token_ids[i] < rows, "a token id is not in the vocabulary");
      }
    }
  }
  if (!caches_.empty()) check_sequences(b);
}

void Program::check_sequences(const BatchView& b) const {
  require(kv_ != nullptr, "allocate_cache must be called before a step");
  require(b.query_start_loc[0] == 0 && b.query_start_loc[b.num_sequences] == b.num_tokens,
          "query_start_loc must run from 0 to the number of tokens");
  const int64_t slots = kv_->num_blocks() * limits_.block_size;
  for (int64_t i = 0; i < b.num_tokens; ++i) {
    require(b.slots[i] >= 0 && b.slots[i] < slots, "a slot lies outside the KV cache");
  }
  for (int64_t s = 0; s < b.num_sequences; ++s) {
    const int64_t begin = b.query_start_loc[s], end = b.query_start_loc[s + 1];
    require(begin <= end && end <= b.num_tokens, "query_start_loc must ascend");
    const int64_t used = divide_up(b.seq_lens[s], limits_.block_size);
    require(b.seq_lens[s] >= end - begin && used <= b.table_width, "a block table is too short for its sequence");
    const int32_t* blocks = b.block_table + s * b.table_width;
    for (int64_t i = 0; i < used; ++i) {
      require(blocks[i] >= 0 && blocks[i] < kv_->num_blocks(), "a block id lies outside the KV cache");
    }
    for (int64_t i = begin; i < end; ++i) {
      require(b.positions[i] < b.seq_lens[s], "a position lies past the end of its sequence");
      require(i == begin || b.positions[i] == b.positions[i - 1] + 1, "the positions of a sequence must follow each other");
    }
  }
}

void Program::check(const BatchView& b, const SamplingView& s) const {
  require(logits_ >= 0, "this graph has no logits to sample from");
  const auto check_lists = [&](const int32_t* start, int64_t size, const int32_t* ids, const char* what) {
    require(start[0] == 0 && start[b.num_selected] == size, what);
    for (int64_t i = 0; i < b.num_selected; ++i) require(start[i] <= start[i + 1], what);
    for (int64_t i = 0; i < size; ++i) require(ids[i] >= 0 && ids[i] < vocab_, what);
  };
  check_lists(s.seen_start, s.num_seen, s.seen_ids, "the lists of penalties are malformed");
  check_lists(s.bias_start, s.num_bias, s.bias_ids, "the lists of bias are malformed");
  for (int64_t i = 0; i < b.num_selected; ++i) {
    require(s.temperature[i] >= 0.0f && std::isfinite(s.temperature[i]), "a temperature is negative or not finite");
    require(s.top_k[i] >= 0, "a top_k is negative");
    require(s.top_p[i] > 0.0f && s.min_p[i] >= 0.0f, "a top_p or min_p is out of range");
    require(s.repetition[i] > 0.0f, "a repetition penalty is not positive");
    require(s.num_logprobs[i] <= s.top_width && s.num_logprobs[i] <= vocab_, "num_logprobs is too large");
  }
}

// ---- cutting a step into items ---------------------------------------------------------------------------------------

int64_t Program::count_items(const Stage& stage, int64_t* chunk) const {
  const int64_t rows = stage.selected ? batch_->num_selected : batch_->num_tokens;
  *chunk = 1;
  if (rows == 0) return 0;
  if (stage.kind == Stage::Kind::kRows) {
    int64_t floats = 0;
    for (const RowOp& op : stage.ops) floats += op.features;
    *chunk = std::max<int64_t>(1, kFloatsPerItem / std::max<int64_t>(1, floats));
    return divide_up(rows, *chunk);
  }
  if (stage.kind == Stage::Kind::kLinear) {
    int64_t panels = 0;
    for (const LinearPart& part : stage.parts) panels += divide_up(weights_.matrix(part.weight).n, kPanel);
    const int64_t k = weights_.matrix(stage.parts[0].weight).k;
    *chunk = std::max<int64_t>(1, kOpsPerItem / (kPanel * k * (std::min(rows, kRowBlock) + 3)));
    *chunk = std::max<int64_t>(1, std::min(*chunk, panels / (4 * pool_.num_threads())));
    return divide_up(rows, kRowBlock) * divide_up(panels, *chunk);
  }
  const int64_t tiles = static_cast<int64_t>(attention_items_.size()) * caches_[static_cast<size_t>(stage.cache)].num_kv_heads;
  if (stage.kind == Stage::Kind::kMerge) return segments_ == 1 ? 0 : tiles;
  return tiles * segments_;
}

// Into how many segments the attention of this step is cut for the threads; bits do not depend on it.
int64_t Program::choose_segments() const {
  int64_t longest = 0, kv_heads = 1;
  for (int64_t s = 0; s < batch_->num_sequences; ++s) longest = std::max<int64_t>(longest, batch_->seq_lens[s]);
  for (const CacheGeometry& cache : caches_) kv_heads = std::max<int64_t>(kv_heads, cache.num_kv_heads);
  const int64_t tiles = static_cast<int64_t>(attention_items_.size()) * kv_heads;
  if (batch_->num_tokens > kSharedTokens || tiles >= 4 * pool_.num_threads() || pool_.num_threads() == 1) return 1;
  return divide_up(longest, kAttentionSegment);
}

void Program::plan_step() {
  int64_t last_position = -1;
  for (int64_t i = 0; i < batch_->num_tokens && (!ropes_.empty() || !caches_.empty()); ++i) {
    last_position = std::max<int64_t>(last_position, batch_->positions[i]);
  }
  for (RopeTable& rope : ropes_) {
    rope.fill(last_position + 1);
    const auto features = static_cast<int64_t>(2 * rope.inv_freq.size());
    const auto* table = reinterpret_cast<const float*>(rope.values.data());
    for (int64_t i = 0; i < batch_->num_tokens; ++i) {
      rope.rows[static_cast<size_t>(i)] = table + batch_->positions[i] * features;
    }
  }
  attention_items_.clear();
  if (!caches_.empty()) {
    for (int64_t s = 0; s < batch_->num_sequences; ++s) {
      const int64_t end = batch_->query_start_loc[s + 1];
      for (int64_t i = batch_->query_start_loc[s]; i < end; i += attention_tile_) {
        attention_items_.push_back({i, std::min(end, i + attention_tile_), s});
      }
    }
  }
  segments_ = caches_.empty() ? 1 : choose_segments();
  for (size_t i = 0; i < stages_.size(); ++i) {
    items_[i] = count_items(stages_[i], &chunks_[i]);
    if (items_[i] > kMostItems) throw std::invalid_argument("a step has too many items of work");
  }
  items_.back() = sampling_ == nullptr ? 0 : batch_->num_selected;
}

void Program::run(const BatchView& batch, const SamplingView* sampling) {
  const std::unique_lock alone(running_, std::try_to_lock);
  require(alone.owns_lock(), "another thread is running a step of this program");
  check(batch);
  if (sampling != nullptr) check(batch, *sampling);
  batch_ = &batch;
  sampling_ = sampling;
  plan_step();
  pool_.run(*this);
  batch_ = nullptr;
  sampling_ = nullptr;
}

}  // namespace octavo
