// Decode attention with times of each warp, and kernels that only read. Compiled and loaded by decode_trace.py.
#define DISAGG_DECODE_TRACE
#include <cuda.h>

#include <initializer_list>

#include "cuda/decode_attention.cu"

namespace disagg::cuda {
namespace {

constexpr int kUnitBytes = 8192;
constexpr int kMostStages = 3;
constexpr int kWindow = 32;  // units that a warp takes at once

struct Reads {
  const char* pool;
  const int* runs;  // of layer 0, in the order in which they are read
  int64_t units;
  int layer, stages;
  uint32_t* taken;  // windows, where they are taken by a counter; else nullptr
  int tensor;       // a View, or 0: plain copies
  int copies;       // that a unit is cut into, where they are plain
  int evict_first;
};

// What a tensor map makes of a unit of page_size 16: in which order its 128-byte rows are asked for.
enum View {
  kPlain,
  kHalves,     // as decode_kernel: of K, then V, the first halves of all tokens, then the second
  kInOrder,    // as they lie
  kEights,     // of eight tokens the first halves, then the second
  kWhole,      // rows of 256 bytes as they lie, not swizzled
};

cudaError_t encode_view(int view, int promotion, int kv_heads, const void* pool, int64_t pages, int layers,
                        CUtensorMap* map) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  const auto runs = static_cast<cuuint64_t>(pages) * static_cast<cuuint64_t>(kv_heads) * static_cast<cuuint64_t>(layers);
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], steps[5] = {1, 1, 1, 1, 1};
  const auto set = [&](std::initializer_list<cuuint64_t> size, std::initializer_list<cuuint64_t> stride) {
    std::copy(size.begin(), size.end(), sizes);
    std::copy(stride.begin(), stride.end(), strides);
    for (int i = 0; i < 4; ++i) box[i] = static_cast<cuuint32_t>(sizes[i]);
    box[4] = 1;
  };
  if (view == kHalves) set({64, 16, 2, 2, runs}, {256, 128, 4096, 8192});
  if (view == kInOrder) set({64, 2, 16, 2, runs}, {128, 256, 4096, 8192});
  if (view == kEights) set({64, 8, 2, 4, runs}, {256, 128, 2048, 8192});
  if (view == kWhole) set({128, 16, 2, 1, runs}, {256, 4096, 8192, 8192});
  const auto encode_tiled = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const CUresult status = encode_tiled(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(pool), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, view == kWhole ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
      promotion == 256   ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
      : promotion == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B
                         : CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// As decode_kernel loads, and nothing else: the same blocks, rings, units and order.
__global__ void __launch_bounds__(kThreads, 1)
    read_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ Reads p) {
  extern __shared__ __align__(1024) unsigned char ring_memory[];
  __shared__ uint64_t barrier_memory[kDecodeWarps][kMostStages];
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAll, threadIdx.x / 32, 0);
  let_next_kernel_start();
  const uint32_t ring = shared_address(ring_memory) + warp * p.stages * kUnitBytes;
  const uint32_t barriers = shared_address(&barrier_memory[warp][0]);
  if (lane == 0) {
    for (int i = 0; i < kMostStages; ++i) init_barrier(barriers + i * 8);
    fence_barriers();
  }
  __syncwarp();

  const int64_t me = blockIdx.x * kDecodeWarps + warp, all = gridDim.x * kDecodeWarps;
  int64_t next = p.units * me / all, end = p.units * (me + 1) / all;
  int count = 0, ahead_count = 0, runs = 0, ahead = 0;
  const auto look_ahead = [&] {
    if (p.taken != nullptr) {
      uint32_t mine = 0;
      if (lane == 0) mine = atomicAdd(p.taken, 1);
      next = int64_t{__shfl_sync(kAll, mine, 0)} * kWindow;
      end = p.units;
    }
    ahead_count = static_cast<int>(max(int64_t{0}, min(int64_t{kWindow}, end - next)));
    ahead = lane < ahead_count ? __ldcg(p.runs + next + lane) + p.layer : 0;
    next += ahead_count;
  };
  int at = 0;
  const auto issue = [&](int stage) {  // false: nothing is left
    if (at == count) {
      runs = ahead, count = ahead_count, at = 0;
      if (count == 0) return false;
      look_ahead();
    }
    const int run = __shfl_sync(kAll, runs, at++);
    constexpr uint64_t kEvictFirst = 0x12f0000000000000, kNormal = 0x1000000000000000;
    const uint64_t hint = p.evict_first != 0 ? kEvictFirst : kNormal;
    const uint32_t to = ring + stage * kUnitBytes, barrier = barriers + stage * 8;
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kUnitBytes) : "memory");
    __syncwarp();
    if (p.tensor == kPlain) {
      const int bytes = kUnitBytes / p.copies;
      if (lane < p.copies)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
                "r"(to + lane * bytes),
            "l"(p.pool + int64_t{run} * kUnitBytes + lane * bytes), "r"(bytes), "r"(barrier), "l"(hint)
            : "memory");
    } else if (lane == 0) {
      asm volatile(
          "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
          " [%0], [%1, {%2, %2, %2, %2, %3}], [%4], %5;" ::"r"(to),
          "l"(&map), "r"(0), "r"(run), "r"(barrier), "l"(hint)
          : "memory");
    }
    return true;
  };
  look_ahead();
  int flying = 0;
  while (flying < p.stages && issue(flying)) ++flying;
  for (int stage = 0, parity = 0; flying > 0;) {
    wait_barrier(barriers + stage * 8, parity);
    if (!issue(stage)) --flying;
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
  wait_for_earlier_kernels();
}

