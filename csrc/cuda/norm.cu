#include "cuda/norm.h"

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

// The element as it is normed: of `x`, or of the new residual, which is stored.
template <class T, int N>
__device__ __forceinline__ void load_sum(const T* x, T* residual, float (&values)[N]) {
  const auto pack = Pack<T, N>::load(x);
  for (int j = 0; j < N; ++j) values[j] = to_float(pack.items[j]);
  if (residual == nullptr) return;
  auto sum = Pack<T, N>::load(residual);
  for (int j = 0; j < N; ++j) {
    sum.items[j] = from_float<T>(to_float(sum.items[j]) + values[j]);
    values[j] = to_float(sum.items[j]);
  }
  sum.store(residual);
}

template <class T, int N>
__device__ __forceinline__ void store_normed(const float (&values)[N], float factor, const Pack<T, N>& weight, T* out) {
  Pack<T, N> normed;
  for (int j = 0; j < N; ++j)
    normed.items[j] = from_float<T>(rounded<T>(values[j] * factor) * to_float(weight.items[j]));
  normed.store(out);
}

__device__ __forceinline__ float norm_factor(float squares, const RmsNormArgs& args) {
  return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(args.n) + args.eps);
}

// A block a row, which stays in registers: read once, written once. `V` times 16 bytes a thread.
template <class T, int V>
__global__ void __launch_bounds__(V == 1 ? 512 : 1024) rms_norm_kernel(const RmsNormArgs args) {
  constexpr int N = kVector<T>;
  const std::int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  T* residual = args.residual == nullptr ? nullptr : static_cast<T*>(args.residual) + row * args.n;
  T* out = static_cast<T*>(args.out) + row * args.n;
  const T* weight = static_cast<const T*>(args.weight);
  const int n = static_cast<int>(args.n), step = static_cast<int>(blockDim.x) * N;
  const int first = static_cast<int>(threadIdx.x) * N;
  begin();
  float values[V][N];
  Pack<T, N> weights[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = first + v * step;
    if (i >= n) continue;
    load_sum<T, N>(x + i, residual == nullptr ? nullptr : residual + i, values[v]);
    weights[v] = Pack<T, N>::load(weight + i);
  }
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (first + v * step < n)
      for (int j = 0; j < N; ++j) squares += values[v][j] * values[v][j];
  const float factor = norm_factor(squares, args);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = first + v * step;
    if (i < n) store_normed<T, N>(values[v], factor, weights[v], out + i);
  }
}

// Any width, any alignment.
template <class T>
__global__ void __launch_bounds__(256) rms_norm_any_kernel(const RmsNormArgs args) {
  const std::int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  T* residual = args.residual == nullptr ? nullptr : static_cast<T*>(args.residual) + row * args.n;
  T* out = static_cast<T*>(args.out) + row * args.n;
  begin();
  float squares = 0.0f;
  for (std::int64_t i = threadIdx.x; i < args.n; i += blockDim.x) {
    float value[1];
    load_sum<T, 1>(x + i, residual == nullptr ? nullptr : residual + i, value);
    squares += value[0] * value[0];
  }
  const float factor = norm_factor(squares, args);
  const T* from = residual == nullptr ? x : residual;
  for (std::int64_t i = threadIdx.x; i < args.n; i += blockDim.x) {
    const float value[1] = {to_float(from[i])};
    store_normed<T, 1>(value, factor, Pack<T, 1>::load(static_cast<const T*>(args.weight) + i), out + i);
  }
}

}  // namespace

cudaError_t rms_norm(DType dtype, const RmsNormArgs& args, std::int64_t rows, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    constexpr int N = kVector<T>;
    Launch how{.blocks = static_cast<unsigned>(rows), .threads = 256, .stream = stream};
    const std::int64_t packs = args.n / N;
    if (args.n % N != 0 || args.x_stride % N != 0 || packs > 2048 || !is_aligned(args.x) ||
        !is_aligned(args.residual) || !is_aligned(args.weight) || !is_aligned(args.out))
      return launch(rms_norm_any_kernel<T>, how, args);
    const int v = packs <= 512 ? 1 : 2;
    how.threads = static_cast<unsigned>(div_up<std::int64_t>(packs, v * kWarp) * kWarp);
    return launch(v == 1 ? rms_norm_kernel<T, 1> : rms_norm_kernel<T, 2>, how, args);
  });
}

}  // namespace disagg::cuda
