// Four bytes a lane over simd.h: sums of 8-bit products, the arithmetic of grouped weights (grouped.h).
//
// move_bits<from, to, mask>(a): the bits of every byte that lie at `from`, moved to `to`; broadcast_x4 puts the same four int8 x,
// within +-127, in every lane.
//
// The sum over a group of (code_w - zero) * code_x, exact: begin with start_sums(pair, centre), or no_sums() if the centre is 0,
// where `pair` holds the group's two sums of code_x, over k's 0 and 1 of four and over k's 2 and 3; take add_products for each
// step of four k's; last_sums gives int32, to which times_sum(pair, centre - zero) is to be added.
//
// VNNI adds to int32 at once: any centre will do. AVX2 keeps sums of codes of up to 6 bits in 16 bits, one for each half of the
// pair; whatever wraps around on the way, at the end the sum of (code_w - centre) * code_x fits, since for 16 k's (a group of
// 32; of 16 half of them) its magnitude is at most 16 * 15 * 127 with 4 bits and any centre, 16 * 16 * 127 = 32512 with 5 bits
// about 16, 8 * 32 * 127 with 6 bits, groups of 16, about 32. There codes of 8 bits are multiplied as words (kWords): a step has
// two parts, k's 0 and 2 of four and k's 1 and 3, and the rows are widened alike.
#pragma once

#include "simd.h"

