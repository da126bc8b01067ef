// Rows of x, rounded to int8, times one panel of a grouped weight; the contract stands in linear.cpp, which alone includes
// this.
//
// In a tile the sums of a group, for some rows and columns, stay in registers while its steps of four k's pass. AVX-512: up to
// 6 rows by 2 vectors of 16 columns, so that two vectors of weights and six of activations feed twelve vpdpbusd. AVX2 has half
// the registers of half the width: up to 6 rows by one vector of 16 columns (two registers) make twelve sums, and the float
// sums wait in memory for the end of a group; one or two rows, where memory is the limit, take both vectors at once. Codes are
// taken out of their planes anew for each tile, a few cheap instructions beside twelve products; but where they lie in two
// planes (3, 5, 6 bits), rows of more than one tile share bytes that are unpacked into L1 once. Each load of codes fetches 4 KB
// ahead, over the page's end where the hardware stops.
//
// Measured 2026-11-25, AMD Zen 3, one thread, 64 rows: 1.0 cycles an AVX2 product of 32 with 4 bits where 0.65 is the limit, at
// 3.6 instructions a cycle: what remains are broadcasts of x and the float sums. Unpacking once: 5 bits 1.33 to 1.04, 6 bits
// 1.55 to 1.4.
#pragma once

#include "planes.h"

namespace octavo {
namespace OCTAVO_NS {

namespace {

constexpr int kChunk = 256;  // k's whose codes are taken apart at a time

struct GroupedPanel {
  const uint8_t* data;
  GroupedLayout layout;
  int64_t groups;
  int32_t zero;
  bool has_minimums;
};

#if defined(OCTAVO_ISA_AVX512) || defined(OCTAVO_ISA_AVX2)

// The centre of a panel's codes, and what it leaves of their zero point (dot.h).
struct Zero {
  int32_t centre, rest;
};
template <int kBits>
OCTAVO_INLINE Zero zero_of(const GroupedPanel& panel) {
  const int32_t centre = centre_of<kBits>(panel.zero);
  return {centre, centre - panel.zero};
}

// The sums of a group of kRows rows; codes(step, part, v) are those of 16 columns. The centre is 0 unless kCentred.
template <bool kWords, int kGroup, int kRows, int kVectors, bool kCentred, typename Codes>
OCTAVO_INLINE void multiply_group(const Codes& codes, const QuantizedRows& rows, int64_t at, int32_t centre,
                                  sums (&sum)[kRows][kVectors]) {
  constexpr int kParts = kWords ? 2 : 1;
  alignas(32) int16_t words[kRows][kGroup];
  const int8_t* x = rows.codes + at * kGroup;
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kWords) widen<kGroup>(x + i * kGroup, words[i]);
    const sums start = kCentred ? start_sums<kWords>(rows.sums + 2 * (at + i), centre) : no_sums();
    OCTAVO_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[i][v] = start;
  }
  if constexpr (kWords) asm volatile("" ::: "memory");  // broadcast from memory, not taken apart in registers
  for_each<kGroup / 4 * kParts>([&](auto index) OCTAVO_INLINE_LAMBDA {
    constexpr int kStep = decltype(index)::value / kParts, kPart = decltype(index)::value % kParts;
    u8x64 w[kVectors];
    OCTAVO_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = codes(Int<kStep>(), Int<kPart>(), v);
    OCTAVO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const void* four = x + i * kGroup + 4 * kStep;
      if constexpr (kWords) four = words[i] + kPart * kGroup / 2 + 2 * kStep;
      const u8x64 xi = broadcast_x4(four);
      OCTAVO_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = add_products<kWords>(sum[i][v], w[v], xi);
    }
  });
}

// Adds a group's sums to c; scales(kind, v) are the scales (0) and minimums (1) of 16 columns.
template <bool kWords, int kRows, int kVectors, bool kCentred, typename Scales>
OCTAVO_INLINE void add_group(const sums (&sum)[kRows][kVectors], const Scales& scales, bool has_minimums,
                             const QuantizedRows& rows, int64_t at, int32_t rest, f32x16 (&c)[kRows][kVectors]) {
  OCTAVO_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const f32x16 scale = scales(0, v);
    const auto add_rows = [&](auto with_minimums) OCTAVO_INLINE_LAMBDA {
      f32x16 minimum = scale;
      if constexpr (decltype(with_minimums)::value) minimum = scales(1, v);
      OCTAVO_UNROLL
      for (int i = 0; i < kRows; ++i) {
        i32x16 dot = last_sums<kWords>(sum[i][v]);
        if (kCentred && rest != 0) dot = dot + times_sum(rows.sums + 2 * (at + i), rest);
        c[i][v] = fma(to_f32(dot), scale * set1(rows.scales[at + i]), c[i][v]);
        if constexpr (decltype(with_minimums)::value) c[i][v] = fma(minimum, set1(rows.scaled_sums[at + i]), c[i][v]);
      }
    };
    if (has_minimums) {
      add_rows(Int<1>());
    } else {
      add_rows(Int<0>());
    }
  }
}

