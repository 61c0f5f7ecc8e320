// Vectors of 8 floats, and 8 words of packed operands, with AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "cpu/elements.h"

namespace disagg::cpu::DISAGG_ISA {
namespace {

using V = __m256;
constexpr int W = 8;
// 8 sums, 2 operands and what products of bf16 pairs need fit the 16 registers.
constexpr int kMaxRows = 4;
constexpr int kTileVecs = 2;

inline V vzero() { return _mm256_setzero_ps(); }
inline V vset1(float x) { return _mm256_set1_ps(x); }
inline V vadd(V a, V b) { return _mm256_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V vround(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for a whole n in [-126, 128].
inline V vscale2(V x, V n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
// 0 where x < limit, else y.
inline V vzero_below(V x, V limit, V y) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), y); }
// The first n lanes of x, `other` in the rest; 0 <= n <= W.
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V vfirst(V x, int n, V other) { return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(first(n))); }
inline float vsum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float vhighest(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline V vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V vload_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void vstore_n(float* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }

inline V widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
// Rounds to nearest, ties to even; a NaN stays one.
inline __m128i narrow(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(chosen, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline V vload(const BF16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void vstore(BF16* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
inline V vload_n(const BF16* p, int n) {
  BF16 buffer[W] = {};
  __builtin_memcpy(buffer, p, static_cast<std::size_t>(n) * 2);
  return vload(buffer);
}
inline void vstore_n(BF16* p, V v, int n) {
  BF16 buffer[W];
  vstore(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<std::size_t>(n) * 2);
}

// Words: bits that are never computed with, only moved and multiplied by vdot.
inline V wload(const std::uint32_t* p) {
  return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void wstore(std::uint32_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_castps_si256(v));
}
inline V wset1(const std::uint32_t* p) {
  std::uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
}

// sum + a b, of one float a word or of two bf16.
template <class T>
V vdot(V sum, V a, V b);
template <>
inline V vdot<float>(V sum, V a, V b) {
  return _mm256_fmadd_ps(a, b, sum);
}
template <>
inline V vdot<BF16>(V sum, V a, V b) {
  const auto low = [](V x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); };
  const V high_mask = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  sum = _mm256_fmadd_ps(low(a), low(b), sum);
  return _mm256_fmadd_ps(_mm256_and_ps(a, high_mask), _mm256_and_ps(b, high_mask), sum);
}

// Four words of each of rows[i] and rows[i + 4].
inline V wgather4(const std::uint32_t* const* rows, int i, std::int64_t at) {
  const auto quad = [&](int j) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + j] + at));
  };
  return _mm256_castsi256_ps(_mm256_set_m128i(quad(4), quad(0)));
}
// Transposes the 4 x 4 words in each 128-bit lane of v[0..3].
inline void wtranspose4(V (&v)[4]) {
  const V lo01 = _mm256_unpacklo_ps(v[0], v[1]), hi01 = _mm256_unpackhi_ps(v[0], v[1]);
  const V lo23 = _mm256_unpacklo_ps(v[2], v[3]), hi23 = _mm256_unpackhi_ps(v[2], v[3]);
  const auto d = [](V x) { return _mm256_castps_pd(x); };
  v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(d(lo01), d(lo23)));
  v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(d(lo01), d(lo23)));
  v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(d(hi01), d(hi23)));
  v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(d(hi01), d(hi23)));
}
// Words of pairs (a[i], b[i]), W of them.
inline V winterleave(const BF16* a, const BF16* b) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  return _mm256_castsi256_ps(_mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high)));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
}  // namespace disagg::cpu::DISAGG_ISA
