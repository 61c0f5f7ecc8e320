#include "cuda/experts.h"

#include <type_traits>

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

// A warp takes 16 rows of an expert's weights over all inputs: the rows of an MMA (m16n8k16), whose
// columns are pairs. For gate and up, 8 rows are gate's and 8 the same of up's, so that both of an
// output meet in one thread. Each warp has a ring of kStages stages of 16 rows by 64 inputs in shared memory,
// which it fills by itself, past the end of an item with the next one's; so nothing but its own copies
// is waited for. Beside the rings lies x of all segments of the block's items, as far as they fit.
//
// Bytes: the weights of every expert that has a pair, once a segment. 8 warps of 10 KB in flight are 80 KB an SM.
constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kStages = 6, kStep = 64, kRowBytes = kStep * 2, kStageBytes = 16 * kRowBytes;
constexpr int kRingBytes = kWarps * kStages * kStageBytes;
constexpr int kPad = 8;  // elements between rows of x in shared memory, so that 8 rows touch all banks
constexpr int kSharedBytes = 226 * 1024;
constexpr int kMaxPhase = 64;  // segments whose x is in shared memory at once

__host__ __device__ constexpr int shared_rows(int inputs) {
  return (kSharedBytes - kRingBytes) / (2 * (inputs + kPad)) / 8 * 8;
}

