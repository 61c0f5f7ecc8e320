// Vectors of 4 floats in the compiler's own terms: any processor, no intrinsics. Made to be right.
#pragma once

#include "cpu/elements.h"

namespace disagg::cpu::DISAGG_ISA {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef std::int32_t I __attribute__((vector_size(16)));
typedef std::uint32_t U __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kMaxRows = 4;
constexpr int kTileVecs = 2;

inline V vset1(float x) { return V{x, x, x, x}; }
inline V vzero() { return vset1(0.0f); }
inline V vadd(V a, V b) { return a + b; }
inline V vsub(V a, V b) { return a - b; }
inline V vmul(V a, V b) { return a * b; }
inline V vdiv(V a, V b) { return a / b; }
inline V vmax(V a, V b) { return a > b ? a : b; }
inline V vmin(V a, V b) { return a < b ? a : b; }
inline V vfma(V a, V b, V c) { return a * b + c; }
// Adding 1.5 * 2^23 leaves no fraction bits, so the addition rounds. Requires: |a| < 2^22.
inline V vround(V a) {
  const V magic = vset1(12582912.0f);
  return (a + magic) - magic;
}
// x 2^n for a whole n in [-126, 128].
inline V vscale2(V x, V n) { return x * (V)((__builtin_convertvector(n, I) + 127) << 23); }
// 0 where x < limit, else y.
inline V vzero_below(V x, V limit, V y) { return (V)(~(x < limit) & (I)y); }
// The first n lanes of x, `other` in the rest; 0 <= n <= W.
inline V vfirst(V x, int n, V other) { return (I{0, 1, 2, 3} < n) ? x : other; }
inline float vsum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float vhighest(V a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

inline V vload_n(const float* p, int n) {
  V v = vzero();
  __builtin_memcpy(&v, p, static_cast<std::size_t>(n) * 4);
  return v;
}
inline void vstore_n(float* p, V v, int n) { __builtin_memcpy(p, &v, static_cast<std::size_t>(n) * 4); }
inline V vload(const float* p) { return vload_n(p, W); }
inline void vstore(float* p, V v) { vstore_n(p, v, W); }

inline V vload_n(const BF16* p, int n) {
  V v = vzero();
  for (int i = 0; i < n; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p[i].bits) << 16;
    __builtin_memcpy(reinterpret_cast<char*>(&v) + 4 * i, &bits, 4);
  }
  return v;
}
// Rounds to nearest, ties to even; a NaN stays one.
inline void vstore_n(BF16* p, V v, int n) {
  for (int i = 0; i < n; ++i) {
    const float x = v[i];
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = x != x ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    p[i].bits = static_cast<std::uint16_t>(bits >> 16);
  }
}
inline V vload(const BF16* p) { return vload_n(p, W); }
inline void vstore(BF16* p, V v) { vstore_n(p, v, W); }

// Words: bits that are never computed with, only moved and multiplied by vdot.
inline V wload(const std::uint32_t* p) {
  V v;
  __builtin_memcpy(&v, p, 16);
  return v;
}
inline void wstore(std::uint32_t* p, V v) { __builtin_memcpy(p, &v, 16); }
inline V wset1(const std::uint32_t* p) {
  std::uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return (V)U{word, word, word, word};
}

// sum + a b, of one float a word or of two bf16.
template <class T>
V vdot(V sum, V a, V b);
template <>
inline V vdot<float>(V sum, V a, V b) {
  return a * b + sum;
}
template <>
inline V vdot<BF16>(V sum, V a, V b) {
  const auto low = [](V x) { return (V)((U)x << 16); };
  const auto high = [](V x) { return (V)((U)x & 0xffff0000u); };
  return high(a) * high(b) + (low(a) * low(b) + sum);
}

// Four words of rows[i].
inline V wgather4(const std::uint32_t* const* rows, int i, std::int64_t at) { return wload(rows[i] + at); }
// Transposes 4 x 4 words.
inline void wtranspose4(V (&v)[4]) {
  const U a = (U)v[0], b = (U)v[1], c = (U)v[2], d = (U)v[3];
  for (int i = 0; i < 4; ++i) v[i] = (V)U{a[i], b[i], c[i], d[i]};
}
// Words of pairs (a[i], b[i]), W of them.
inline V winterleave(const BF16* a, const BF16* b) {
  U words;
  for (int i = 0; i < W; ++i) words[i] = a[i].bits | static_cast<std::uint32_t>(b[i].bits) << 16;
  return (V)words;
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace
}  // namespace disagg::cpu::DISAGG_ISA
