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
// Packing goes panel by panel: the codes of 32 whole rows, which lie one after the other in the file, are gathered into bytes
// [32][k], transposed in 4 x 4 words to steps, and their bits cut into planes. A plane's table (byte_of, shift_of) is cut into runs
// once a call, and a run goes through all blocks of a row with the vectors of the compiler (SSE2, NEON).
#include <algorithm>
#include <array>
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

// Elements first .. first + count of a block whose bits lie alike: in bytes in sequence with one shift, of which 16, 4 or 1 are
// moved at a time, or (8) in the bits of bytes in sequence, eight in each.
struct Run {
  int32_t first, count, byte, shift, width;
};

std::vector<Run> runs_of(const PlaneView& plane) {
  std::vector<Run> runs;
  const uint16_t* byte_of = plane.byte_of;
  const uint8_t* shift_of = plane.shift_of;
  for (int32_t e = 0; e < plane.block_len;) {
    const int32_t byte = byte_of[e], shift = shift_of[e];
    int32_t count = 1, bits = 0;
    while (plane.byte_stride == 1 && e + count < plane.block_len && byte_of[e + count] == byte + count &&
           shift_of[e + count] == shift) {
      ++count;
    }
    while (plane.bits == 1 && e + bits < plane.block_len && byte_of[e + bits] == byte + bits / 8 &&
           shift_of[e + bits] == bits % 8) {
      ++bits;
    }
    const int32_t width = bits >= 8 ? 8 : count >= 16 ? 16 : count >= 4 ? 4 : 1;
    runs.push_back({e, (width == 8 ? bits : count) / width * width, byte, shift, width});
    e += runs.back().count;
  }
  return runs;
}

template <typename Word>
Word filled(int32_t byte) {
  Word word;
  std::memset(&word, byte, sizeof word);
  return word;
}

// Adds a sequence's bits of some blocks of a row to their codes.
template <typename Word>
void add_sequence(const PlaneView& plane, const Run& run, const uint8_t* from, int64_t blocks, uint8_t* to) {
  const auto flips = filled<Word>(plane.flip), masks = filled<Word>((1 << plane.bits) - 1);
  const int64_t block_stride = plane.block_stride, block_len = plane.block_len;
  const int32_t count = run.count, shift = run.shift, lift = plane.lift;
  for (int64_t block = 0; block < blocks; ++block, from += block_stride, to += block_len) {
    for (int32_t i = 0; i < count; i += static_cast<int32_t>(sizeof(Word))) {
      const auto lifted = (((load_as<Word>(from + i) ^ flips) >> shift) & masks) << lift;
      const auto sum = static_cast<Word>(load_as<Word>(to + i) + lifted);
      std::memcpy(to + i, &sum, sizeof sum);
    }
  }
}

// The eight bits of a byte as eight bytes.
constexpr auto kEightBits = [] {
  std::array<uint64_t, 256> table{};
  for (uint64_t byte = 0; byte < 256; ++byte) {
    for (uint64_t bit = 0; bit < 8; ++bit) table[byte] |= (byte >> bit & 1) << (8 * bit);
  }
  return table;
}();

void add_bits(const PlaneView& plane, const Run& run, const uint8_t* from, int64_t blocks, uint8_t* to) {
  const int64_t block_stride = plane.block_stride, byte_stride = plane.byte_stride, block_len = plane.block_len;
  const int32_t bytes = run.count / 8, flip = plane.flip, lift = plane.lift;
  for (int64_t block = 0; block < blocks; ++block, from += block_stride, to += block_len) {
    for (int32_t i = 0; i < bytes; ++i) {
      const uint64_t sum = load_as<uint64_t>(to + 8 * i) + (kEightBits[from[i * byte_stride] ^ flip] << lift);
      std::memcpy(to + 8 * i, &sum, sizeof sum);
    }
  }
}

// Codes of 32 rows, gathered from their planes.
class Gatherer {
 public:
  Gatherer(const CodesView& view, int64_t columns)
      : view_(view), columns_(columns), stride_(((columns / 64 + 1) | 1) * 64), codes_(static_cast<size_t>(kPanel * stride_)) {
    for (int32_t i = 0; i < view.num_planes; ++i) runs_[i] = runs_of(view.planes[i]);
  }

  // Rows row to row + rows; the others, and what follows the last column, are 0.
  void gather(int64_t row, int64_t rows) {
    std::memset(codes_.data(), 0, codes_.size());
    for (int64_t c = 0; c < rows; ++c) {
      for (int32_t i = 0; i < view_.num_planes; ++i) {
        const PlaneView& plane = view_.planes[i];
        for (const Run& run : runs_[i]) {
          const uint8_t* from = plane.data + (row + c) * plane.row_stride + run.byte * plane.byte_stride;
          add(plane, run, from, codes_.data() + c * stride_ + run.first);
        }
      }
    }
  }