// 16 bytes to shared memory, zeros where there is no source.
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_weight_async(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ uint4 load_matrices(std::uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ Segment load_segment(const Segment* p) {
  // Past L1, which may hold what was there in an earlier layer.
  const int4 v = __ldcg(reinterpret_cast<const int4*>(p));
  return {v.x, v.y, v.z, v.w};
}

// One warp's weights on their way: stage after stage of its items, each kWarps further.
template <class T, bool kGated>
class Ring {
 public:
  static constexpr int kOutputs = kGated ? 8 : 16;  // of an item

  __device__ Ring(const ExpertsArgs& args, int first_item, int end_item, std::uint32_t shared)
      : args_(args), groups_(args.outputs / kOutputs), lane_(threadIdx.x % kWarp), item_(first_item), end_(end_item),
        shared_(shared) {
    find_row();
    for (int i = 0; i < kStages - 1; ++i) load();
  }

  // The address of the next stage's rows; the one before it is loaded anew.
  __device__ __forceinline__ std::uint32_t next() {
    wait_for_copies<kStages - 2>();
    __syncwarp();
    load();
    const std::uint32_t stage = shared_ + read_ * kStageBytes;
    read_ = read_ + 1 == kStages ? 0 : read_ + 1;
    return stage;
  }

 private:
  // Row i of a stage holds its 16-byte pieces in the order `piece ^ i % 8`.
  __device__ __forceinline__ void load() {
    if (row_ != nullptr) {
      const std::uint32_t to = shared_ + write_ * kStageBytes;
      const int inputs = args_.inputs;
      const std::int64_t second = static_cast<std::int64_t>(kGated ? args_.outputs : 8) * inputs;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int line = lane_ / 8 + j * 4, piece = lane_ % 8 ^ line % 8;
        copy_weight_async(to + line * kRowBytes + piece * 16, row_ + (j < 2 ? 0 : second) + (j % 2 ? 4 * inputs : 0));
      }
      row_ += kStep;
      if ((left_ -= kStep) == 0) item_ += kWarps, find_row();
    }
    commit_copies();
    write_ = write_ + 1 == kStages ? 0 : write_ + 1;
  }

  // Where this lane's pieces of the item's first row begin.
  __device__ __forceinline__ void find_row() {
    row_ = nullptr;
    if (item_ >= end_) return;
    const Segment segment = load_segment(args_.segments + 1 + item_ / groups_);
    const std::int64_t outputs = static_cast<std::int64_t>(args_.outputs) * (kGated ? 2 : 1);
    row_ = static_cast<const T*>(args_.weight) +
           (segment.expert * outputs + item_ % groups_ * kOutputs + lane_ / 8) * args_.inputs + lane_ % 8 * 8;
    left_ = args_.inputs;
  }

  const ExpertsArgs& args_;
  const int groups_, lane_;
  int item_;
  const int end_;
  const std::uint32_t shared_;
  int read_ = 0, write_ = 0, left_ = 0;
  const T* row_ = nullptr;
};

__device__ __forceinline__ float gated(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// One item: the outputs from `output` on of 8 * kTiles pairs, whose x lies at `x` in shared memory.
template <class T, bool kGated, int kTiles>
__device__ __forceinline__ void run_item(Ring<T, kGated>& ring, std::uint32_t x, const ExpertsArgs& args,
                                         const Segment& segment, int output) {
  const int lane = threadIdx.x % kWarp, x_bytes = (args.inputs + kPad) * 2;
  const int line = lane % 16;
  x += lane % 8 * x_bytes + lane / 8 * 16;
  float sums[kTiles][4] = {};
  for (int k = 0; k < args.inputs; k += kStep) {
    const std::uint32_t stage = ring.next() + line * kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int piece = half * 4 + lane / 16;
      const uint4 a = load_matrices(stage + (piece ^ line % 8) * 16);
      const uint4 b = load_matrices(stage + ((piece + 2) ^ line % 8) * 16);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint4 v = load_matrices(x + t * 8 * x_bytes + (k + half * 32) * 2);
        mma<T>(sums[t], a, v.x, v.y);
        mma<T>(sums[t], b, v.z, v.w);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = t * 8 + lane % 4 * 2 + i;
      if (pair >= segment.count) continue;
      T* out = static_cast<T*>(args.out) + static_cast<std::int64_t>(segment.begin + pair) * args.outputs + output +
               lane / 4;
      if constexpr (kGated) {
        *out = from_float<T>(gated(sums[t][i], sums[t][i + 2]));
      } else {
        out[0] = from_float<T>(sums[t][i]);
        out[8] = from_float<T>(sums[t][i + 2]);
      }
    }
}

template <class T, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) experts_kernel(const __grid_constant__ ExpertsArgs args) {
  extern __shared__ uint4 shared[];
  __shared__ int firsts[kMaxPhase];  // row of x in shared memory of each segment
  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto rings = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const std::uint32_t rows_of_x = rings + kRingBytes;
  const int groups = args.outputs / Ring<T, kGated>::kOutputs, x_bytes = (args.inputs + kPad) * 2;
  // The next kernel's blocks come in after this wait, so it may read the segments before its own.
  if constexpr (kGated) wait_for_earlier_kernels(), let_next_kernel_start();
  const auto items = static_cast<std::int64_t>(load_segment(args.segments).count) * groups;
  const int low = static_cast<int>(items * blockIdx.x / gridDim.x);
  const int high = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x);
  int item = low + warp;
  Ring<T, kGated> ring(args, item, high, rings + warp * kStages * kStageBytes);
  if constexpr (!kGated) wait_for_earlier_kernels(), let_next_kernel_start();
  if (low == high) return;

  const int last = (high - 1) / groups, capacity = shared_rows(args.inputs);
  for (int segment = low / groups; segment <= last;) {
    __syncthreads();  // nobody reads the x of the last phase any more
    int end = segment, taken = 0;
    for (; end <= last && end - segment < kMaxPhase; ++end) {
      const Segment s = load_segment(args.segments + 1 + end);
      const int padded = div_up(s.count, 8) * 8;
      if (taken + padded > capacity) break;
      if (threadIdx.x == 0) firsts[end - segment] = taken;
      for (int i = warp; i < padded; i += kWarps) {
        const bool exists = i < s.count;
        const int place = s.begin + (exists ? i : 0);
        const int from = args.tokens == nullptr ? place : __ldcg(args.tokens + place);
        const T* source = static_cast<const T*>(args.x) + static_cast<std::int64_t>(from) * args.inputs;
        const std::uint32_t target = rows_of_x + (taken + i) * x_bytes;
        for (int k = lane * 8; k < args.inputs; k += kWarp * 8) copy_async(target + k * 2, source + k, exists);
      }
      taken += padded;
    }
    wait_for_all_copies();
    __syncthreads();
    for (const int stop = min(high, end * groups); item < stop; item += kWarps) {
      const Segment s = load_segment(args.segments + 1 + item / groups);
      const std::uint32_t x = rows_of_x + firsts[item / groups - segment] * x_bytes;
      const int output = item % groups * Ring<T, kGated>::kOutputs;
      switch (div_up(s.count, 8)) {
        case 1: run_item<T, kGated, 1>(ring, x, args, s, output); break;
        case 2: run_item<T, kGated, 2>(ring, x, args, s, output); break;
        case 3: run_item<T, kGated, 3>(ring, x, args, s, output); break;
        default: run_item<T, kGated, 4>(ring, x, args, s, output); break;
      }
    }
    segment = end;
  }
}

