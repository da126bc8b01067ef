// Elementwise operators: silu(gate) * up, gelu(gate) * up, the sum of two values, a value times a number.
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {
namespace {

// x times the logistic function of y.
OCTAVO_INLINE f32x16 gated(f32x16 x, f32x16 y) { return x / (set1(1.0f) + exp(set1(0.0f) - y)); }

OCTAVO_INLINE f32x16 silu(f32x16 x) { return gated(x, x); }

// 2 sqrt(2 / pi) (x + 0.044715 x**3) = x (a + b x**2)
OCTAVO_INLINE f32x16 gelu(f32x16 x) { return gated(x, x * fma(x * x, set1(0.0713548163f), set1(1.59576912f))); }

template <f32x16 (*kActivation)(f32x16)>
OCTAVO_INLINE void activate_mul(const float* gate, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, kActivation(load(gate + i)) * load(up + i));
  if (i < count) {
    const int64_t left = count - i;
    store_partial(out + i, kActivation(load_partial(gate + i, left)) * load_partial(up + i, left), left);
  }
}

}  // namespace

void silu_mul(const float* gate, const float* up, int64_t count, float* out) { activate_mul<silu>(gate, up, count, out); }

void gelu_mul(const float* gate, const float* up, int64_t count, float* out) { activate_mul<gelu>(gate, up, count, out); }

void scale(float* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] * factor;
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
