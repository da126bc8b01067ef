// Elementwise operators: silu(gate) * up, and the sum of two values.
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {
namespace {

OCTAVO_INLINE f32x16 silu(f32x16 x) { return x / (set1(1.0f) + exp(set1(0.0f) - x)); }

}  // namespace

void silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i < count) {
    const int64_t left = count - i;
    store_partial(out + i, silu(load_partial(gate + i, left)) * load_partial(up + i, left), left);
  }
}

void add(const float* a, const float* b, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, load(a + i) + load(b + i));
  if (i < count) {
    const int64_t left = count - i;
    store_partial(out + i, load_partial(a + i, left) + load_partial(b + i, left), left);
  }
}

}  // namespace OCTAVO_NS
}  // namespace octavo
