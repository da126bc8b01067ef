// Codes and scales out of the planes of a grouped weight (layout: pack.cpp), 16 columns or one at a time.
#pragma once

#include "dot.h"
#include "tile.h"

namespace octavo {
namespace OCTAVO_NS {

namespace {

constexpr int kUnitSteps = 8;  // of four k's, in a unit of codes

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
    return load_u8(unit + kStep * 128);
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
OCTAVO_INLINE f32x16 load_scales(const GroupedLayout& layout, const uint8_t* block, int64_t groups, int64_t g, int kind,
                                 int64_t column) {
  const auto* halves = reinterpret_cast<const uint16_t*>(block);
  if (layout.factors == 0) return load_f16(halves + (kind * groups + g) * kPanel + column);
  const auto* factors = reinterpret_cast<const int8_t*>(block + layout.factors);
  return load_f16(halves + kind * kPanel + column) * load_i8(factors + (kind * groups + g) * kPanel + column);
}

// ---- one code, one scale

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

}  // namespace OCTAVO_NS
}  // namespace octavo
