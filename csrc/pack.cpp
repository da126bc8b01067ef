// From the stored forms of graph/tensors.py to PackedWeight: the layout that linear and embed_row read.
//
// A weight is cut into panels of 32 columns (output features), the last one padded with zeros.
//
// A panel of a grouped weight is a sequence of blocks (GroupedLayout): 256 k's, or 32 if the scales have one level. A block:
//   one level:  scales [groups][32] float16, minimums alike;
//   two levels: d [32] float16, minimums' d alike; factors [groups][32] int8, minimums' factors alike: as in the K-quants, bit for
//               bit, but that a factor of 4 or 6 bits takes 8;
//   then the codes, in units of 32 k's = 8 steps of four. What a step of 16 columns needs at once is 64 bytes [16 columns][4 k's],
//   the u8 operand of vpdpbusd; planes hold the bits of several steps in one such vector, columns 0 to 15 and 16 to 31 in turn:
//     4 to 6 bits: four pairs of vectors of nibbles, the even step low;
//     2, 3, 6 bits: two pairs of vectors with two bits (the upper ones of 6) of four steps;
//     3, 5 bits: one pair with the uppermost bit of eight steps; 8 bits: eight pairs of bytes.
//   Groups of 32 have codes of 4, 5 or 8 bits, groups of 16 of 2, 3, 6 or 8, as in GGUF; others are kept in the next. A group of 16 at the end of k leaves half a unit unused.
// Dense weights, a panel: [k][32 columns] in the file's type.
//
// Packing goes block by block: the codes of 32 rows are gathered into bytes [32][block], transposed in 4 x 4 words to steps, and
// their bits cut into planes. A plane's table (byte_of, shift_of) is cut into runs once a call: bytes in sequence with one shift,
// or the eight bits of one byte, go sixteen or eight codes at a time with the vectors of the compiler (SSE2, NEON), anything else
// goes one by one.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

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

constexpr int64_t kUnit = 32;  // k's

// A vector of codes of one step: [16 columns][4 k's].
struct Step {
  uint64_t words[8];
};

// codes[32][stride] from column j on, 32 of them, to steps [8][2 halves].
void transpose_unit(const uint8_t* codes, int64_t stride, Step (&steps)[8][2]) {
  for (int64_t j = 0; j < kUnit; j += 16) {
    for (int64_t c = 0; c < kPanel; c += 4) {
      Words r[4];
      for (int64_t i = 0; i < 4; ++i) r[i] = load_as<Words>(codes + (c + i) * stride + j);
      uint8_t* to = reinterpret_cast<uint8_t*>(&steps[j / 4][c / 16]) + c % 16 * 4;
      transpose(r, to, sizeof steps[0]);
    }
  }
}

// Bits kLow to kLow + kWidth of 8 / kWidth steps, from the first one on, side by side in each byte.
template <int kLow, int kWidth>
uint8_t* put_plane(const Step (&steps)[8][2], uint8_t* out) {
  constexpr int kTogether = 8 / kWidth;
  constexpr uint64_t kMask = 0x0101010101010101u * ((1u << kWidth) - 1);
  for (int first = 0; first < 8; first += kTogether) {
    for (int half = 0; half < 2; ++half, out += sizeof(Step)) {
      Step packed{};
      for (int i = 0; i < kTogether; ++i) {
        for (int w = 0; w < 8; ++w) packed.words[w] |= (steps[first + i][half].words[w] >> kLow & kMask) << (kWidth * i);
      }
      std::memcpy(out, &packed, sizeof packed);
    }
  }
  return out;
}

void put_unit(const Step (&steps)[8][2], int32_t bits, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, steps, sizeof steps);
  } else if (bits >= 4) {
    out = put_plane<0, 4>(steps, out);
    if (bits == 5) put_plane<4, 1>(steps, out);
    if (bits == 6) put_plane<4, 2>(steps, out);
  } else {
    out = put_plane<0, 2>(steps, out);
    if (bits == 3) put_plane<2, 1>(steps, out);
  }
}

// Codes of one block of 32 rows at a time, gathered from their planes.
class Gatherer {
 public:
  Gatherer(const CodesView& view, int64_t columns, int64_t stride)
      : view_(view), columns_(columns), stride_(stride), codes_(static_cast<size_t>(kPanel * stride)) {
    for (int32_t i = 0; i < view.num_planes; ++i) runs_[i] = runs_of(view.planes[i]);
  }

  // Columns first to first + columns of rows row to row + rows; the others are 0. [32][stride]
  const uint8_t* gather(int64_t row, int64_t rows, int64_t first) {
    std::memset(codes_.data(), 0, codes_.size());
    for (int32_t i = 0; i < view_.num_planes; ++i) {
      const PlaneView& plane = view_.planes[i];
      for (int64_t block = first / plane.block_len; block * plane.block_len < first + columns_; ++block) {
        const uint8_t* data = plane.data + row * plane.row_stride + block * plane.block_stride;
        octavo::gather(plane, runs_[i], data, rows, codes_.data() + block * plane.block_len - first, stride_);
      }
    }
    return codes_.data();
  }

 private:
  const CodesView& view_;
  int64_t columns_, stride_;
  std::vector<Run> runs_[3];
  std::vector<uint8_t> codes_;
};

