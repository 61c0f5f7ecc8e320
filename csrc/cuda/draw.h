// The arithmetic of drawing a token, for the device and, tested, for the host.
//
// The noise is that of disagg/engine/draws.py: a hash of the token's id and the draw's key.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DISAGG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DISAGG_HOST_DEVICE inline
#endif

namespace disagg::cuda {

// Lower temperatures are greedy: dividing by them would overflow.
inline constexpr float kGreedyBelow = 1e-5f;
inline constexpr std::uint32_t kTokenFactor = 0x9E3779B1u;

inline constexpr std::uint32_t kLastFactor = 0xC2B2AE35u;

DISAGG_HOST_DEVICE std::uint32_t noise_before_last(std::uint32_t start, std::uint32_t key_upper) {
  std::uint32_t x = start;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x = (x ^ (x >> 16)) + key_upper;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  return x ^ (x >> 13);
}

// 31 random bits of a token. `start` is `token * kTokenFactor + the key's lower half`.
DISAGG_HOST_DEVICE std::uint32_t noise_bits(std::uint32_t start, std::uint32_t key_upper) {
  const std::uint32_t x = noise_before_last(start, key_upper) * kLastFactor;
  return (x ^ (x >> 16)) & 0x7FFFFFFFu;
}

// The upper 15 of those, in the upper 15 here; below is anything. The last step leaves them as they are.
DISAGG_HOST_DEVICE std::uint32_t noise_top(std::uint32_t start, std::uint32_t key_upper) {
  return noise_before_last(start, key_upper) * (2 * kLastFactor);
}

// `noise_top` is below this for all whose bits are below `bits` or equal.
DISAGG_HOST_DEVICE std::uint32_t top_limit(std::uint32_t bits) {
  return bits >= 0x7FFF0000u ? ~0u : ((bits >> 16) + 1) << 17;
}

// The logarithm of the exponential noise that the bits make.
DISAGG_HOST_DEVICE float log_exponential(std::uint32_t bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-31f;
  return logf(-log1pf(-u));
}

DISAGG_HOST_DEVICE std::uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<std::uint32_t>(x);
#endif
}

DISAGG_HOST_DEVICE float from_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// Unsigned integers in the order of the floats; -0 is just below +0.
DISAGG_HOST_DEVICE std::uint32_t ordered(float x) {
  const std::uint32_t bits = bits_of(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DISAGG_HOST_DEVICE float unordered(std::uint32_t key) {
  return from_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}
inline constexpr std::uint32_t kOrderedMinusInfinity = 0x007FFFFFu, kOrderedInfinity = 0xFF800000u;

// A float to compare with: `x >= pivot(key)` says whether `ordered(x) >= key`, for zeros and NaN nearly.
DISAGG_HOST_DEVICE float pivot(std::uint32_t key) {
  return unordered(key < kOrderedMinusInfinity ? kOrderedMinusInfinity
                   : key > kOrderedInfinity    ? kOrderedInfinity
                                               : key);
}

// The one float of a type with `32 - shift` bits whose key begins as `prefix` does; lower bits of `prefix` are 0.
DISAGG_HOST_DEVICE float value_of(std::uint32_t prefix, int shift) {
  if (prefix <= kOrderedMinusInfinity) return unordered(kOrderedMinusInfinity);
  return from_bits(bits_of(unordered(prefix)) & ~((1u << shift) - 1u));
}

// Logits as they are drawn from: the highest is 0.
struct Scale {
  float max, temperature;
  DISAGG_HOST_DEVICE float operator()(float logit) const { return (logit - max) / temperature; }
};

// The lowest logit whose scaled value is at least `floor`, which is not above 0.
DISAGG_HOST_DEVICE float lowest_kept(const Scale& scale, float floor) {
  std::uint32_t low = kOrderedMinusInfinity, high = ordered(scale.max);
  while (low < high) {
    const std::uint32_t middle = low + (high - low) / 2;
    if (scale(unordered(middle)) >= floor)
      high = middle;
    else
      low = middle + 1;
  }
  return unordered(low);
}

}  // namespace disagg::cuda
