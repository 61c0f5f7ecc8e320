#include "cuda/activation.h"

#include <type_traits>

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ __forceinline__ float silu(float x) {
  // Far below zero the exponential is infinite and the quotient minus zero, as it should be.
  if constexpr (std::is_same_v<T, float>) return x / (1.0f + expf(-x));
  return __fdividef(x, 1.0f + __expf(-x));
}

// A row is cut into pieces of `kThreads * V` packs. All of a thread's loads are in flight at once.
template <class T, int N, int V>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(const SiluArgs args) {
  const std::int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(args.gate_up) + row * args.stride;
  const std::int64_t to_up = args.interleaved ? 8 : args.n;
  T* out = static_cast<T*>(args.out) + row * args.n;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.y) * V * kThreads + threadIdx.x) * N;
  begin();
  Pack<T, N> gates[V], ups[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const std::int64_t i = first + v * kThreads * N;
    if (i >= args.n) continue;
    const std::int64_t at = args.interleaved ? 2 * i - i % 8 : i;
    gates[v] = Pack<T, N>::load(gate + at);
    ups[v] = Pack<T, N>::load(gate + at + to_up);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const std::int64_t i = first + v * kThreads * N;
    if (i >= args.n) continue;
    Pack<T, N> result;
    for (int j = 0; j < N; ++j)
      result.items[j] =
          from_float<T>(rounded<T>(silu<T>(to_float(gates[v].items[j]))) * to_float(ups[v].items[j]));
    result.store(out + i);
  }
}

template <class T, int N, int V>
cudaError_t run(const SiluArgs& args, std::int64_t rows, cudaStream_t stream) {
  return launch(silu_and_mul_kernel<T, N, V>,
                {.blocks = static_cast<unsigned>(rows),
                 .threads = kThreads,
                 .stream = stream,
                 .blocks_y = static_cast<unsigned>(div_up<std::int64_t>(args.n, N * V * kThreads))},
                args);
}

}  // namespace

cudaError_t silu_and_mul(DType dtype, const SiluArgs& args, std::int64_t rows, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    constexpr int N = kVector<T>;
    if (args.n % N != 0 || args.stride % N != 0 || !is_aligned(args.gate_up) || !is_aligned(args.out))
      return run<T, 1, 4>(args, rows, stream);
    // Small steps want many blocks, large ones few that do more.
    return rows <= 256 ? run<T, N, 1>(args, rows, stream) : run<T, N, 2>(args, rows, stream);
  });
}

}  // namespace disagg::cuda