// Any type and size: a warp an output of a segment. For small models and tests, not for speed.
template <class T, bool kGated>
__global__ void __launch_bounds__(256) experts_any_kernel(const ExpertsArgs args) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int lane = threadIdx.x % kWarp;
  const std::int64_t rows = static_cast<std::int64_t>(args.outputs) * (kGated ? 2 : 1);
  const std::int64_t items = static_cast<std::int64_t>(load_segment(args.segments).count) * args.outputs;
  const std::int64_t first = blockIdx.x * static_cast<std::int64_t>(blockDim.x / kWarp) + threadIdx.x / kWarp;
  for (std::int64_t item = first; item < items; item += gridDim.x * static_cast<std::int64_t>(blockDim.x / kWarp)) {
    const Segment segment = load_segment(args.segments + 1 + item / args.outputs);
    const std::int64_t output = item % args.outputs;
    const T* weight = static_cast<const T*>(args.weight) + (segment.expert * rows + output) * args.inputs;
    const T* up_weight = weight + static_cast<std::int64_t>(args.outputs) * args.inputs;
    for (int i = 0; i < segment.count; ++i) {
      const std::int64_t place = segment.begin + i;
      const std::int64_t from = args.tokens == nullptr ? place : args.tokens[place];
      const T* x = static_cast<const T*>(args.x) + from * args.inputs;
      float sum = 0.0f, up = 0.0f;
      for (int k = lane; k < args.inputs; k += kWarp) {
        sum += to_float(x[k]) * to_float(weight[k]);
        if constexpr (kGated) up += to_float(x[k]) * to_float(up_weight[k]);
      }
      sum = warp_sum(sum);
      if constexpr (kGated) up = warp_sum(up), sum = sum / (1.0f + expf(-sum)) * up;
      if (lane == 0) static_cast<T*>(args.out)[place * args.outputs + output] = from_float<T>(sum);
    }
  }
}

template <class T, bool kGated>
cudaError_t run(const ExpertsArgs& args, cudaStream_t stream) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  Launch how{.blocks = static_cast<unsigned>(sms), .threads = kThreads, .stream = stream};
  if constexpr (sizeof(T) == 2) {
    if (experts_are_fast(DType::kFloat16, args.inputs, args.outputs) && is_aligned(args.x) && is_aligned(args.weight)) {
      how.shared_bytes = kSharedBytes;
      error = cudaFuncSetAttribute(experts_kernel<T, kGated>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      return error == cudaSuccess ? launch(experts_kernel<T, kGated>, how, args) : error;
    }
  }
  how.blocks *= 8, how.threads = 256;
  return launch(experts_any_kernel<T, kGated>, how, args);
}

}  // namespace

bool experts_are_fast(DType dtype, std::int64_t inputs, std::int64_t outputs) {
  return item_bytes(dtype) == 2 && inputs % kStep == 0 && outputs % 16 == 0 &&
         shared_rows(static_cast<int>(inputs)) >= kSegmentPairs;
}

cudaError_t experts_gate_up(DType dtype, const ExpertsArgs& args, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() { return run<T, true>(args, stream); });
}

cudaError_t experts_down(DType dtype, const ExpertsArgs& args, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() { return run<T, false>(args, stream); });
}

}  // namespace disagg::cuda
