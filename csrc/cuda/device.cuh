// What the kernels share: elements, 16-byte accesses, sums of a block, and launches that overlap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// A byte of 4 bits exponent and 3 of mantissa, up to 448 and without infinities (torch.float8_e4m3fn).
struct E4M3 {
  std::uint8_t bits;
};

// Two neighbours, the first in the low half; exact.
__device__ __forceinline__ std::uint32_t halves_of_e4m3s(std::uint16_t pair) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return halves;
}
// To the nearest, and to the largest where it is more.
__device__ __forceinline__ std::uint16_t e4m3s_of(float low, float high) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float to_float(E4M3 x) {
  const std::uint32_t halves = halves_of_e4m3s(x.bits);
  return __half2float(reinterpret_cast<const __half2*>(&halves)->x);
}
template <>
__device__ __forceinline__ E4M3 from_float(float x) {
  return {static_cast<std::uint8_t>(e4m3s_of(x, 0))};
}

// What reading back a stored value gives: the reference models round there.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Elements of a 16-byte access.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// N neighbours that are loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T items[N];

  __device__ static Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }
};

__device__ __forceinline__ float warp_sum(float x, int lanes = kWarp) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over a block of whole warps, in every thread. Call it once: its memory is not cleared for a second time.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[kWarp];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

// A kernel of ours may start while the one before it in the stream still runs (programmatic dependent
// launch), so it must call this before its first access to memory that another kernel writes. Every
// thread calls it: then all earlier kernels have ended for whoever waits for this one.
__device__ __forceinline__ void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// And this early: the next kernel's blocks come in as soon as all of this one's are on their way.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void begin() {
  let_next_kernel_start();
  wait_for_earlier_kernels();
}

struct Launch {
  unsigned blocks, threads;
  cudaStream_t stream;
  unsigned blocks_y = 1;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;
};

// Launches nothing when there are no blocks. `kernel` begins with `begin()`.
//
// An SM's split of L1 and shared memory is changed only while the SM is empty. All kernels ask for the
// split that decode attention needs, so that its blocks can come in beside those of the kernel before.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  if (how.blocks == 0 || how.blocks_y == 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {how.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(how.blocks, how.blocks_y);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = how.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Calls `run.template operator()<T>()` with the type of the elements.
template <class Run>
cudaError_t with_type(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32: return run.template operator()<float>();
    case DType::kFloat16: return run.template operator()<__half>();
    case DType::kBFloat16: return run.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

template <class Int>
__host__ __device__ constexpr Int div_up(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace disagg::cuda
