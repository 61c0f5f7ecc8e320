// Vectors of 16 floats, and 16 words of packed operands, with AVX-512 (bf16 products included).
#pragma once

#include <immintrin.h>

#include "cpu/elements.h"

namespace disagg::cpu::DISAGG_ISA {
namespace {

using V = __m512;
constexpr int W = 16;
// A register tile is kMaxRows rows of kTileVecs vectors: 24 sums, 2 operands, 6 registers to spare.
constexpr int kMaxRows = 12;
constexpr int kTileVecs = 2;

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline V vzero() { return _mm512_setzero_ps(); }
inline V vset1(float x) { return _mm512_set1_ps(x); }
inline V vadd(V a, V b) { return _mm512_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V vround(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for a whole n.
inline V vscale2(V x, V n) { return _mm512_scalef_ps(x, n); }
// 0 where x < limit, else y.
inline V vzero_below(V x, V limit, V y) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
}
// The first n lanes of x, `other` in the rest; 0 <= n <= W.
inline V vfirst(V x, int n, V other) { return _mm512_mask_mov_ps(other, first(n), x); }
inline float vsum(V a) { return _mm512_reduce_add_ps(a); }
inline float vhighest(V a) { return _mm512_reduce_max_ps(a); }

inline V vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V vload_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void vstore_n(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

inline V widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline V vload(const BF16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V vload_n(const BF16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline __m256i narrow(V v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline void vstore(BF16* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void vstore_n(BF16* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }

// Words: bits that are never computed with, only moved and multiplied by vdot.
inline V wload(const std::uint32_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
inline void wstore(std::uint32_t* p, V v) { _mm512_storeu_si512(p, _mm512_castps_si512(v)); }
inline V wset1(const std::uint32_t* p) {
  std::uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word)));
}

// sum + a b, of one float a word or of two bf16.
template <class T>
V vdot(V sum, V a, V b);
template <>
inline V vdot<float>(V sum, V a, V b) {
  return _mm512_fmadd_ps(a, b, sum);
}
template <>
inline V vdot<BF16>(V sum, V a, V b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

// Four words of each of rows[i], rows[i + 4], rows[i + 8] and rows[i + 12].
inline V wgather4(const std::uint32_t* const* rows, int i, std::int64_t at) {
  const auto quad = [&](int j) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + j] + at));
  };
  __m512i v = _mm512_castsi128_si512(quad(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, quad(4));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, quad(8));
  v = _mm512_mask_broadcast_i32x4(v, 0xf000, quad(12));
  return _mm512_castsi512_ps(v);
}
// Transposes the 4 x 4 words in each 128-bit lane of v[0..3].
inline void wtranspose4(V (&v)[4]) {
  const V lo01 = _mm512_unpacklo_ps(v[0], v[1]), hi01 = _mm512_unpackhi_ps(v[0], v[1]);
  const V lo23 = _mm512_unpacklo_ps(v[2], v[3]), hi23 = _mm512_unpackhi_ps(v[2], v[3]);
  const auto d = [](V x) { return _mm512_castps_pd(x); };
  v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(lo01), d(lo23)));
  v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(lo01), d(lo23)));
  v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(hi01), d(hi23)));
  v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(hi01), d(hi23)));
}
// Words of pairs (a[i], b[i]), W of them.
inline V winterleave(const BF16* a, const BF16* b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace disagg::cpu::DISAGG_ISA
