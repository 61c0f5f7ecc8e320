#include "cuda/quantize.h"

#include <cuda_fp8.h>

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

constexpr float kLargest = 448.0f, kTiny = 1.17549435e-38f;

__device__ __forceinline__ float block_max(float x) {
  __shared__ float partial[kWarp];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = lane < warps ? partial[lane] : 0.0f;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// A block a row. The first V packs of each thread stay in registers; what is longer is read twice.
template <class T, int N, int V>
__global__ void __launch_bounds__(512) quantize_kernel(const QuantizeArgs args) {
  const std::int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  auto* values = static_cast<__nv_fp8_storage_t*>(args.values) + row * args.n;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * N, step = static_cast<std::int64_t>(blockDim.x) * N;
  begin();
  Pack<T, N> packs[V];
  float largest = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (first + v * step < args.n) packs[v] = Pack<T, N>::load(x + first + v * step);
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (first + v * step < args.n)
      for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(to_float(packs[v].items[j])));
  for (std::int64_t i = first + V * step; i < args.n; i += step) {
    const auto pack = Pack<T, N>::load(x + i);
    for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(to_float(pack.items[j])));
  }
  const float scale = fmaxf(block_max(largest), kTiny * kLargest) / kLargest;
  if (threadIdx.x == 0) args.scales[row] = scale;
  const auto store = [&](const Pack<T, N>& pack, std::int64_t i) {
    Pack<__nv_fp8_storage_t, N> out;
    for (int j = 0; j < N; ++j)
      out.items[j] = __nv_cvt_float_to_fp8(to_float(pack.items[j]) / scale, __NV_SATFINITE, __NV_E4M3);
    out.store(values + i);
  };
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (first + v * step < args.n) store(packs[v], first + v * step);
  for (std::int64_t i = first + V * step; i < args.n; i += step) store(Pack<T, N>::load(x + i), i);
}

}  // namespace

cudaError_t quantize(DType dtype, const QuantizeArgs& args, std::int64_t rows, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    constexpr int N = kVector<T>;
    const Launch how{.blocks = static_cast<unsigned>(rows), .threads = 512, .stream = stream};
    if (args.n % N != 0 || !is_aligned(args.x) || !is_aligned(args.values))
      return launch(quantize_kernel<T, 1, 4>, how, args);
    return args.n <= 512 * N ? launch(quantize_kernel<T, N, 1>, how, args) : launch(quantize_kernel<T, N, 4>, how, args);
  });
}

}  // namespace disagg::cuda
