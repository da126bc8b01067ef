// Rotary position embedding in place, and the write of K and V into the paged cache.
//
// A position's angles come as [cos of head_dim / 2, sin of head_dim / 2]. K is stored with tokens in lanes
// ([kv head][head_dim][block_size]), so that attention needs no horizontal sums; V with head_dim in lanes.
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {
namespace {

// head_dim / 2 need not be a multiple of the lanes.
OCTAVO_INLINE f32x16 load_up_to_16(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : load_partial(p, left);
}

OCTAVO_INLINE void store_up_to_16(float* p, f32x16 a, int64_t left) {
  if (left >= kLanes) {
    store(p, a);
  } else {
    store_partial(p, a, left);
  }
}

}  // namespace

void rope(float* x, int64_t stride, int64_t rows, int32_t num_heads, int32_t head_dim, const float* const* cos_sin_rows) {
  const int64_t half = head_dim / 2;
  for (int64_t row = 0; row < rows; ++row) {
    const float* cos = cos_sin_rows[row];
    const float* sin = cos + half;
    for (int32_t head = 0; head < num_heads; ++head) {
      float* low = x + row * stride + head * static_cast<int64_t>(head_dim);
      float* high = low + half;
      for (int64_t i = 0; i < half; i += 16) {
        const int64_t left = half - i;
        const f32x16 a = load_up_to_16(low + i, left), b = load_up_to_16(high + i, left);
        const f32x16 c = load_up_to_16(cos + i, left), s = load_up_to_16(sin + i, left);
        store_up_to_16(low + i, a * c - b * s, left);
        store_up_to_16(high + i, b * c + a * s, left);
      }
    }
  }
}

void write_kv(const float* k, const float* v, int64_t stride, int64_t rows, const AttentionArgs* cache, uint16_t* k_cache,
              uint16_t* v_cache, const int32_t* slots) {
  const int64_t block_size = cache->block_size, head_dim = cache->head_dim, heads = cache->num_kv_heads;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t block = slots[row] / block_size, offset = slots[row] % block_size;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t base = (block * heads + head) * head_dim * block_size;
      const float* k_row = k + row * stride + head * head_dim;
      const float* v_row = v + row * stride + head * head_dim;
      uint16_t* k_lane = k_cache + base + offset;
      uint16_t* v_line = v_cache + base + offset * head_dim;
      for (int64_t d = 0; d < head_dim; d += 16) {  // head_dim is a multiple of 16
        uint16_t lanes[16];
        store_f16(lanes, load(k_row + d));
        for (int64_t i = 0; i < 16; ++i) k_lane[(d + i) * block_size] = lanes[i];
        store_f16(v_line + d, load(v_row + d));
      }
    }
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
