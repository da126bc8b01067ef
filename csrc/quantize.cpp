// Rows of float32 rounded to int8 a group of 16 or 32 columns, the left operand of grouped weights (graph/ops.py,
// Linear).
//
// For each group: scale = max|x| / 127, code = round-half-even(x * (127 / max|x|)), the sum of the codes in two halves (AVX2
// wants them: dot.h), and scale * sum. A first pass over sixteen groups finds the maxima, the divisions then take sixteen
// groups at once, a second pass rounds: x is in L1 by then. max|x| is taken over the bits of |x| as integers, which order like
// the numbers and put NaN above infinity, so a NaN in the group makes its scale NaN, and infinity makes the scale infinite with
// all codes 0: either way the products come out NaN. A group whose max|x| is below 2**-120, where 127 / max|x| could overflow,
// counts as zeros: scale 0, codes 0. Rounding adds 1.5 * 2**23 and takes the low byte, exact for |x| <= 127.
#include "kernel_functions.h"
#include "simd.h"

namespace octavo {
namespace OCTAVO_NS {

namespace {

template <int kVectors>  // a group is kVectors * 16 columns
void quantize_groups(const float* x, int64_t groups, int64_t row, const QuantizedRows& out) {
  constexpr int64_t kGroup = kVectors * kLanes;
  int32_t maxima[kLanes];
  float inverses[kLanes], scales[kLanes];
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int64_t count = groups - first < kLanes ? groups - first : kLanes;
    for (int64_t g = 0; g < kLanes; ++g) maxima[g] = 0;
    for (int64_t g = 0; g < count; ++g) {
      const float* p = x + (first + g) * kGroup;
      i32x16 greatest = bits_of(abs(load(p)));
      for (int v = 1; v < kVectors; ++v) greatest = max(greatest, bits_of(abs(load(p + v * kLanes))));
      maxima[g] = hmax_i32(greatest);
    }
    const f32x16 maximum = f32_of_bits(load_i32(maxima)), zero = set1(0.0f);
    store(inverses, select_gt(set1(kSmallestMaximum), maximum, zero, set1(127.0f) / maximum));
    store(scales, select_gt(set1(kSmallestMaximum), maximum, zero, maximum / set1(127.0f)));
    for (int64_t g = 0; g < count; ++g) {
      const int64_t at = (first + g) * out.stride + row;
      const f32x16 inverse = set1(inverses[g]), magic = set1(kRoundMagic);
      i32x16 sum = set1_i32(0);
      for (int v = 0; v < kVectors; ++v) {
        const i32x16 rounded = bits_of(load(x + (first + g) * kGroup + v * kLanes) * inverse + magic);
        store_low_bytes(out.codes + at * kGroup + v * kLanes, rounded);
        sum = sum + ((rounded + set1_i32(128)) & set1_i32(255));  // code + 128, also of what was NaN
      }
      int32_t pair[2];
      hsum_pairs(sum, pair);
      for (int i = 0; i < 2; ++i) pair[i] -= 64 * static_cast<int32_t>(kGroup);
      out.scales[at] = scales[g];
      out.sums[2 * at] = static_cast<int16_t>(pair[0]);
      out.sums[2 * at + 1] = static_cast<int16_t>(pair[1]);
      out.scaled_sums[at] = scales[g] * static_cast<float>(pair[0] + pair[1]);
    }
  }
}

}  // namespace

void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t k, int32_t group, int64_t first_row,
                   const QuantizedRows& out) {
  for (int64_t row = 0; row < rows; ++row) {
    if (group == 32) {
      quantize_groups<2>(x + row * x_stride, k / group, first_row + row, out);
    } else {
      quantize_groups<1>(x + row * x_stride, k / group, first_row + row, out);
    }
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