// ---- tiles that take codes out of their planes into registers

template <int kBits, int kGroup, bool kCentred, int kRows, int kVectors>
void direct_tile(const GroupedPanel& panel, int64_t column, const QuantizedRows& rows, const Output& to) {
  constexpr int kGroups = 32 / kGroup;  // of a unit
  const GroupedLayout& layout = panel.layout;
  const int64_t groups = panel.groups, groups_of_block = layout.block_columns / kGroup;
  const Zero zero = zero_of<kBits>(panel);
  f32x16 c[kRows][kVectors];
  clear(c);
  const uint8_t* block = panel.data;
  for (int64_t first = 0; first < groups; first += groups_of_block, block += layout.block) {
    const uint8_t* unit = block + layout.header + column * 4;
    for (int64_t in_block = 0; in_block < groups_of_block; in_block += kGroups, unit += layout.unit) {
      for_each<kGroups>([&](auto index) OCTAVO_INLINE_LAMBDA {
        constexpr int kFirst = decltype(index)::value * kUnitSteps / kGroups;
        const int64_t in = in_block + decltype(index)::value, g = first + in;
        if (kFirst > 0 && g >= groups) return;  // half a unit at the end
        const auto codes = [&](auto step, auto part, int v) OCTAVO_INLINE_LAMBDA {
          constexpr int kStep = kFirst + decltype(step)::value;
          return part_of<kWords<kBits>, decltype(part)::value>(load_codes<kBits, kStep>(unit + v * 64));
        };
        const auto scales = [&](int kind, int v) OCTAVO_INLINE_LAMBDA {
          return load_scales(layout, block, groups_of_block, in, kind, column + v * kLanes);
        };
        sums sum[kRows][kVectors];
        multiply_group<kWords<kBits>, kGroup, kRows, kVectors, kCentred>(codes, rows, g * rows.stride, zero.centre, sum);
        add_group<kWords<kBits>, kRows, kVectors, kCentred>(sum, scales, panel.has_minimums, rows, g * rows.stride, zero.rest,
                                                            c);
      });
    }
  }
  finish(c, to);
}

// kRows rows of one panel: both vectors of columns at once, or one after the other.
template <int kBits, int kGroup, bool kCentred, int kRows>
OCTAVO_INLINE void direct_tiles(const GroupedPanel& panel, const QuantizedRows& rows, const Output& to) {
  if constexpr (kRows <= kRowsOfWholePanels) {
    direct_tile<kBits, kGroup, kCentred, kRows, kHalves>(panel, 0, rows, to);
  } else {
    direct_tile<kBits, kGroup, kCentred, kRows, 1>(panel, 0, rows, to);
    if (to.columns > kLanes) direct_tile<kBits, kGroup, kCentred, kRows, 1>(panel, kLanes, rows, at_column(to, kLanes));
  }
}

// ---- tiles of many rows: codes of 3, 5 and 6 bits and their scales are taken apart once, 256 k's at a time

struct Chunk {
  alignas(64) uint8_t codes[kChunk / 4][kTileVectors][64];
  float scales[2][kChunk / 16][kTileVectors * kLanes];  // and minimums
};

template <int kBits, int kGroup>
void fill(const GroupedPanel& panel, int64_t column, int64_t first, int64_t groups, Chunk& chunk) {
  const GroupedLayout& layout = panel.layout;
  const int64_t groups_of_block = layout.block_columns / kGroup;
  const uint8_t* block = panel.data + first * kGroup / layout.block_columns * layout.block;
  for (int64_t begin = 0; begin < groups; begin += groups_of_block, block += layout.block) {
    const int64_t count = groups - begin < groups_of_block ? groups - begin : groups_of_block;
    const uint8_t* unit = block + layout.header + column * 4;
    for (int64_t g = 0; g < count; g += 32 / kGroup, unit += layout.unit) {
      uint8_t(*to)[kTileVectors][64] = chunk.codes + (begin + g) * (kGroup / 4);
      for_each<kUnitSteps>([&](auto step) OCTAVO_INLINE_LAMBDA {
        OCTAVO_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
          store_u8(to[decltype(step)::value][v], load_codes<kBits, decltype(step)::value>(unit + v * 64));
        }
      });
    }
    for (int kind = 0; kind < (panel.has_minimums ? 2 : 1); ++kind) {
      for (int64_t g = 0; g < count; ++g) {
        for (int v = 0; v < kTileVectors; ++v) {
          store(chunk.scales[kind][begin + g] + v * kLanes,
                load_scales(layout, block, groups_of_block, g, kind, column + v * kLanes));
        }
      }
    }
  }
}

