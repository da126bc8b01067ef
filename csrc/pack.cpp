// From the stored forms of graph/tensors.py to PackedWeight: the layout that linear and embed_row read.
//
// A weight is cut into panels of 32 columns (output features), the last one padded with zeros. Grouped weights, a
// panel:
//   kInt8: [k / 4][32 columns][4 k's] bytes, so that 64 bytes are the u8 operand of vpdpbusd for 16 columns;
//   kInt4: [k / 4][16 columns][4 k's] bytes, the low nibble for column c, the high nibble for column c + 16: 64 bytes
//   hold
//     one step of all 32 columns, one load and two masks away from vpdpbusd;
//   scales, minimums: [k / group][32 columns], float16 where the file has only float16 (bits untouched), else
//     float32.
// Dense weights, a panel: [k][32 columns] in the file's type.
//
// Packing goes block by block: the codes of 32 rows are gathered into bytes [32][block], then transposed in 4 x 4
// words. A plane's table (byte_of, shift_of) is cut into runs once a call: bytes in sequence with one shift, or the
// eight bits of one byte, go sixteen or eight codes at a time with the vectors of the compiler (SSE2, NEON), anything
// else goes one by one. Measured 2026-11-23 on a 2-core AMD EPYC Zen 5 VM, one thread: nanoseconds a weight Q4_1 0.13,
// Q8_0 0.22, Q5_1 0.34, Q4_K 0.15, Q6_K 0.26 (0.02 to 0.05 s for 134 million weights; tests/linear_bench.cpp).
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace octavo {
namespace {

using Bytes = uint8_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(16)));

template <typename T>
T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

size_t padded(int64_t bytes) { return (static_cast<size_t>(bytes) + 63) / 64 * 64; }

// ---- gathering the codes of rows -----------------------------------------------------------------------------------

// Elements first .. first + count of a block that one pattern describes.
struct Run {
  enum class Pattern { kSequence, kBits, kSingle } pattern;
  int32_t first, count, byte, shift;
};

std::vector<Run> runs_of(const PlaneView& plane) {
  std::vector<Run> runs;
  const uint16_t* byte_of = plane.byte_of;
  const uint8_t* shift_of = plane.shift_of;
  for (int32_t e = 0; e < plane.block_len;) {
    const int32_t byte = byte_of[e], shift = shift_of[e];
    int32_t end = e + 1;
    while (end < plane.block_len && byte_of[end] == byte + (end - e) && shift_of[end] == shift) ++end;
    int32_t count = (end - e) / 16 * 16;
    Run::Pattern pattern = Run::Pattern::kSequence;
    if (count == 0 || plane.byte_stride != 1) {
      int32_t bits = 0;
      while (bits < 8 && e + bits < plane.block_len && byte_of[e + bits] == byte && shift_of[e + bits] == bits) ++bits;
      const bool is_bits = bits == 8 && plane.bits == 1;
      pattern = is_bits ? Run::Pattern::kBits : Run::Pattern::kSingle;
      count = is_bits ? 8 : 1;
    }
    runs.push_back({pattern, e, count, byte, shift});
    e += count;
  }
  return runs;
}