namespace octavo {
namespace OCTAVO_NS {

#if defined(OCTAVO_ISA_AVX512)

OCTAVO_INLINE u8x64 load_u8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
OCTAVO_INLINE void store_u8(uint8_t* p, u8x64 a) { _mm512_storeu_si512(p, a.v); }
OCTAVO_INLINE u8x64 operator|(u8x64 a, u8x64 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kFrom, int kTo, int kMask>
OCTAVO_INLINE u8x64 move_bits(u8x64 a) {
  if constexpr (kFrom > kTo) a.v = _mm512_srli_epi16(a.v, kFrom - kTo);
  if constexpr (kFrom < kTo) a.v = _mm512_slli_epi16(a.v, kTo - kFrom);
  return {_mm512_and_si512(a.v, _mm512_set1_epi8(kMask << kTo))};
}
OCTAVO_INLINE u8x64 broadcast_x4(const void* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}
OCTAVO_INLINE i32x16 times_sum(const int16_t* pair, int32_t factor) {
  int32_t two;
  memcpy(&two, pair, sizeof two);
  return {_mm512_madd_epi16(_mm512_set1_epi32(two), _mm512_set1_epi16(static_cast<int16_t>(factor)))};
}
OCTAVO_INLINE i32x16 dot(i32x16 acc, u8x64 w, u8x64 x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }

#elif defined(OCTAVO_ISA_AVX2)

OCTAVO_INLINE u8x64 load_u8(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
OCTAVO_INLINE void store_u8(uint8_t* p, u8x64 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
OCTAVO_INLINE u8x64 operator|(u8x64 a, u8x64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int kFrom, int kTo, int kMask>
OCTAVO_INLINE u8x64 move_bits(u8x64 a) {
  if constexpr (kFrom > kTo) a = {_mm256_srli_epi16(a.lo, kFrom - kTo), _mm256_srli_epi16(a.hi, kFrom - kTo)};
  if constexpr (kFrom < kTo) a = {_mm256_slli_epi16(a.lo, kTo - kFrom), _mm256_slli_epi16(a.hi, kTo - kFrom)};
  __m256i mask = _mm256_set1_epi8(kMask << kTo);
  asm volatile("" : "+x"(mask));  // not kept in a register meanwhile: the sums need them all
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
OCTAVO_INLINE u8x64 broadcast_x4(const void* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  const __m256i all = _mm256_set1_epi32(four);
  return {all, all};
}
OCTAVO_INLINE __m256i broadcast_pair(const int16_t* pair) {
  int32_t two;
  memcpy(&two, pair, sizeof two);
  return _mm256_set1_epi32(two);
}
OCTAVO_INLINE i32x16 times_sum(const int16_t* pair, int32_t factor) {
  const __m256i product = _mm256_madd_epi16(broadcast_pair(pair), _mm256_set1_epi16(static_cast<int16_t>(factor)));
  return {product, product};
}
#if defined(OCTAVO_ISA_AVXVNNI)
OCTAVO_INLINE i32x16 dot(i32x16 acc, u8x64 w, u8x64 x) {
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, x.lo), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, x.hi)};
}
#endif

#else

OCTAVO_INLINE u8x64 load_u8(const uint8_t* p) {
  u8x64 result;
  memcpy(result.v, p, sizeof result.v);
  return result;
}
OCTAVO_INLINE u8x64 operator|(u8x64 a, u8x64 b) {
  OCTAVO_EACH(64) a.v[i] = static_cast<uint8_t>(a.v[i] | b.v[i]);
  return a;
}
template <int kFrom, int kTo, int kMask>
OCTAVO_INLINE u8x64 move_bits(u8x64 a) {
  OCTAVO_EACH(64) a.v[i] = static_cast<uint8_t>(((a.v[i] >> kFrom) & kMask) << kTo);
  return a;
}
OCTAVO_INLINE u8x64 broadcast_x4(const void* p) {
  u8x64 result;
  OCTAVO_EACH(64) result.v[i] = static_cast<const uint8_t*>(p)[i & 3];
  return result;
}
OCTAVO_INLINE i32x16 times_sum(const int16_t* pair, int32_t factor) { return set1_i32(factor * (pair[0] + pair[1])); }
OCTAVO_INLINE i32x16 dot(i32x16 acc, u8x64 w, u8x64 x) {
  OCTAVO_EACH(16) {
    int32_t sum = 0;
    for (int j = 0; j < 4; ++j) sum += w.v[4 * i + j] * static_cast<int8_t>(x.v[4 * i + j]);
    acc.v[i] = wrap(unwrap(acc.v[i]) + unwrap(sum));
  }
  return acc;
}
#endif

#if defined(OCTAVO_ISA_AVX2) && !defined(OCTAVO_ISA_AVXVNNI)

struct sums {
  __m256i lo, hi;  // 16 bits, 32 for codes of 8
};
template <int kBits>
constexpr bool kWords = kBits == 8;
template <bool kWords, int kPart>
OCTAVO_INLINE u8x64 part_of(u8x64 w) {
  if constexpr (!kWords) return w;
  if constexpr (kPart == 1) return {_mm256_srli_epi16(w.lo, 8), _mm256_srli_epi16(w.hi, 8)};
  const __m256i low = _mm256_set1_epi16(255);
  return {_mm256_and_si256(w.lo, low), _mm256_and_si256(w.hi, low)};
}
// kGroup codes to words: [2 parts][kGroup / 2].
template <int kGroup>
OCTAVO_INLINE void widen(const int8_t* x, int16_t* out) {
  if constexpr (kGroup == 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_srai_epi16(a, 8));
  } else {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_srai_epi16(_mm_slli_epi16(a, 8), 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_srai_epi16(a, 8));
  }
}
template <int kBits>
OCTAVO_INLINE int32_t centre_of(int32_t zero) {
  return kBits == 5 || kBits == 6 ? 1 << (kBits - 1) : zero;
}
template <bool kWords>
OCTAVO_INLINE sums start_sums(const int16_t* pair, int32_t centre) {
  if constexpr (kWords) {
    const i32x16 start = times_sum(pair, -centre);
    return {start.lo, start.hi};
  }
  const __m256i start = _mm256_mullo_epi16(broadcast_pair(pair), _mm256_set1_epi16(static_cast<int16_t>(-centre)));
  return {start, start};
}
OCTAVO_INLINE sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// Two instructions at once and in place: left to itself GCC puts sums off and keeps dozens of products in memory.
template <bool kWords>
OCTAVO_INLINE __m256i add_products(__m256i acc, __m256i w, __m256i x) {
  __m256i product;
  if constexpr (kWords) {
    asm("vpmaddwd %[x], %[w], %[product]\n\tvpaddd %[product], %[acc], %[acc]"
        : [acc] "+x"(acc), [product] "=&x"(product)
        : [w] "x"(w), [x] "x"(x));
  } else {
    asm("vpmaddubsw %[x], %[w], %[product]\n\tvpaddw %[product], %[acc], %[acc]"
        : [acc] "+x"(acc), [product] "=&x"(product)
        : [w] "x"(w), [x] "x"(x));
  }
  return acc;
}
template <bool kWords>
OCTAVO_INLINE sums add_products(sums acc, u8x64 w, u8x64 x) {
  return {add_products<kWords>(acc.lo, w.lo, x.lo), add_products<kWords>(acc.hi, w.hi, x.hi)};
}
template <bool kWords>
OCTAVO_INLINE i32x16 last_sums(sums acc) {
  if constexpr (kWords) return {acc.lo, acc.hi};
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(acc.lo, ones), _mm256_madd_epi16(acc.hi, ones)};
}

#else

using sums = i32x16;
template <int kBits>
constexpr bool kWords = false;
template <bool kWords, int kPart>
OCTAVO_INLINE u8x64 part_of(u8x64 w) {
  return w;
}
template <int kBits>
OCTAVO_INLINE int32_t centre_of(int32_t zero) {
  return zero;
}
template <bool kWords>
OCTAVO_INLINE sums start_sums(const int16_t* pair, int32_t centre) {
  return times_sum(pair, -centre);
}
OCTAVO_INLINE sums no_sums() { return set1_i32(0); }
template <bool kWords>
OCTAVO_INLINE sums add_products(sums acc, u8x64 w, u8x64 x) {
  return dot(acc, w, x);
}
template <bool kWords>
OCTAVO_INLINE i32x16 last_sums(sums acc) {
  return acc;
}
#endif

}  // namespace OCTAVO_NS
}  // namespace octavo