// Adds `groups` groups of a chunk to kRows rows of sums; `rows` begin at the chunk's first group.
template <int kGroup, int kRows>
__attribute__((noinline)) void chunk_tile(const Chunk& chunk, int64_t groups, Zero zero, bool has_minimums,
                                          const QuantizedRows& rows, float (*out)[kTileVectors * kLanes]) {
  f32x16 c[kRows][kTileVectors];
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    OCTAVO_UNROLL
    for (int v = 0; v < kTileVectors; ++v) c[i][v] = load(out[i] + v * kLanes);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t(*from)[kTileVectors][64] = chunk.codes + g * (kGroup / 4);
    const auto codes = [&](auto step, auto, int v) OCTAVO_INLINE_LAMBDA { return load_u8(from[decltype(step)::value][v]); };
    const auto scales = [&](int kind, int v) OCTAVO_INLINE_LAMBDA { return load(chunk.scales[kind][g] + v * kLanes); };
    sums sum[kRows][kTileVectors];
    multiply_group<false, kGroup, kRows, kTileVectors, true>(codes, rows, g * rows.stride, zero.centre, sum);
    add_group<false, kRows, kTileVectors, true>(sum, scales, has_minimums, rows, g * rows.stride, zero.rest, c);
  }
  OCTAVO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    OCTAVO_UNROLL
    for (int v = 0; v < kTileVectors; ++v) store(out[i] + v * kLanes, c[i][v]);
  }
}

// All rows of kTileVectors vectors of columns.
template <int kBits, int kGroup>
void chunked_rows(const GroupedPanel& panel, int64_t column, const QuantizedRows& rows, const Output& to, int64_t count) {
  constexpr int64_t kGroups = kChunk / kGroup;
  Chunk chunk;
  alignas(64) float sum[kRowBlock][kTileVectors * kLanes] = {};
  const Zero zero = zero_of<kBits>(panel);
  for (int64_t first = 0; first < panel.groups; first += kGroups) {
    const int64_t groups = panel.groups - first < kGroups ? panel.groups - first : kGroups;
    fill<kBits, kGroup>(panel, column, first, groups, chunk);
    for_tiles(count, [&](auto taken, int64_t row) OCTAVO_INLINE_LAMBDA {
      constexpr int kRows = decltype(taken)::value;
      if constexpr (kRows >= kTileRows / 2) {  // of more than one tile
        const QuantizedRows x = rows_from(rows, row, first, kGroup);
        chunk_tile<kGroup, kRows>(chunk, groups, zero, panel.has_minimums, x, sum + row);
      }
    });
  }
  for (int64_t row = 0; row < count; ++row) {
    f32x16 c[1][kTileVectors];
    OCTAVO_UNROLL
    for (int v = 0; v < kTileVectors; ++v) c[0][v] = load(sum[row] + v * kLanes);
    finish(c, at_row(to, row));
  }
}

template <int kBits, int kGroup, bool kCentred = true>
void grouped_rows(const GroupedPanel& panel, const QuantizedRows& rows, const Output& to, int64_t count) {
  constexpr bool kHasSmallPlane = kBits == 3 || kBits == 5 || kBits == 6;
  if (!kHasSmallPlane || count <= kTileRows) {
    for_tiles(count, [&](auto taken, int64_t row) OCTAVO_INLINE_LAMBDA {
      const QuantizedRows x = rows_from(rows, row, 0, kGroup);
      direct_tiles<kBits, kGroup, kCentred, decltype(taken)::value>(panel, x, at_row(to, row));
    });
    return;
  }
  if constexpr (kHasSmallPlane) {
    for (int64_t column = 0; column < kPanel && column < to.columns; column += kTileVectors * kLanes) {
      chunked_rows<kBits, kGroup>(panel, column, rows, at_column(to, column), count);
    }
  }
}

