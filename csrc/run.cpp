// The items of a step: what one thread does with a range of rows, a range of panels, a tile of attention or a row of logits.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace octavo {

int64_t Program::num_stages() const { return static_cast<int64_t>(items_.size()); }

int64_t Program::num_items(int64_t stage) const { return items_[static_cast<size_t>(stage)]; }

void Program::work(int64_t stage_number, int64_t item, int thread) {
  const auto index = static_cast<size_t>(stage_number);
  if (index == stages_.size()) return run_sample(item, thread);
  const Stage& stage = stages_[index];
  const int64_t begin = item * chunks_[index];
  if (stage.kind == Stage::Kind::kAttention) {
    run_attention(stage, item, thread);
  } else if (stage.kind == Stage::Kind::kMerge) {
    run_merge(stage, item);
  } else if (stage.kind == Stage::Kind::kLinear) {
    run_linear(stage, item, chunks_[index]);
  } else {
    run_rows(stage, begin, begin + chunks_[index]);
  }
}

void Program::run_rows(const Stage& stage, int64_t begin, int64_t end) {
  const int64_t rows = stage.selected ? batch_->num_selected : batch_->num_tokens;
  for (const RowOp& op : stage.ops) run_row_op(op, begin, std::min(rows, end), rows);
}

void Program::run_row_op(const RowOp& op, int64_t begin, int64_t end, int64_t stage_rows) {
  const int64_t rows = end - begin, count = rows * op.features, offset = begin * op.features;
  const auto bytes = static_cast<size_t>(count) * sizeof(float);
  const float* a = op.a < 0 ? nullptr : at(op.a) + offset;
  const float* b = op.b < 0 ? nullptr : at(op.b) + offset;
  float* out = op.out < 0 ? nullptr : at(op.out) + offset;
  switch (op.kind) {
    case RowOp::Kind::kInput:
      std::memcpy(out, batch_->inputs[static_cast<size_t>(op.input)] + offset, bytes);
      break;
    case RowOp::Kind::kEmbed:
      for (int64_t i = begin; i < end; ++i, out += op.features) {
        kernels_.embed_row(&weights_.matrix(op.weight), batch_->token_ids[i], out);
        if (op.scale != 1.0f) kernels_.scale(out, op.scale, op.features);
      }
      break;
    case RowOp::Kind::kSelect:
      for (int64_t i = begin; i < end; ++i, out += op.features) {
        std::memcpy(out, at(op.a) + batch_->logits_rows[i] * op.features, static_cast<size_t>(op.features) * sizeof(float));
      }
      break;
    case RowOp::Kind::kCopy:
      std::memcpy(out, a, bytes);
      break;
    case RowOp::Kind::kRmsNorm:
      kernels_.rms_norm(a, weights_.vector(op.weight), op.eps, rows * op.num_heads, op.features / op.num_heads, out);
      break;
    case RowOp::Kind::kAdd:
      kernels_.add(a, b, count, out);
      break;
    case RowOp::Kind::kSiluMul:
      kernels_.silu_mul(a, b, count, out);
      break;
    case RowOp::Kind::kGeluMul:
      kernels_.gelu_mul(a, b, count, out);
      break;
    case RowOp::Kind::kQuantize: {
      const int32_t group = quantized_[static_cast<size_t>(op.quantized)].group;
      kernels_.quantize_rows(a, op.features, rows, op.features, group, begin, quantized_rows(op.quantized, stage_rows));
      break;
    }
    case RowOp::Kind::kRope: {
      const RopeTable& table = ropes_[static_cast<size_t>(op.table)];
      kernels_.rope(out, op.features, rows, op.num_heads, static_cast<int32_t>(2 * table.inv_freq.size()),
                    table.rows.data() + begin);
      break;
    }
    case RowOp::Kind::kWriteKv: {
      const AttentionArgs args = attention_args(caches_[static_cast<size_t>(op.cache)]);
      kernels_.write_kv(a, b, op.features, rows, &args, batch_->slots + begin);
      break;
    }
  }
}

QuantizedRows Program::quantized_rows(int id, int64_t rows) {
  const QuantizedPlace& place = quantized_[static_cast<size_t>(id)];
  uint8_t* arena = arena_.data();
  return {reinterpret_cast<int8_t*>(arena + place.codes), at(place.scales), reinterpret_cast<int16_t*>(arena + place.sums),
          at(place.scaled_sums), quantized_stride(rows)};
}

// Item after item takes other panels of the same rows, then the next rows.
void Program::run_linear(const Stage& stage, int64_t item, int64_t chunk) {
  const int64_t all_rows = stage.selected ? batch_->num_selected : batch_->num_tokens;
  int64_t all_panels = 0;
  for (const LinearPart& part : stage.parts) all_panels += divide_up(weights_.matrix(part.weight).n, kPanel);
  const int64_t rows = divide_up(all_rows, divide_up(all_rows, kRowBlock));  // of a block: as equal as can be
  const int64_t items = divide_up(all_panels, chunk), row = item / items * rows;
  int64_t begin = item % items * chunk, end = begin + chunk;
  LinearArgs args{};
  args.rows = std::max<int64_t>(0, std::min(rows, all_rows - row));
  if (stage.quantized >= 0) {
    args.quantized = rows_from(quantized_rows(stage.quantized, all_rows), row, 0, weights_.matrix(stage.parts[0].weight).group);
  } else {
    args.x = at(stage.x) + row * weights_.matrix(stage.parts[0].weight).k;
  }
  for (const LinearPart& part : stage.parts) {
    const PackedWeight& weight = weights_.matrix(part.weight);
    const int64_t panels = divide_up(weight.n, kPanel);
    if (begin < panels && end > 0) {
      args.weight = &weight;
      args.out = at(part.out) + row * weight.n;
      args.out_stride = weight.n;
      args.bias = part.bias < 0 ? nullptr : weights_.vector(part.bias);
      args.residual = part.residual < 0 ? nullptr : at(part.residual) + row * weight.n;
      kernels_.linear(&args, std::max<int64_t>(begin, 0), std::min(end, panels));
    }
    begin -= panels;
    end -= panels;
  }
}