// Adds a plane's bits to codes[rows][stride], one block of each row.
void gather(const PlaneView& plane, const std::vector<Run>& runs, const uint8_t* data, int64_t rows, uint8_t* codes,
            int64_t stride) {
  const auto flip = static_cast<uint8_t>(plane.flip), mask = static_cast<uint8_t>((1 << plane.bits) - 1);
  const Bytes flips = Bytes{} + flip, masks = Bytes{} + mask;
  const uint64_t flips8 = 0x0101010101010101u * flip;
  for (const Run& run : runs) {
    const uint8_t* from = data + run.byte * plane.byte_stride;
    uint8_t* to = codes + run.first;
    switch (run.pattern) {
      case Run::Pattern::kSequence:
        for (int64_t row = 0; row < rows; ++row, from += plane.row_stride, to += stride) {
          for (int32_t i = 0; i < run.count; i += 16) {
            const auto moved =
                reinterpret_cast<Bytes>(reinterpret_cast<Halves>(load_as<Bytes>(from + i) ^ flips) >> run.shift);
            const auto lifted = reinterpret_cast<Bytes>(reinterpret_cast<Halves>(moved & masks) << plane.lift);
            const Bytes sum = load_as<Bytes>(to + i) + lifted;
            std::memcpy(to + i, &sum, sizeof sum);
          }
        }
        break;
      case Run::Pattern::kBits:
        for (int64_t row = 0; row < rows; ++row, from += plane.row_stride, to += stride) {
          const uint64_t eight = (0x0101010101010101u * *from ^ flips8) & 0x8040201008040201u;  // bit i in byte i
          const uint64_t ones = ((eight + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
          const uint64_t sum = load_as<uint64_t>(to) + (ones << plane.lift);
          std::memcpy(to, &sum, sizeof sum);
        }
        break;
      case Run::Pattern::kSingle:
        for (int64_t row = 0; row < rows; ++row, from += plane.row_stride, to += stride) {
          *to = static_cast<uint8_t>(*to + ((((*from ^ flip) >> run.shift) & mask) << plane.lift));
        }
        break;
    }
  }
}

// ---- transposing them ----------------------------------------------------------------------------------------------

// Four rows of four words to four columns, each stored at out + i * stride.
void transpose(const Words (&r)[4], uint8_t* out, int64_t stride) {
  const Words a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Words c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  const Words columns[4] = {
      __builtin_shufflevector(a, b, 0, 1, 4, 5),
      __builtin_shufflevector(a, b, 2, 3, 6, 7),
      __builtin_shufflevector(c, d, 0, 1, 4, 5),
      __builtin_shufflevector(c, d, 2, 3, 6, 7),
  };
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &columns[i], sizeof columns[i]);
}

// codes[32][count] bytes to [count / 4][16][4] pairs of nibbles, or [count / 4][32][4] bytes.
void interleave(const uint8_t* codes, int64_t count, bool nibbles, uint8_t* out) {
  const int64_t columns = nibbles ? kPanel / 2 : kPanel, step = columns * 4;
  for (int64_t j = 0; j < count; j += 16) {
    for (int64_t c = 0; c < columns; c += 4) {
      Words r[4];
      for (int64_t i = 0; i < 4; ++i) {
        const uint8_t* row = codes + (c + i) * count + j;
        r[i] = load_as<Words>(row);
        if (nibbles) r[i] |= load_as<Words>(row + (kPanel / 2) * count) << 4;
      }
      transpose(r, out + (j / 4) * step + c * 4, step);
    }
  }
}

// [rows][groups] of the file to [groups][32 columns].
template <typename From, typename To, To (*kConvert)(From)>
void pack_scales(const ScaleView& view, int64_t groups, int64_t row, int64_t rows, void* out) {
  auto* to = static_cast<To*>(out) + row * groups;
  const uint8_t* from = view.data + row * view.row_stride;
  for (int64_t g = 0; g < groups; ++g, from += view.group_stride, to += kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) to[c] = c < rows ? kConvert(load_as<From>(from + c * view.row_stride)) : To{};
  }
}

uint16_t same_f16(uint16_t h) { return h; }
float same_f32(float x) { return x; }
float widen_f16(uint16_t h) { return scalar::f16_to_f32(h); }

void pack_scales(const ScaleView& view, bool as_f32, int64_t groups, int64_t row, int64_t rows, void* out) {
  if (!as_f32) {
    pack_scales<uint16_t, uint16_t, same_f16>(view, groups, row, rows, out);
  } else if (view.is_f32) {
    pack_scales<float, float, same_f32>(view, groups, row, rows, out);
  } else {
    pack_scales<uint16_t, float, widen_f16>(view, groups, row, rows, out);
  }
}

bool needs_f32(const GroupedView& view) { return view.scales.is_f32 || (view.minimums.data && view.minimums.is_f32); }

// Elements of a row gathered at a time: the longest block of the planes, whole steps of 16.
int64_t chunk_of(const GroupedView& view) {
  int64_t longest = 16;
  for (int32_t i = 0; i < view.num_planes; ++i) longest = std::max<int64_t>(longest, view.planes[i].block_len);
  bool fits = longest % 16 == 0 && view.k % longest == 0;
  for (int32_t i = 0; i < view.num_planes; ++i) fits = fits && longest % view.planes[i].block_len == 0;
  return fits ? longest : view.k;
}

