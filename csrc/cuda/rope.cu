#include "cuda/rope.h"

#include <bit>

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

constexpr int kThreads = 128;

// One head of one token: where it is, and what becomes of it. `Kv` is the pool's type.
template <class T, class Kv>
struct Item {
  const T* from = nullptr;       // nullptr: nothing to do
  T* rotated = nullptr;          // q and k, which are rewritten where they lie; nullptr for v
  Kv* stored = nullptr;          // k and v: the place in the pool; nullptr for q
  const T* norm = nullptr;
  const float* cos_sin = nullptr;
};

template <class T, class Kv>
__device__ __forceinline__ Item<T, Kv> find_item(const RopeArgs& args, unsigned index, unsigned tokens) {
  const unsigned heads = args.num_heads + 2 * args.num_kv_heads;
  const unsigned token = index / heads;
  Item<T, Kv> item;
  if (token >= tokens) return item;
  const std::int32_t page = args.token_pages[token];
  if (page < 0) return item;
  const int head = static_cast<int>(index % heads), kv_head = head - args.num_heads;
  const std::int64_t dim = args.pool.head_dim, row = token;
  if (head < args.num_heads + args.num_kv_heads) {
    const std::int64_t position = args.wide_positions ? static_cast<const std::int64_t*>(args.positions)[token]
                                                      : static_cast<const std::int32_t*>(args.positions)[token];
    item.cos_sin = args.cos_sin + position * args.rotary_dim;
  }
  if (kv_head < 0) {
    item.from = item.rotated = static_cast<T*>(args.q) + row * args.q_stride + head * dim;
    item.norm = static_cast<const T*>(args.q_norm);
    return item;
  }
  const bool is_value = kv_head >= args.num_kv_heads;
  const std::int64_t of_kind = is_value ? kv_head - args.num_kv_heads : kv_head;
  item.stored = static_cast<Kv*>(args.pool.base) + page * args.pool.page_stride + of_kind * args.pool.head_stride +
                (is_value ? args.pool.value_offset : 0) + args.token_offsets[token] * dim;
  if (is_value) {
    item.from = static_cast<const T*>(args.v) + row * args.v_stride + of_kind * dim;
  } else {
    item.from = item.rotated = static_cast<T*>(args.k) + row * args.k_stride + of_kind * dim;
    item.norm = static_cast<const T*>(args.k_norm);
  }
  return item;
}

template <class T, int N>
__device__ __forceinline__ float squares(const Pack<T, N>& pack) {
  float sum = 0.0f;
  for (int j = 0; j < N; ++j) sum += to_float(pack.items[j]) * to_float(pack.items[j]);
  return sum;
}

template <class T, int N>
__device__ __forceinline__ void scale(Pack<T, N>& pack, float factor, const Pack<T, N>& weight) {
  for (int j = 0; j < N; ++j)
    pack.items[j] = from_float<T>(rounded<T>(to_float(pack.items[j]) * factor) * to_float(weight.items[j]));
}

template <class T, int N>
__device__ __forceinline__ void store(const Pack<T, N>& pack, T* to) {
  pack.store(to);
}
template <class T, int N>
__device__ __forceinline__ void store(const Pack<T, N>& pack, E4M3* to) {
  Pack<std::uint16_t, N / 2> narrow;
  for (int j = 0; j < N / 2; ++j)
    narrow.items[j] = e4m3s_of(to_float(pack.items[2 * j]), to_float(pack.items[2 * j + 1]));
  narrow.store(reinterpret_cast<std::uint16_t*>(to));
}

// `LANES` neighbouring threads take a head; each holds 16 bytes of its first half and the partners in
// the second. A byte is read once and written once or, of k, twice. Requires: all is aligned and rotated.
template <class T, class Kv, int LANES>
__global__ void __launch_bounds__(kThreads) rope_kernel(const RopeArgs args, unsigned tokens) {
  constexpr int N = kVector<T>;
  const int lane = threadIdx.x % LANES, at = lane * N, half = args.rotary_dim / 2;
  const unsigned index = blockIdx.x * (kThreads / LANES) + threadIdx.x / LANES;
  begin();
  const Item<T, Kv> item = find_item<T, Kv>(args, index, tokens);
  const bool is_live = item.from != nullptr && at < half;
  Pack<T, N> a{}, b{};
  if (is_live) {
    a = Pack<T, N>::load(item.from + at);
    b = Pack<T, N>::load(item.from + half + at);
  }
  if (args.q_norm != nullptr || args.k_norm != nullptr) {  // the whole warp takes part
    const float mean = warp_sum(squares<T, N>(a) + squares<T, N>(b), LANES) / static_cast<float>(2 * half);
    if (is_live && item.norm != nullptr) {
      const float factor = 1.0f / sqrtf(mean + args.eps);
      scale<T, N>(a, factor, Pack<T, N>::load(item.norm + at));
      scale<T, N>(b, factor, Pack<T, N>::load(item.norm + half + at));
    }
  }
  if (!is_live) return;
  if (item.rotated != nullptr) {
    float cosines[N], sines[N];
    for (int j = 0; j < N; j += 4) {
      Pack<float, 4>::load(item.cos_sin + at + j).store(cosines + j);
      Pack<float, 4>::load(item.cos_sin + half + at + j).store(sines + j);
    }
    for (int j = 0; j < N; ++j) {
      const float x = to_float(a.items[j]), y = to_float(b.items[j]);
      a.items[j] = from_float<T>(x * cosines[j] - y * sines[j]);
      b.items[j] = from_float<T>(y * cosines[j] + x * sines[j]);
    }
    a.store(item.rotated + at);
    b.store(item.rotated + half + at);
  }
  if (item.stored != nullptr) {
    store(a, item.stored + at);
    store(b, item.stored + half + at);
  }
}