AttentionArgs Program::attention_args(const CacheGeometry& geometry) const {
  AttentionArgs args{};
  args.k_cache = kv_->k(geometry.layer);
  args.v_cache = kv_->v(geometry.layer);
  args.kind = limits_.kv_kind;
  args.head_bytes = head_bytes(geometry);
  if (limits_.kv_kind == KvKind::kInt8) {
    args.factors = weights_.vector(geometry.factors);
    args.inverses = weights_.vector(geometry.inverses);
  }
  args.num_heads = geometry.num_heads;
  args.num_kv_heads = geometry.num_kv_heads;
  args.head_dim = geometry.head_dim;
  args.block_size = static_cast<int32_t>(limits_.block_size);
  args.scale = geometry.scale;
  args.window = geometry.window;
  args.soft_cap = geometry.soft_cap;
  args.positions = batch_->positions;
  return args;
}

void Program::run_attention(const Stage& stage, int64_t item, int thread) {
  const CacheGeometry& geometry = caches_[static_cast<size_t>(stage.cache)];
  const int64_t segment = item % segments_, problem = item / segments_;
  const AttentionItem& tile = attention_items_[static_cast<size_t>(problem / geometry.num_kv_heads)];
  const auto kv_head = static_cast<int32_t>(problem % geometry.num_kv_heads);
  const int32_t* block_table = batch_->block_table + tile.sequence * batch_->table_width;
  auto* scratch = reinterpret_cast<float*>(attention_scratch_[static_cast<size_t>(thread)].data());
  AttentionArgs args = attention_args(geometry);
  args.query = at(stage.x);
  args.out = at(stage.out);
  if (segments_ == 1) {
    kernels_.attention(&args, block_table, tile.row_begin, tile.row_end, kv_head, scratch);
  } else {
    int64_t stride;
    float* partial = partials(geometry, tile, kv_head, &stride) + segment * stride;
    kernels_.attention_segment(&args, block_table, tile.row_begin, tile.row_end, kv_head, segment, partial, scratch);
  }
}

// Where the segments of a tile and kv head lie, `stride` floats apart.
float* Program::partials(const CacheGeometry& geometry, const AttentionItem& tile, int64_t kv_head, int64_t* stride) {
  const int64_t group = geometry.num_heads / geometry.num_kv_heads;
  const auto token = static_cast<int64_t>(attention_partial_floats(1, group, geometry.head_dim));
  *stride = (tile.row_end - tile.row_begin) * token;
  return reinterpret_cast<float*>(partials_.data()) +
         segments_ * (tile.row_begin * geometry.num_kv_heads * token + kv_head * *stride);
}

void Program::run_merge(const Stage& stage, int64_t item) {
  const CacheGeometry& geometry = caches_[static_cast<size_t>(stage.cache)];
  const AttentionItem& tile = attention_items_[static_cast<size_t>(item / geometry.num_kv_heads)];
  const auto kv_head = static_cast<int32_t>(item % geometry.num_kv_heads);
  AttentionArgs args = attention_args(geometry);
  args.out = at(stage.out);
  int64_t stride;
  float* first = partials(geometry, tile, kv_head, &stride);
  kernels_.attention_merge(&args, tile.row_begin, tile.row_end, kv_head, first, stride);
}

void Program::run_sample(int64_t row, int thread) {
  const SamplingView& s = *sampling_;
  SampleArgs args{};
  args.logits = at(logits_) + row * vocab_;
  args.work = reinterpret_cast<float*>(sample_scratch_[static_cast<size_t>(thread)].data());
  args.vocab = vocab_;
  args.temperature = s.temperature[row];
  args.top_p = s.top_p[row];
  args.min_p = s.min_p[row];
  args.repetition = s.repetition[row];
  args.presence = s.presence[row];
  args.frequency = s.frequency[row];
  args.top_k = s.top_k[row];
  args.index = s.index[row];
  args.position = s.position[row];
  args.num_logprobs = s.num_logprobs[row];
  args.seed = s.seed[row];
  args.seen_ids = s.seen_ids + s.seen_start[row];
  args.seen_counts = s.seen_counts + s.seen_start[row];
  args.num_seen = s.seen_start[row + 1] - s.seen_start[row];
  args.bias_ids = s.bias_ids + s.bias_start[row];
  args.bias_values = s.bias_values + s.bias_start[row];
  args.num_bias = s.bias_start[row + 1] - s.bias_start[row];
  args.token = s.tokens + row;
  args.logprob = s.logprobs + row;
  args.top_ids = s.top_ids + row * s.top_width;
  args.top_logprobs = s.top_logprobs + row * s.top_width;
  kernels_.sample(&args);
}

}  // namespace octavo
