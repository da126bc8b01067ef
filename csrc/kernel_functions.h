// The kernels of the instruction set being compiled, as table.cpp collects them; contracts stand in kernels.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace octavo {
namespace OCTAVO_NS {

void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t k, int32_t group, int64_t first_row,
                   const QuantizedRows& out);
void linear(const LinearArgs* args, int64_t panel_begin, int64_t panel_end);
void embed_row(const PackedWeight* weight, int64_t row, float* out);

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t features, float* out);
void rope(float* x, int64_t stride, int64_t rows, int32_t num_heads, int32_t head_dim, const float* const* cos_sin_rows);
void write_kv(const float* k, const float* v, int64_t stride, int64_t rows, const AttentionArgs* cache,
              const int32_t* slots);
void attention(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end, int32_t kv_head,
               float* scratch);
void attention_segment(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end,
                       int32_t kv_head, int64_t segment, float* partial, float* scratch);
void attention_merge(const AttentionArgs* args, int64_t row_begin, int64_t row_end, int32_t kv_head, float* partials,
                     int64_t stride);
void silu_mul(const float* gate, const float* up, int64_t count, float* out);
void gelu_mul(const float* gate, const float* up, int64_t count, float* out);
void scale(float* x, float factor, int64_t count);
void add(const float* a, const float* b, int64_t count, float* out);
void sample(const SampleArgs* args);

}  // namespace OCTAVO_NS
}  // namespace octavo
