// Sixteen lanes of float32 or int32, the same bits on every instruction set: every kernel is written once over this
// file.
//
// A kernel file is compiled once an instruction set, with one of OCTAVO_ISA_AVX512, OCTAVO_ISA_AVXVNNI, OCTAVO_ISA_AVX2 or
// neither (scalar: also ARM64) defined, and puts its functions in namespace octavo::OCTAVO_NS. AVX-VNNI is AVX2 with 8-bit dot
// products: linear.cpp alone is compiled for it. Rules that keep the bits equal:
//   - an FMA is written fma(a, b, c) and nothing else becomes one (-ffp-contract=off);
//   - horizontal sums add in one order: lane i + lane i+8, then i+4, then i+2, then i+1;
//   - max, min and comparisons have the semantics of SSE: max(a, b) is a > b ? a : b, so b when either is NaN;
//   - exp is the polynomial below, not the C library's.
// Rules that keep an object file from exporting code to its neighbours (an AVX-512 copy of an inline function could be
// chosen by the linker for all): everything is static and always inlined, types have no members but data, and no
// header of the C++ library with templates is included by a kernel file.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(OCTAVO_ISA_AVXVNNI)
#define OCTAVO_ISA_AVX2 1
#endif

#if defined(OCTAVO_ISA_AVX512) || defined(OCTAVO_ISA_AVX2)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // GCC 12 takes the undefined operands inside its own intrinsics for ours
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(OCTAVO_ISA_AVX512)
#define OCTAVO_NS avx512
#elif defined(OCTAVO_ISA_AVXVNNI)
#define OCTAVO_NS avxvnni
#elif defined(OCTAVO_ISA_AVX2)
#define OCTAVO_NS avx2
#else
#define OCTAVO_NS scalar
#endif

#define OCTAVO_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace octavo {
namespace OCTAVO_NS {

constexpr int kLanes = 16;

// ---- the types ---------------------------------------------------------------------------------------------------

#if defined(OCTAVO_ISA_AVX512)
struct f32x16 {
  __m512 v;
};
struct i32x16 {
  __m512i v;
};
struct u8x64 {
  __m512i v;
};  // 16 lanes of four bytes
#elif defined(OCTAVO_ISA_AVX2)
struct f32x16 {
  __m256 lo, hi;
};
struct i32x16 {
  __m256i lo, hi;
};
struct u8x64 {
  __m256i lo, hi;
};
#else
struct f32x16 {
  float v[16];
};
struct i32x16 {
  int32_t v[16];
};
struct u8x64 {
  uint8_t v[64];
};
#endif

// ---- scalars -----------------------------------------------------------------------------------------------------

OCTAVO_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

OCTAVO_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

OCTAVO_INLINE float bf16_to_f32(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }

// float16 to float32, exact; a signalling NaN becomes quiet, as in hardware.
OCTAVO_INLINE float f16_to_f32(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 value;
  memcpy(&value, &h, sizeof value);
  return static_cast<float>(value);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  if ((h & 0x7c00u) == 0x7c00u) {
    const uint32_t quiet = (h & 0x3ffu) != 0 ? 0x00400000u : 0u;
    return float_of_bits(sign | 0x7f800000u | magnitude | quiet);
  }
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 0x1p112f));
#endif
}

// float32 to float16, to nearest even, overflow to infinity, subnormals kept.
OCTAVO_INLINE uint16_t f32_to_f16(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 value = static_cast<__fp16>(x);
  uint16_t h;
  memcpy(&h, &value, sizeof h);
  return h;
#else
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2**-14: the last place of 0.5f is float16's smallest step
    h = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
#endif
}

// ---- float lanes -------------------------------------------------------------------------------------------------
// set1, load, store (unaligned), load_partial (lanes n and up are 0), store_partial, load_f16, store_f16, load_bf16,
// load_i8, + - * /, fma(a, b, c) = a * b + c rounded once, max, min, abs, sqrt, select_gt(a, b, x, y) = a > b ? x : y,
// to_f32 of int lanes, bits_of and f32_of_bits.