  const uint8_t* codes() const { return codes_.data(); }
  int64_t stride() const { return stride_; }

 private:
  void add(const PlaneView& plane, const Run& run, const uint8_t* from, uint8_t* to) const {
    const int64_t blocks = columns_ / plane.block_len;
    switch (run.width) {
      case 16: return add_sequence<Halves>(plane, run, from, blocks, to);
      case 4: return add_sequence<uint32_t>(plane, run, from, blocks, to);
      case 1: return add_sequence<uint8_t>(plane, run, from, blocks, to);
    }
    add_bits(plane, run, from, blocks, to);
  }

  const CodesView& view_;
  const int64_t columns_, stride_;  // an odd number of lines: rows do not fall onto the same ones of a cache
  std::vector<Run> runs_[3];
  std::vector<uint8_t> codes_;
};

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

// One float16 a step of a row, [count][32], from [rows][steps] of the file.
void pack_halves(const ScaleView& view, int64_t row, int64_t rows, int64_t first, int64_t count, uint8_t* out) {
  const uint8_t* from = view.data + row * view.row_stride + first * view.step_stride;
  for (int64_t g = 0; g < count; ++g, from += view.step_stride, out += kPanel * 2) {
    for (int64_t c = 0; c < rows; ++c) std::memcpy(out + 2 * c, from + c * view.row_stride, 2);
  }
}

// Factors of a block, [groups][32] int8, from codes[32][stride].
void pack_factors(const ScaleView& view, const uint8_t* codes, int64_t stride, int64_t rows, int64_t groups, uint8_t* out) {
  for (int64_t g = 0; g < groups; ++g, out += kPanel) {
    for (int64_t c = 0; c < rows; ++c) {
      const int32_t factor = codes[c * stride + g] - view.factors.zero;
      out[c] = static_cast<uint8_t>(view.is_negated ? -factor : factor);
    }
  }
}

// A line of a cache from each row at a time; the columns past the last row stay zero.
template <typename T>
void pack_dense(const DenseView& view, uint8_t* out, int64_t panel_begin, int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t rows = std::min(kPanel, view.n - panel * kPanel);
    constexpr int64_t kTile = 64 / sizeof(T);
    const uint8_t* from = view.data + panel * kPanel * view.row_stride;
    T* to = reinterpret_cast<T*>(out) + panel * kPanel * view.k;
    for (int64_t first = 0; first < view.k; first += kTile) {
      const int64_t end = std::min(view.k, first + kTile);
      for (int64_t c = 0; c < rows; ++c) {
        const uint8_t* row = from + c * view.row_stride;
        for (int64_t j = first; j < end; ++j) to[j * kPanel + c] = load_as<T>(row + j * static_cast<int64_t>(sizeof(T)));
      }
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
  const int64_t groups = layout.block_columns / view.group, all_groups = view.k / view.group;
  const ScaleView* scales[2] = {&view.scales, &view.minimums};
  const int64_t kinds = out->has_minimums ? 2 : 1;
  Gatherer codes(view.codes, view.k);
  Gatherer factors[2] = {Gatherer(view.scales.factors, all_groups), Gatherer(view.minimums.factors, all_groups)};
  Step steps[8][2];
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t row = panel * kPanel, rows = std::min(kPanel, view.n - row);
    auto* to = const_cast<uint8_t*>(out->data) + panel * layout.panel;
    codes.gather(row, rows);
    for (int64_t kind = 0; out->two_level && kind < kinds; ++kind) factors[kind].gather(row, rows);
    for (int64_t column = 0; column < view.k; column += layout.block_columns, to += layout.block) {
      const int64_t group = column / view.group;
      for (int64_t kind = 0; kind < kinds; ++kind) {
        if (out->two_level) {
          pack_halves(*scales[kind], row, rows, column / layout.block_columns, 1, to + kind * kPanel * 2);
          pack_factors(*scales[kind], factors[kind].codes() + group, factors[kind].stride(), rows, groups,
                       to + layout.factors + kind * groups * kPanel);
        } else {
          const int64_t count = std::min(groups, all_groups - group);
          pack_halves(*scales[kind], row, rows, group, count, to + kind * groups * kPanel * 2);
        }
      }
      for (int64_t unit = 0; unit * kUnit < layout.block_columns; ++unit) {
        transpose_unit(codes.codes() + column + unit * kUnit, codes.stride(), steps);
        put_unit(steps, out->bits, to + layout.header + unit * layout.unit);
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
