// RMSNorm of rows (graph/ops.py, RmsNorm): sum of squares in four vector accumulators over the features, added in one fixed
// order, then one pass that scales. A row of a few thousand features lies in L1 between the passes.
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t features, float* out) {
  const int64_t whole = features / 64 * 64;
  for (int64_t row = 0; row < rows; ++row, x += features, out += features) {
    f32x16 sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    int64_t i = 0;
    for (; i < whole; i += 64) {
      for (int j = 0; j < 4; ++j) {
        const f32x16 value = load(x + i + 16 * j);
        sums[j] = fma(value, value, sums[j]);
      }
    }
    for (int j = 0; i < features; i += 16, ++j) {
      const int64_t left = features - i;
      const f32x16 value = left >= 16 ? load(x + i) : load_partial(x + i, left);
      sums[j] = fma(value, value, sums[j]);
    }
    const float mean = hsum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(features);
    const f32x16 factor = set1(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i + 16 <= features; i += 16) store(out + i, load(x + i) * factor * load(weight + i));
    if (i < features) {
      const int64_t left = features - i;
      store_partial(out + i, load_partial(x + i, left) * factor * load_partial(weight + i, left), left);
    }
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