#if defined(OCTAVO_ISA_AVX512)

OCTAVO_INLINE f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
OCTAVO_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
OCTAVO_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
OCTAVO_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
OCTAVO_INLINE f32x16 load_partial(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
OCTAVO_INLINE void store_partial(float* p, f32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
OCTAVO_INLINE f32x16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
OCTAVO_INLINE void store_f16(uint16_t* p, f32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
OCTAVO_INLINE f32x16 load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
OCTAVO_INLINE f32x16 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
OCTAVO_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
OCTAVO_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
OCTAVO_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
OCTAVO_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
OCTAVO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OCTAVO_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
OCTAVO_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
OCTAVO_INLINE f32x16 sqrt(f32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
OCTAVO_INLINE f32x16 select_gt(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}

OCTAVO_INLINE i32x16 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
OCTAVO_INLINE i32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
OCTAVO_INLINE void store_i32(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
OCTAVO_INLINE i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
OCTAVO_INLINE i32x16 operator-(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
OCTAVO_INLINE i32x16 operator&(i32x16 a, i32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
OCTAVO_INLINE i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
OCTAVO_INLINE i32x16 shift_left(i32x16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
OCTAVO_INLINE f32x16 to_f32(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
OCTAVO_INLINE i32x16 bits_of(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
OCTAVO_INLINE f32x16 f32_of_bits(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
// The low byte of every lane.
OCTAVO_INLINE void store_low_bytes(int8_t* p, i32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

#elif defined(OCTAVO_ISA_AVX2)

OCTAVO_INLINE f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OCTAVO_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OCTAVO_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
OCTAVO_INLINE f32x16 load_partial(const float* p, int64_t n) {
  float lanes[16] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
  return load(lanes);
}
OCTAVO_INLINE void store_partial(float* p, f32x16 a, int64_t n) {
  float lanes[16];
  store(lanes, a);
  memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
}
OCTAVO_INLINE f32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
OCTAVO_INLINE void store_f16(uint16_t* p, f32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
OCTAVO_INLINE __m256 load_bf16x8(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
OCTAVO_INLINE f32x16 load_bf16(const uint16_t* p) { return {load_bf16x8(p), load_bf16x8(p + 8)}; }
OCTAVO_INLINE __m256 load_i8x8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
OCTAVO_INLINE f32x16 load_i8(const int8_t* p) { return {load_i8x8(p), load_i8x8(p + 8)}; }
OCTAVO_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
OCTAVO_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
OCTAVO_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
OCTAVO_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
OCTAVO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
OCTAVO_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
OCTAVO_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
OCTAVO_INLINE f32x16 sqrt(f32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
OCTAVO_INLINE f32x16 select_gt(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}

OCTAVO_INLINE i32x16 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OCTAVO_INLINE i32x16 load_i32(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
OCTAVO_INLINE void store_i32(int32_t* p, i32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
OCTAVO_INLINE i32x16 operator+(i32x16 a, i32x16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
OCTAVO_INLINE i32x16 operator-(i32x16 a, i32x16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
OCTAVO_INLINE i32x16 operator&(i32x16 a, i32x16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
OCTAVO_INLINE i32x16 max(i32x16 a, i32x16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
template <int kBits>
OCTAVO_INLINE i32x16 shift_left(i32x16 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
OCTAVO_INLINE f32x16 to_f32(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
OCTAVO_INLINE i32x16 bits_of(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
OCTAVO_INLINE f32x16 f32_of_bits(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
// The low byte of every lane.
OCTAVO_INLINE void store_low_bytes(int8_t* p, i32x16 a) {
  const __m256i pick = _mm256_set1_epi32(0xff);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, pick), _mm256_and_si256(a.hi, pick));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#else

// A loop, so that GCC makes vectors of it where it can and does not write it out sixteen times where it cannot.
#define OCTAVO_EACH(n) _Pragma("GCC unroll 1") for (int i = 0; i < n; ++i)
#define OCTAVO_LANES(type, expression)        \
  type result;                                \
  OCTAVO_EACH(16) result.v[i] = (expression); \
  return result

OCTAVO_INLINE f32x16 set1(float x) { OCTAVO_LANES(f32x16, x); }
OCTAVO_INLINE f32x16 load(const float* p) { OCTAVO_LANES(f32x16, p[i]); }
OCTAVO_INLINE void store(float* p, f32x16 a) { memcpy(p, a.v, sizeof a.v); }
OCTAVO_INLINE f32x16 load_partial(const float* p, int64_t n) { OCTAVO_LANES(f32x16, i < n ? p[i] : 0.0f); }
OCTAVO_INLINE void store_partial(float* p, f32x16 a, int64_t n) {
  memcpy(p, a.v, static_cast<size_t>(n) * sizeof(float));
}
OCTAVO_INLINE f32x16 load_f16(const uint16_t* p) { OCTAVO_LANES(f32x16, f16_to_f32(p[i])); }
OCTAVO_INLINE void store_f16(uint16_t* p, f32x16 a) { OCTAVO_EACH(16) p[i] = f32_to_f16(a.v[i]); }
OCTAVO_INLINE f32x16 load_bf16(const uint16_t* p) { OCTAVO_LANES(f32x16, bf16_to_f32(p[i])); }
OCTAVO_INLINE f32x16 load_i8(const int8_t* p) { OCTAVO_LANES(f32x16, static_cast<float>(p[i])); }
OCTAVO_INLINE f32x16 operator+(f32x16 a, f32x16 b) { OCTAVO_LANES(f32x16, a.v[i] + b.v[i]); }
OCTAVO_INLINE f32x16 operator-(f32x16 a, f32x16 b) { OCTAVO_LANES(f32x16, a.v[i] - b.v[i]); }
OCTAVO_INLINE f32x16 operator*(f32x16 a, f32x16 b) { OCTAVO_LANES(f32x16, a.v[i] * b.v[i]); }
OCTAVO_INLINE f32x16 operator/(f32x16 a, f32x16 b) { OCTAVO_LANES(f32x16, a.v[i] / b.v[i]); }
OCTAVO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { OCTAVO_LANES(f32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
OCTAVO_INLINE f32x16 max(f32x16 a, f32x16 b) { OCTAVO_LANES(f32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
OCTAVO_INLINE f32x16 min(f32x16 a, f32x16 b) { OCTAVO_LANES(f32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
OCTAVO_INLINE f32x16 sqrt(f32x16 a) { OCTAVO_LANES(f32x16, __builtin_sqrtf(a.v[i])); }
OCTAVO_INLINE f32x16 select_gt(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  OCTAVO_LANES(f32x16, a.v[i] > b.v[i] ? x.v[i] : y.v[i]);
}

// Integer lanes wrap around, as in hardware: the sums go through uint32.
OCTAVO_INLINE int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
OCTAVO_INLINE uint32_t unwrap(int32_t x) { return static_cast<uint32_t>(x); }
OCTAVO_INLINE i32x16 set1_i32(int32_t x) { OCTAVO_LANES(i32x16, x); }
OCTAVO_INLINE i32x16 load_i32(const int32_t* p) { OCTAVO_LANES(i32x16, p[i]); }
OCTAVO_INLINE void store_i32(int32_t* p, i32x16 a) { memcpy(p, a.v, sizeof a.v); }
OCTAVO_INLINE i32x16 operator+(i32x16 a, i32x16 b) { OCTAVO_LANES(i32x16, wrap(unwrap(a.v[i]) + unwrap(b.v[i]))); }
OCTAVO_INLINE i32x16 operator-(i32x16 a, i32x16 b) { OCTAVO_LANES(i32x16, wrap(unwrap(a.v[i]) - unwrap(b.v[i]))); }
OCTAVO_INLINE i32x16 operator&(i32x16 a, i32x16 b) { OCTAVO_LANES(i32x16, a.v[i] & b.v[i]); }
OCTAVO_INLINE i32x16 max(i32x16 a, i32x16 b) { OCTAVO_LANES(i32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <int kBits>
OCTAVO_INLINE i32x16 shift_left(i32x16 a) {
  OCTAVO_LANES(i32x16, wrap(unwrap(a.v[i]) << kBits));
}
OCTAVO_INLINE f32x16 to_f32(i32x16 a) { OCTAVO_LANES(f32x16, static_cast<float>(a.v[i])); }
OCTAVO_INLINE i32x16 bits_of(f32x16 a) { OCTAVO_LANES(i32x16, wrap(bits_of_float(a.v[i]))); }
OCTAVO_INLINE f32x16 f32_of_bits(i32x16 a) { OCTAVO_LANES(f32x16, float_of_bits(unwrap(a.v[i]))); }
// The low byte of every lane.
OCTAVO_INLINE void store_low_bytes(int8_t* p, i32x16 a) {
  OCTAVO_EACH(16) p[i] = static_cast<int8_t>(unwrap(a.v[i]) & 0xffu);
}

#endif

// ---- written once over the above ----------------------------------------------------------------------------------

// hsum: the sum of the lanes, i + i+8, i + i+4, i + i+2, i + i+1. hmax: the greatest (max as above, same order).
// hmax_i32 is exact in any order, and so is hsum_pairs: the sums of lanes i with i % 4 < 2 and of the others.
#if defined(OCTAVO_ISA_AVX512) || defined(OCTAVO_ISA_AVX2)

#if defined(OCTAVO_ISA_AVX512)
OCTAVO_INLINE __m256 low_half(f32x16 a) { return _mm512_castps512_ps256(a.v); }
OCTAVO_INLINE __m256 high_half(f32x16 a) { return _mm512_extractf32x8_ps(a.v, 1); }
OCTAVO_INLINE __m256i low_half(i32x16 a) { return _mm512_castsi512_si256(a.v); }
OCTAVO_INLINE __m256i high_half(i32x16 a) { return _mm512_extracti32x8_epi32(a.v, 1); }
#else
OCTAVO_INLINE __m256 low_half(f32x16 a) { return a.lo; }
OCTAVO_INLINE __m256 high_half(f32x16 a) { return a.hi; }
OCTAVO_INLINE __m256i low_half(i32x16 a) { return a.lo; }
OCTAVO_INLINE __m256i high_half(i32x16 a) { return a.hi; }
#endif
OCTAVO_INLINE float hsum(f32x16 a) {
  const __m256 v8 = _mm256_add_ps(low_half(a), high_half(a));
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}
OCTAVO_INLINE float hmax(f32x16 a) {
  const __m256 v8 = _mm256_max_ps(low_half(a), high_half(a));
  const __m128 v4 = _mm_max_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_max_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_max_ss(v2, _mm_movehdup_ps(v2)));
}
OCTAVO_INLINE void hsum_pairs(i32x16 a, int32_t (&out)[2]) {
  const __m256i v8 = _mm256_add_epi32(low_half(a), high_half(a));
  const __m128i v4 = _mm_add_epi32(_mm256_castsi256_si128(v8), _mm256_extracti128_si256(v8, 1));
  const __m128i pairs = _mm_add_epi32(v4, _mm_shuffle_epi32(v4, 0xb1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi32(pairs, 0x08));
}
OCTAVO_INLINE int32_t hmax_i32(i32x16 a) {
  const __m256i v8 = _mm256_max_epi32(low_half(a), high_half(a));
  const __m128i v4 = _mm_max_epi32(_mm256_castsi256_si128(v8), _mm256_extracti128_si256(v8, 1));
  const __m128i v2 = _mm_max_epi32(v4, _mm_shuffle_epi32(v4, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(v2, _mm_shuffle_epi32(v2, 0xb1)));
}

#else

#define OCTAVO_REDUCE(expression)                \
  for (int width = 8; width >= 1; width /= 2) {  \
    for (int i = 0; i < width; ++i) {            \
      const auto x = a.v[i], y = a.v[i + width]; \
      a.v[i] = (expression);                     \
    }                                            \
  }                                              \
  return a.v[0]

OCTAVO_INLINE float hsum(f32x16 a) { OCTAVO_REDUCE(x + y); }
OCTAVO_INLINE float hmax(f32x16 a) { OCTAVO_REDUCE(x > y ? x : y); }
OCTAVO_INLINE void hsum_pairs(i32x16 a, int32_t (&out)[2]) {
  out[0] = out[1] = 0;
  OCTAVO_EACH(16) out[i / 2 % 2] = wrap(unwrap(out[i / 2 % 2]) + unwrap(a.v[i]));
}
OCTAVO_INLINE int32_t hmax_i32(i32x16 a) { OCTAVO_REDUCE(x > y ? x : y); }

#endif

OCTAVO_INLINE f32x16 abs(f32x16 a) { return f32_of_bits(bits_of(a) & set1_i32(0x7fffffff)); }

// Adding this and looking at the low bits rounds |x| <= 2**21 to the nearest integer, ties to even.
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2**23, bits 0x4b400000

// Numbers rounded to int8 whose greatest magnitude is below this count as zeros: 127 / magnitude could overflow.
constexpr float kSmallestMaximum = 0x1p-120f;

// e**x within 1 unit in the last place (0.91 measured) for -87.3 <= x <= 88.72; 0 below, infinity above, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e**r is the series to r**7 / 7!, whose rest is below a float32 rounding there;
// 2**n is added to the exponent's bits.
OCTAVO_INLINE f32x16 exp(f32x16 x) {
  const f32x16 low = set1(-87.3365402f), high = set1(88.7228317f);
  const f32x16 clamped = min(max(x, low), high);
  const f32x16 shifted = fma(clamped, set1(1.44269504f), set1(kRoundMagic));
  const f32x16 n = shifted - set1(kRoundMagic);
  const f32x16 r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), clamped));
  f32x16 p = set1(1.98412698e-4f);
  p = fma(p, r, set1(1.38888889e-3f));
  p = fma(p, r, set1(8.33333333e-3f));
  p = fma(p, r, set1(4.16666667e-2f));
  p = fma(p, r, set1(1.66666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const f32x16 scaled = f32_of_bits(bits_of(p) + shift_left<23>(bits_of(shifted)));
  const f32x16 above = select_gt(x, high, set1(__builtin_inff()), scaled);
  const f32x16 below = select_gt(low, x, set1(0.0f), above);
  return select_gt(abs(x), set1(-1.0f), below, x);  // false for NaN alone
}

// tanh x within 2 units in the last place; NaN for NaN. Up to 0.625 an odd polynomial (fitted at Chebyshev points, relative
// error 2e-8), where 1 - 2 / (e**2|x| + 1) would cancel.
OCTAVO_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 one = set1(1.0f), two = set1(2.0f), z = x * x, magnitude = abs(x);
  f32x16 p = set1(-6.10494759e-3f);
  p = fma(p, z, set1(2.10036408e-2f));
  p = fma(p, z, set1(-5.38524974e-2f));
  p = fma(p, z, set1(1.33327823e-1f));
  p = fma(p, z, set1(-3.33333291e-1f));
  const f32x16 small = fma(x * z, p, x);
  const f32x16 large = one - two / (exp(two * magnitude) + one);
  const f32x16 with_sign = select_gt(set1(0.0f), x, set1(0.0f) - large, large);
  return select_gt(set1(0.625f), magnitude, small, with_sign);
}

}  // namespace OCTAVO_NS
}  // namespace octavo
