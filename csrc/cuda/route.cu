#include <climits>

#include "cuda/device.cuh"
#include "cuda/experts.h"

namespace disagg::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kChoosers = 4;  // warps of a block, one a token
constexpr int kSorters = 1024;

// Larger floats have larger keys. None is 0, which marks what is taken.
__device__ __forceinline__ std::uint32_t order(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}

// A warp a token; each lane holds the logits of experts `lane + 32 i`.
template <class T, int V>
__global__ void __launch_bounds__(kChoosers* kWarp) choose_kernel(const RouteArgs args, std::int64_t tokens) {
  begin();
  const std::int64_t token = blockIdx.x * kChoosers + threadIdx.x / kWarp;
  if (token >= tokens) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t at = token * args.choices + lane;
  if (args.token_pages != nullptr && args.token_pages[token] < 0) {
    if (lane < args.choices) args.experts[at] = -1, args.weights[at] = 0.0f;
    return;
  }
  const T* logits = static_cast<const T*>(args.logits) + token * args.stride;
  float values[V];
  std::uint32_t keys[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int expert = lane + i * kWarp;
    values[i] = expert < args.num_experts ? to_float(logits[expert]) : 0.0f;
    keys[i] = expert < args.num_experts ? order(values[i]) : 0u;
  }
  int chosen = 0;
  float chosen_value = 0.0f, largest = 0.0f;
  for (int j = 0; j < args.choices; ++j) {
    std::uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(kAll, best);
    int mine = INT_MAX;
#pragma unroll
    for (int i = V - 1; i >= 0; --i)
      if (keys[i] == best) mine = lane + i * kWarp;
    const int expert = __reduce_min_sync(kAll, mine);
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (expert == lane + i * kWarp) value = values[i], keys[i] = 0;
    value = __shfl_sync(kAll, value, expert % kWarp);
    if (j == 0) largest = value;
    if (j == lane) chosen = expert, chosen_value = value;
  }
  const float share = lane < args.choices ? expf(chosen_value - largest) : 0.0f;
  float sum = share;
  if (!args.normalize) {
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (lane + i * kWarp < args.num_experts) sum += expf(values[i] - largest);
  }
  sum = warp_sum(sum);
  if (lane < args.choices) args.experts[at] = chosen, args.weights[at] = share / sum;
}

// One block: counts each expert's pairs, and gives every pair its place. Pairs of one expert are in no
// particular order; what is computed of one does not depend on it.
__global__ void __launch_bounds__(kSorters) order_kernel(const RouteArgs args, int pairs) {
  __shared__ int counts[kMaxExperts], nexts[kMaxExperts];
  __shared__ unsigned long long sums[kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  if (thread < kMaxExperts) counts[thread] = 0;
  __syncthreads();
  begin();
  for (int i = thread; i < pairs; i += kSorters) {
    const int expert = args.experts[i];
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  // Pairs before each expert's in the lower half, segments before it in the upper one.
  const int count = thread < kMaxExperts ? counts[thread] : 0;
  const int segments = div_up(count, kSegmentPairs);
  const unsigned long long own = static_cast<unsigned long long>(segments) << 32 | static_cast<unsigned>(count);
  unsigned long long upto = own;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned long long below = __shfl_up_sync(kAll, upto, offset);
    if (lane >= offset) upto += below;
  }
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += sums[w];
  const int first = static_cast<int>((upto - own) & 0xffffffffu), segment = static_cast<int>((upto - own) >> 32);
  if (thread < args.num_experts) {
    nexts[thread] = first;
    args.ends[thread] = first + count;
    for (int i = 0; i < segments; ++i)
      args.segments[1 + segment + i] = {thread, first + i * kSegmentPairs,
                                        min(count - i * kSegmentPairs, kSegmentPairs), 0};
    if (thread == args.num_experts - 1) args.segments[0] = {0, 0, segment + segments, 0};
  }
  __syncthreads();
  for (int i = thread; i < pairs; i += kSorters) {
    const int expert = args.experts[i];
    const int place = expert < 0 ? -1 : atomicAdd(&nexts[expert], 1);
    args.places[i] = place;
    if (place >= 0) args.tokens[place] = i / args.choices;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(256) combine_kernel(const CombineArgs args) {
  begin();
  const std::int64_t token = blockIdx.x;
  const T* y = static_cast<const T*>(args.y);
  T* out = static_cast<T*>(args.out) + token * args.n;
  const float* weights = args.weights + token * args.choices;
  const std::int32_t* places = args.places + token * args.choices;
  for (std::int64_t i = (blockIdx.y * 256 + threadIdx.x) * static_cast<std::int64_t>(N); i < args.n;
       i += static_cast<std::int64_t>(gridDim.y) * 256 * N) {
    float sum[N] = {};
#pragma unroll 8
    for (int j = 0; j < args.choices; ++j) {
      const int place = places[j];
      if (place < 0) continue;
      const auto pack = Pack<T, N>::load(y + place * args.n + i);
      for (int l = 0; l < N; ++l) sum[l] += weights[j] * to_float(pack.items[l]);
    }
    Pack<T, N> result;
    for (int l = 0; l < N; ++l) result.items[l] = from_float<T>(sum[l]);
    result.store(out + i);
  }
}

template <class T>
cudaError_t choose(const RouteArgs& args, std::int64_t tokens, cudaStream_t stream) {
  const Launch how{.blocks = static_cast<unsigned>(div_up<std::int64_t>(tokens, kChoosers)),
                   .threads = kChoosers * kWarp,
                   .stream = stream};
  if (args.num_experts <= kWarp) return launch(choose_kernel<T, 1>, how, args, tokens);
  if (args.num_experts <= 4 * kWarp) return launch(choose_kernel<T, 4>, how, args, tokens);
  return launch(choose_kernel<T, kMaxExperts / kWarp>, how, args, tokens);
}

}  // namespace

cudaError_t route(DType dtype, const RouteArgs& args, std::int64_t tokens, cudaStream_t stream) {
  const cudaError_t error = with_type(dtype, [&]<class T>() { return choose<T>(args, tokens, stream); });
  if (error != cudaSuccess) return error;
  return launch(order_kernel, {.blocks = 1, .threads = kSorters, .stream = stream}, args,
                static_cast<int>(tokens * args.choices));
}

cudaError_t combine(DType dtype, const CombineArgs& args, std::int64_t tokens, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    constexpr int N = kVector<T>;
    const bool packs = args.n % N == 0 && is_aligned(args.y) && is_aligned(args.out);
    const Launch how{.blocks = static_cast<unsigned>(tokens), .threads = 256, .stream = stream,
                     .blocks_y = packs ? static_cast<unsigned>(div_up<std::int64_t>(args.n, 256 * N)) : 1};
    return packs ? launch(combine_kernel<T, N>, how, args) : launch(combine_kernel<T, 1>, how, args);
  });
}

}  // namespace disagg::cuda
