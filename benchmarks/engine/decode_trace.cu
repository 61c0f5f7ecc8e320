// Decode attention with times of each warp, and kernels that only read. Compiled and loaded by decode_trace.py.
#define DISAGG_DECODE_TRACE
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
  int by_tensor;
};

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
    if (lane == 0) {
      const uint32_t to = ring + stage * kUnitBytes, barrier = barriers + stage * 8;
      if (p.by_tensor != 0) {
        load_unit(to, &map, 0, run, barrier, kUnitBytes);
      } else {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kUnitBytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                     "l"(p.pool + int64_t{run} * kUnitBytes), "r"(kUnitBytes), "r"(barrier)
                     : "memory");
      }
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
              int64_t units, int stages, int by_tensor, unsigned* taken, void* stream) {
  using namespace disagg::cuda;
  CUtensorMap map;
  const DecodeAttention::Run run{.q = nullptr,
                                 .q_stride = 0,
                                 .pool = pool,
                                 .num_pages = pages,
                                 .num_layers = layers,
                                 .layer = layer,
                                 .page_indices = nullptr,
                                 .kv_lens = nullptr,
                                 .page_indptr = nullptr,
                                 .out = nullptr,
                                 .out_stride = 0,
                                 .rows = 0,
                                 .workspace = nullptr};
  cudaError_t error = encode({kv_heads, kv_heads, 128, 16, 1, DType::kBFloat16, sms}, run, &map);
  if (error != cudaSuccess) return error;
  const int most = kDecodeWarps * kMostStages * kUnitBytes;
  error = cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  const Reads reads{static_cast<const char*>(pool), runs, units, layer, stages,
                    taken == nullptr ? nullptr : taken + layer, by_tensor};
  // All of the memory, whatever it uses: one block an SM.
  const Launch how{.blocks = static_cast<unsigned>(sms),
                   .threads = kThreads,
                   .stream = static_cast<cudaStream_t>(stream),
                   .shared_bytes = static_cast<unsigned>(most)};
  return launch(read_kernel, how, map, reads);
}

int read_stream(int sms, const void* from, int64_t bytes, void* never, void* stream) {
  using namespace disagg::cuda;
  const Launch how{
      .blocks = static_cast<unsigned>(sms * 4), .threads = 512, .stream = static_cast<cudaStream_t>(stream)};
  return launch(stream_kernel, how, static_cast<const uint4*>(from), bytes / 16, static_cast<uint4*>(never));
}
}