// Any head, any alignment: a warp takes one, by way of shared memory.
template <class T, class Kv>
__global__ void __launch_bounds__(kThreads) rope_any_kernel(const RopeArgs args, unsigned tokens) {
  extern __shared__ float heads[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int dim = static_cast<int>(args.pool.head_dim), half = args.rotary_dim / 2;
  float* x = heads + warp * dim;
  begin();
  const Item<T, Kv> item = find_item<T, Kv>(args, blockIdx.x * (kThreads / kWarp) + warp, tokens);
  if (item.from == nullptr) return;  // the whole warp
  float sum = 0.0f;
  for (int i = lane; i < dim; i += kWarp) {
    x[i] = to_float(item.from[i]);
    sum += x[i] * x[i];
  }
  const float factor = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(dim) + args.eps);
  if (item.norm != nullptr)
    for (int i = lane; i < dim; i += kWarp) x[i] = rounded<T>(rounded<T>(x[i] * factor) * to_float(item.norm[i]));
  __syncwarp();
  for (int i = lane; i < dim; i += kWarp) {
    float y = x[i];
    if (item.rotated != nullptr && i < half)
      y = x[i] * item.cos_sin[i] - x[half + i] * item.cos_sin[half + i];
    else if (item.rotated != nullptr && i < 2 * half)
      y = x[i] * item.cos_sin[i - half] + x[i - half] * item.cos_sin[i];
    const T value = from_float<T>(y);
    if (item.rotated != nullptr) item.rotated[i] = value;
    if (item.stored != nullptr) item.stored[i] = from_float<Kv>(to_float(value));
  }
}

bool can_use_packs(const RopeArgs& args, int n) {
  const KvPool& pool = args.pool;
  for (const std::int64_t elements : {args.q_stride, args.k_stride, args.v_stride, pool.page_stride, pool.head_stride,
                                      pool.value_offset, pool.head_dim / 2})
    if (elements % n != 0) return false;
  for (const void* p : {static_cast<const void*>(args.q), static_cast<const void*>(args.k), args.v,
                        static_cast<const void*>(args.cos_sin), args.q_norm, args.k_norm,
                        static_cast<const void*>(pool.base)})
    if (!is_aligned(p)) return false;
  return args.rotary_dim == pool.head_dim && pool.head_dim / 2 / n <= kWarp;
}

template <class T, class Kv>
auto kernel_for(int lanes) {
  switch (lanes) {
    case 1: return rope_kernel<T, Kv, 1>;
    case 2: return rope_kernel<T, Kv, 2>;
    case 4: return rope_kernel<T, Kv, 4>;
    case 8: return rope_kernel<T, Kv, 8>;
    case 16: return rope_kernel<T, Kv, 16>;
    default: return rope_kernel<T, Kv, 32>;
  }
}

template <class T, class Kv>
cudaError_t launch_rope(const RopeArgs& args, std::int64_t tokens, cudaStream_t stream) {
  constexpr int N = kVector<T>;
  const std::int64_t items = tokens * (args.num_heads + 2 * args.num_kv_heads);
  Launch how{.blocks = 0, .threads = kThreads, .stream = stream};
  if (!can_use_packs(args, N)) {
    how.blocks = static_cast<unsigned>(div_up<std::int64_t>(items, kThreads / kWarp));
    how.shared_bytes = static_cast<unsigned>(kThreads / kWarp * args.pool.head_dim * sizeof(float));
    return launch(rope_any_kernel<T, Kv>, how, args, static_cast<unsigned>(tokens));
  }
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(args.pool.head_dim / 2 / N)));
  how.blocks = static_cast<unsigned>(div_up<std::int64_t>(items, kThreads / lanes));
  return launch(kernel_for<T, Kv>(lanes), how, args, static_cast<unsigned>(tokens));
}

}  // namespace

cudaError_t rope_and_store(DType dtype, const RopeArgs& args, std::int64_t tokens, cudaStream_t stream) {
  const std::int64_t items = tokens * (args.num_heads + 2 * args.num_kv_heads);
  if (items >= std::int64_t{1} << 31 || args.pool.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  return with_type(dtype, [&]<class T>() {
    return args.pool.is_e4m3 ? launch_rope<T, E4M3>(args, tokens, stream) : launch_rope<T, T>(args, tokens, stream);
  });
}

}  // namespace disagg::cuda