// Columns that are gathered at a time: whole blocks of every plane and of the layout.
int64_t chunk_of(const GroupedView& view, int64_t block_columns) {
  int64_t chunk = block_columns;
  for (int32_t i = 0; i < view.codes.num_planes; ++i) chunk = std::max<int64_t>(chunk, view.codes.planes[i].block_len);
  bool fits = view.k % chunk == 0 && chunk % block_columns == 0;
  for (int32_t i = 0; i < view.codes.num_planes; ++i) fits = fits && chunk % view.codes.planes[i].block_len == 0;
  return fits ? chunk : view.k;
}

// One float16 a step of a row, [count][32], from [rows][steps] of the file.
void pack_halves(const ScaleView& view, int64_t row, int64_t rows, int64_t first, int64_t count, uint8_t* out) {
  const uint8_t* from = view.data + row * view.row_stride + first * view.step_stride;
  for (int64_t g = 0; g < count; ++g, from += view.step_stride, out += kPanel * 2) {
    for (int64_t c = 0; c < rows; ++c) std::memcpy(out + 2 * c, from + c * view.row_stride, 2);
  }
}

// Factors of a block, [groups][32] int8.
void pack_factors(const ScaleView& view, Gatherer& gatherer, int64_t row, int64_t rows, int64_t first, int64_t groups, uint8_t* out) {
  const uint8_t* codes = gatherer.gather(row, rows, first);
  for (int64_t c = 0; c < rows; ++c) {
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t factor = codes[c * groups + g] - view.factors.zero;
      out[g * kPanel + c] = static_cast<uint8_t>(view.is_negated ? -factor : factor);
    }
  }
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

// The bits that a code is kept in.
static int32_t kept_bits(int32_t bits, int32_t group) {
  if (group == 32) return bits <= 4 ? 4 : bits == 5 ? 5 : 8;
  return bits <= 2 ? 2 : bits == 3 ? 3 : bits <= 6 ? 6 : 8;
}

PackedWeight describe(const GroupedView& view, uint8_t* data) {
  return {.kind = WeightKind::kGrouped,
          .n = view.n,
          .k = view.k,
          .bits = kept_bits(view.bits, view.group),
          .group = view.group,
          .zero = view.codes.zero,
          .two_level = view.scales.factors.num_planes > 0,
          .has_minimums = view.minimums.data != nullptr,
          .data = data};
}

PackedWeight describe(const DenseView& view, uint8_t* data) {
  return {.kind = view.kind,
          .n = view.n,
          .k = view.k,
          .bits = 0,
          .group = 0,
          .zero = 0,
          .two_level = false,
          .has_minimums = false,
          .data = data};
}

size_t packed_bytes(const PackedWeight& weight) {
  const int64_t element = weight.kind == WeightKind::kF32 ? 4 : 2;
  const int64_t panel = weight.kind == WeightKind::kGrouped ? layout_of(weight).panel : weight.k * kPanel * element;
  return static_cast<size_t>(panels_of(weight.n) * panel);
}

void pack_panels(const GroupedView& view, PackedWeight* out, int64_t panel_begin, int64_t panel_end) {
  const GroupedLayout layout = layout_of(*out);
  const int64_t chunk = chunk_of(view, layout.block_columns), groups = layout.block_columns / view.group;
  const ScaleView* scales[2] = {&view.scales, &view.minimums};
  const int64_t kinds = out->has_minimums ? 2 : 1;
  const int64_t padded = (chunk + kUnit - 1) / kUnit * kUnit;  // a group of 16 may end it
  Gatherer codes(view.codes, chunk, padded);
  Gatherer factors[2] = {Gatherer(view.scales.factors, groups, groups), Gatherer(view.minimums.factors, groups, groups)};
  Step steps[8][2];
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t row = panel * kPanel, rows = std::min(kPanel, view.n - row);
    auto* to = const_cast<uint8_t*>(out->data) + panel * layout.panel;
    for (int64_t first = 0; first < view.k; first += chunk) {
      const uint8_t* gathered = codes.gather(row, rows, first);
      for (int64_t in_chunk = 0; in_chunk < chunk; in_chunk += layout.block_columns, to += layout.block) {
        const int64_t column = first + in_chunk, block = column / layout.block_columns;
        for (int64_t kind = 0; kind < kinds; ++kind) {
          if (out->two_level) {
            pack_halves(*scales[kind], row, rows, block, 1, to + kind * kPanel * 2);
            uint8_t* bytes = to + layout.factors + kind * groups * kPanel;
            pack_factors(*scales[kind], factors[kind], row, rows, block * groups, groups, bytes);
          } else {
            const int64_t first_group = column / view.group, count = std::min(groups, view.k / view.group - first_group);
            pack_halves(*scales[kind], row, rows, first_group, count, to + kind * groups * kPanel * 2);
          }
        }
        for (int64_t unit = 0; unit * kUnit < layout.block_columns; ++unit) {
          transpose_unit(gathered + in_chunk + unit * kUnit, padded, steps);
          put_unit(steps, out->bits, to + layout.header + unit * layout.unit);
        }
      }
    }
  }
}

void pack_panels(const DenseView& view, PackedWeight* out, int64_t panel_begin, int64_t panel_end) {
  auto* codes = const_cast<uint8_t*>(out->data);
  if (view.kind == WeightKind::kF32) {
    pack_dense<float>(view, codes, panel_begin, panel_end);
  } else {
    pack_dense<uint16_t>(view, codes, panel_begin, panel_end);
  }
}

}  // namespace octavo