template <typename T>
void pack_dense(const DenseView& view, uint8_t* out, int64_t panel_begin, int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t rows = std::min(kPanel, view.n - panel * kPanel);
    const uint8_t* from = view.data + panel * kPanel * view.row_stride;
    T* to = reinterpret_cast<T*>(out) + panel * kPanel * view.k;
    for (int64_t j = 0; j < view.k; ++j, from += sizeof(T), to += kPanel) {
      for (int64_t c = 0; c < rows; ++c) to[c] = load_as<T>(from + c * view.row_stride);
      for (int64_t c = rows; c < kPanel; ++c) to[c] = T{};
    }
  }
}

}  // namespace

PackedSizes packed_sizes(const GroupedView& view) {
  const int64_t weights = panels_of(view.n) * kPanel * view.k;
  const size_t scales = padded(weights / view.group * (needs_f32(view) ? 4 : 2));
  return {padded(view.bits <= 4 ? weights / 2 : weights), scales, view.minimums.data ? scales : 0};
}

PackedSizes packed_sizes(const DenseView& view) {
  return {padded(panels_of(view.n) * kPanel * view.k * (view.kind == WeightKind::kF32 ? 4 : 2)), 0, 0};
}

PackedWeight describe(const GroupedView& view, uint8_t* codes, void* scales, void* minimums) {
  return {.kind = view.bits <= 4 ? WeightKind::kInt4 : WeightKind::kInt8,
          .n = view.n,
          .k = view.k,
          .group = view.group,
          .zero = view.zero,
          .scales_f32 = needs_f32(view),
          .codes = codes,
          .scales = scales,
          .minimums = view.minimums.data ? minimums : nullptr};
}

PackedWeight describe(const DenseView& view, uint8_t* codes) {
  return {.kind = view.kind,
          .n = view.n,
          .k = view.k,
          .group = 0,
          .zero = 0,
          .scales_f32 = false,
          .codes = codes,
          .scales = nullptr,
          .minimums = nullptr};
}

void pack_panels(const GroupedView& view, PackedWeight* out, int64_t panel_begin, int64_t panel_end) {
  const int64_t chunk = chunk_of(view), groups = view.k / view.group;
  const bool nibbles = out->kind == WeightKind::kInt4;
  std::vector<Run> runs[3];
  for (int32_t i = 0; i < view.num_planes; ++i) runs[i] = runs_of(view.planes[i]);
  std::vector<uint8_t> codes(static_cast<size_t>(kPanel * chunk));
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t row = panel * kPanel, rows = std::min(kPanel, view.n - row);
    auto* to = const_cast<uint8_t*>(out->codes) + row * view.k / (nibbles ? 2 : 1);
    for (int64_t first = 0; first < view.k; first += chunk) {
      std::memset(codes.data(), 0, codes.size());
      for (int32_t i = 0; i < view.num_planes; ++i) {
        const PlaneView& plane = view.planes[i];
        for (int64_t block = first / plane.block_len; block * plane.block_len < first + chunk; ++block) {
          const uint8_t* data = plane.data + row * plane.row_stride + block * plane.block_stride;
          gather(plane, runs[i], data, rows, codes.data() + block * plane.block_len - first, chunk);
        }
      }
      interleave(codes.data(), chunk, nibbles, to + first * (nibbles ? kPanel / 2 : kPanel));
    }
    pack_scales(view.scales, out->scales_f32, groups, row, rows, const_cast<void*>(out->scales));
    if (out->minimums) pack_scales(view.minimums, out->scales_f32, groups, row, rows, const_cast<void*>(out->minimums));
  }
}

void pack_panels(const DenseView& view, PackedWeight* out, int64_t panel_begin, int64_t panel_end) {
  auto* codes = const_cast<uint8_t*>(out->codes);
  if (view.kind == WeightKind::kF32) {
    pack_dense<float>(view, codes, panel_begin, panel_end);
  } else {
    pack_dense<uint16_t>(view, codes, panel_begin, panel_end);
  }
}

size_t linear_scratch_bytes(const PackedWeight& weight) {
  if (weight.group == 0) return 64;
  const int64_t groups = weight.k / weight.group;
  return padded(2 * kRowBlock * groups * 4);  // a start of the integer sum and a scaled sum, a row and group
}

}  // namespace octavo