// What a step has between two layers' attention: nothing of the next begins before this, and this not
// before the one before has ended.
__global__ void __launch_bounds__(128) between_kernel() { begin(); }

// The plainest way: 16 bytes a thread, neighbours beside each other, several loads on their way.
__global__ void __launch_bounds__(512) stream_kernel(const uint4* from, int64_t count, uint4* never) {
  let_next_kernel_start();
  uint4 sum{};
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i + 7 * step < count; i += 8 * step) {
    uint4 items[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) items[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.x ^= items[j].x, sum.y ^= items[j].y, sum.z ^= items[j].z, sum.w ^= items[j].w;
  }
  if ((sum.x & sum.y & sum.z & sum.w) == 0x12345678u) *never = sum;
  wait_for_earlier_kernels();
}

}  // namespace
}  // namespace disagg::cuda

using disagg::cuda::DecodeAttention;

namespace {

DecodeAttention attention_of(int heads, int kv_heads, int rows, int sms) {
  return DecodeAttention({heads, kv_heads, 128, 16, rows, disagg::cuda::DType::kBFloat16, sms});
}

}  // namespace

extern "C" {

std::size_t trace_workspace_bytes(int heads, int kv_heads, int rows, int sms) {
  return attention_of(heads, kv_heads, rows, sms).workspace_bytes();
}

int trace_plan(int heads, int kv_heads, int rows, int sms, const int* lens, const int* indptr, void* workspace,
               void* stream) {
  return attention_of(heads, kv_heads, rows, sms)
      .plan(lens, indptr, rows, workspace, static_cast<cudaStream_t>(stream));
}

int trace_run(int heads, int kv_heads, int rows, int sms, const void* q, const void* pool, int64_t pages, int layers,
              int layer, const int* indices, const int* lens, const int* indptr, void* out, void* workspace,
              void* stream) {
  const int64_t stride = int64_t{heads} * 128;
  return attention_of(heads, kv_heads, rows, sms)
      .run({q, stride, pool, pages, layers, layer, indices, lens, indptr, out, stride, rows, workspace},
           static_cast<cudaStream_t>(stream));
}

// [kTraceLayers, kTraceBlocks, kTraceWarps, kCount + 1] of 64 bits.
int trace_read(void* to) {
  return cudaMemcpyFromSymbol(to, disagg::cuda::trace_records, sizeof(disagg::cuda::trace_records));
}

// `taken`: a zero for each layer where windows are taken by a counter, else null.
int read_pool(int kv_heads, int sms, const void* pool, int64_t pages, int layers, int layer, const int* runs,
              int64_t units, int stages, unsigned* taken, int view, int promotion, int copies, int evict_first,
              void* stream) {
  using namespace disagg::cuda;
  CUtensorMap map{};
  cudaError_t error = view == kPlain ? cudaSuccess : encode_view(view, promotion, kv_heads, pool, pages, layers, &map);
  if (error != cudaSuccess) return error;
  const int most = kDecodeWarps * kMostStages * kUnitBytes;
  error = cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  const Reads reads{static_cast<const char*>(pool), runs, units, layer, stages,
                    taken == nullptr ? nullptr : taken + layer, view, copies, evict_first};
  // All of the memory, whatever it uses: one block an SM.
  const Launch how{.blocks = static_cast<unsigned>(sms),
                   .threads = kThreads,
                   .stream = static_cast<cudaStream_t>(stream),
                   .shared_bytes = static_cast<unsigned>(most)};
  return launch(read_kernel, how, map, reads);
}

int trace_between(int blocks, void* stream) {
  using namespace disagg::cuda;
  const Launch how{
      .blocks = static_cast<unsigned>(blocks), .threads = 128, .stream = static_cast<cudaStream_t>(stream)};
  return launch(between_kernel, how);
}

int read_stream(int sms, const void* from, int64_t bytes, void* never, void* stream) {
  using namespace disagg::cuda;
  const Launch how{
      .blocks = static_cast<unsigned>(sms * 4), .threads = 512, .stream = static_cast<cudaStream_t>(stream)};
  return launch(stream_kernel, how, static_cast<const uint4*>(from), bytes / 16, static_cast<uint4*>(never));
}
}
