// Rotary position embedding in place, and the write of K and V into the paged cache.
//
// A position's angles come as [cos of head_dim / 2, sin of head_dim / 2]. K is stored with tokens in lanes
// ([kv head][head_dim][block_size]), so that attention needs no horizontal sums; V with head_dim in lanes. int8 has a scale a
// token and kv head behind each head's part of a block.
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

// Both: one token's K or V of one kv head into that head's part of a block, tokens or head_dim in lanes; head_dim is a
// multiple of 16.

OCTAVO_INLINE void write_f16(const float* x, int64_t head_dim, int64_t block_size, int64_t offset, bool tokens_in_lanes,
                             uint8_t* part) {
  auto* elements = reinterpret_cast<uint16_t*>(part);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    if (tokens_in_lanes) {
      uint16_t lanes[kLanes];
      store_f16(lanes, load(x + d));
      for (int64_t i = 0; i < kLanes; ++i) elements[(d + i) * block_size + offset] = lanes[i];
    } else {
      store_f16(elements + offset * head_dim + d, load(x + d));
    }
  }
}

// Rounded as quantize.cpp rounds a group: the whole head is one. x is multiplied by `inverses` first, unless that is null.
OCTAVO_INLINE void write_int8(const float* x, const float* inverses, int64_t head_dim, int64_t block_size, int64_t offset,
                              bool tokens_in_lanes, uint8_t* part) {
  const auto value = [=](int64_t d) { return inverses == nullptr ? load(x + d) : load(x + d) * load(inverses + d); };
  i32x16 greatest = set1_i32(0);
  for (int64_t d = 0; d < head_dim; d += kLanes) greatest = max(greatest, bits_of(abs(value(d))));
  const float maximum = float_of_bits(static_cast<uint32_t>(hmax_i32(greatest)));
  const bool tiny = kSmallestMaximum > maximum;  // false for NaN
  auto* codes = reinterpret_cast<int8_t*>(part);
  auto* scales = reinterpret_cast<float*>(part + head_dim * block_size);
  scales[offset] = tiny ? 0.0f : maximum / 127.0f;
  const f32x16 inverse = set1(tiny ? 0.0f : 127.0f / maximum);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const i32x16 rounded = bits_of(value(d) * inverse + set1(kRoundMagic));
    if (tokens_in_lanes) {
      int8_t lanes[kLanes];
      store_low_bytes(lanes, rounded);
      for (int64_t i = 0; i < kLanes; ++i) codes[(d + i) * block_size + offset] = lanes[i];
    } else {
      store_low_bytes(codes + offset * head_dim + d, rounded);
    }
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

void write_kv(const float* k, const float* v, int64_t stride, int64_t rows, const AttentionArgs* cache,
              const int32_t* slots) {
  const int64_t block_size = cache->block_size, head_dim = cache->head_dim, heads = cache->num_kv_heads;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t block = slots[row] / block_size, offset = slots[row] % block_size;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t base = (block * heads + head) * cache->head_bytes;
      const float* k_row = k + row * stride + head * head_dim;
      const float* v_row = v + row * stride + head * head_dim;
      if (cache->kind == KvKind::kInt8) {
        const float* inverses = cache->inverses + head * head_dim;
        write_int8(k_row, inverses, head_dim, block_size, offset, true, cache->k_cache + base);
        write_int8(v_row, nullptr, head_dim, block_size, offset, false, cache->v_cache + base);
      } else {
        write_f16(k_row, head_dim, block_size, offset, true, cache->k_cache + base);
        write_f16(v_row, head_dim, block_size, offset, false, cache->v_cache + base);
      }
    }
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
