// When each warp of decode attention came to the points of its way. Costs nothing, and does nothing, but
// in the build of benchmarks/engine/decode_trace.cu, which defines DISAGG_DECODE_TRACE.
#pragma once

#include <cstdint>

namespace disagg::cuda {

enum class Point { kStart, kReleased, kFirstUnit, kLastUnit, kMerged, kCount };

#ifdef DISAGG_DECODE_TRACE

constexpr int kTraceLayers = 64, kTraceBlocks = 256, kTraceWarps = 8;

struct TraceRecord {
  unsigned long long at[static_cast<int>(Point::kCount)];  // ns of the card's timer
  unsigned long long sm;
};

__device__ TraceRecord trace_records[kTraceLayers][kTraceBlocks][kTraceWarps];

class Trace {
 public:
  __device__ Trace(int layer, int block, int warp) : record_(trace_records[layer % kTraceLayers][block][warp]) {
    mark(Point::kStart);
    unsigned sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    if (threadIdx.x % 32 == 0) record_.sm = sm;
  }
  __device__ __forceinline__ void mark(Point point) {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    if (threadIdx.x % 32 == 0) record_.at[static_cast<int>(point)] = now;
  }
  // Of a loop: its first time counts.
  __device__ __forceinline__ void mark_first(Point point) {
    if (is_first_) mark(point);
    is_first_ = false;
  }

 private:
  TraceRecord& record_;
  bool is_first_ = true;
};

#else

class Trace {
 public:
  __device__ Trace(int, int, int) {}
  __device__ __forceinline__ void mark(Point) {}
  __device__ __forceinline__ void mark_first(Point) {}
};

#endif

}  // namespace disagg::cuda