// The pairs that describe() makes (pack.cpp).
void grouped_rows(int32_t bits, int32_t group, const GroupedPanel& panel, const QuantizedRows& rows, const Output& to,
                  int64_t count) {
  if (group == 32) {
    if (bits == 4 && panel.zero == 0) return grouped_rows<4, 32, false>(panel, rows, to, count);
    if (bits == 4) return grouped_rows<4, 32>(panel, rows, to, count);
    if (bits == 5) return grouped_rows<5, 32>(panel, rows, to, count);
    return grouped_rows<8, 32>(panel, rows, to, count);
  }
  if (bits == 2) return grouped_rows<2, 16>(panel, rows, to, count);
  if (bits == 3) return grouped_rows<3, 16>(panel, rows, to, count);
  if (bits == 6) return grouped_rows<6, 16>(panel, rows, to, count);
  return grouped_rows<8, 16>(panel, rows, to, count);
}

#else

// Without vectors: the codes of a unit are taken apart once for up to kTileRows rows, then plain loops.
template <int kBits>
void decode_unit(const uint8_t* unit, uint8_t (&w)[kUnitSteps][kHalves][64]) {
  for_each<kUnitSteps>([&](auto step) {
    constexpr int kStep = decltype(step)::value;
    for (int v = 0; v < kHalves; ++v) {
      const u8x64 codes = load_codes<kBits, kStep>(unit + v * 64);
      memcpy(w[kStep][v], codes.v, sizeof codes.v);
    }
  });
}

void decode_unit(int32_t bits, const uint8_t* unit, uint8_t (&w)[kUnitSteps][kHalves][64]) {
  switch (bits) {
    case 2: return decode_unit<2>(unit, w);
    case 3: return decode_unit<3>(unit, w);
    case 4: return decode_unit<4>(unit, w);
    case 5: return decode_unit<5>(unit, w);
    case 6: return decode_unit<6>(unit, w);
    default: return decode_unit<8>(unit, w);
  }
}

// Adds one group of one row: `steps` steps of weights, four k's each.
void add_group(const GroupedPanel& panel, const uint8_t* block, int64_t groups_of_block, int64_t in_block,
               const uint8_t (*w)[kHalves][64], int64_t steps, const int8_t* x, i32x16 start, float scale, float scaled_sum,
               f32x16 (&c)[kHalves]) {
  for (int v = 0; v < kHalves; ++v) {
    i32x16 sum = start;
    for (int64_t s = 0; s < steps; ++s) sum = dot(sum, load_u8(w[s][v]), broadcast_x4(x + 4 * s));
    const int64_t column = v * kLanes;
    c[v] = fma(to_f32(sum), load_scales(panel.layout, block, groups_of_block, in_block, 0, column) * set1(scale), c[v]);
    if (panel.has_minimums) {
      c[v] = fma(load_scales(panel.layout, block, groups_of_block, in_block, 1, column), set1(scaled_sum), c[v]);
    }
  }
}

void grouped_rows(int32_t bits, int32_t group, const GroupedPanel& panel, const QuantizedRows& rows, const Output& to,
                  int64_t count) {
  const GroupedLayout& layout = panel.layout;
  const int64_t k = panel.groups * group, groups_of_block = layout.block_columns / group;
  for (int64_t row = 0; row < count; row += kTileRows) {
    const int64_t taken = count - row < kTileRows ? count - row : kTileRows;
    f32x16 c[kTileRows][kHalves];
    for (int i = 0; i < kTileRows; ++i) c[i][0] = c[i][1] = set1(0.0f);
    for (int64_t first = 0; first < k; first += 32) {
      const uint8_t* block = panel.data + first / layout.block_columns * layout.block;
      const int64_t in_block = first % layout.block_columns;
      uint8_t w[kUnitSteps][kHalves][64];
      decode_unit(bits, block + layout.header + in_block / 32 * layout.unit, w);
      for (int64_t i = 0; i < taken; ++i) {
        for (int64_t j = first; j < first + 32 && j < k; j += group) {
          const int64_t at = j / group * rows.stride + row + i;
          add_group(panel, block, groups_of_block, (in_block + j - first) / group, w + (j - first) / 4, group / 4,
                    rows.codes + at * group, times_sum(rows.sums + 2 * at, -panel.zero), rows.scales[at], rows.scaled_sums[at], c[i]);
        }
      }
    }
    for (int64_t i = 0; i < taken; ++i) {
      const f32x16 one[1][kHalves] = {{c[i][0], c[i][1]}};
      finish(one, at_row(to, row + i));
    }
  }
}

#endif

}  // namespace

}  // namespace OCTAVO_NS
}  // namespace octavo
