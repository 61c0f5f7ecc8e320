#include "cuda/peer_copy.h"

#include <cuda.h>

#include <algorithm>

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 8;  // 64 KiB of an SM in flight
constexpr int kMaxRuns = 1024;
constexpr std::int64_t kUnit = 16, kMaxUnits = 1ll << 31;  // of a launch

// A parameter of the kernel: no memory has to outlive the launch.
struct RunTable {
  const char* source;
  char* target;
  std::int32_t num_runs;
  std::uint32_t ends[kMaxRuns];  // in units, counted through all runs before
  std::int64_t source_offsets[kMaxRuns], target_offsets[kMaxRuns];
};

__device__ __forceinline__ void copy_units(const uint4* __restrict__ from, uint4* __restrict__ to, std::uint32_t n) {
  std::uint32_t i = threadIdx.x;
  for (; i + (kUnroll - 1) * kThreads < n; i += kUnroll * kThreads) {
    uint4 words[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) words[k] = __ldcs(from + i + k * kThreads);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) __stcs(to + i + k * kThreads, words[k]);
  }
  for (; i < n; i += kThreads) __stcs(to + i, __ldcs(from + i));
}

// Each block copies one stretch of all runs laid end to end.
__global__ void __launch_bounds__(kThreads) copy_runs_kernel(const __grid_constant__ RunTable table) {
  begin();
  const std::uint32_t total = table.ends[table.num_runs - 1];
  const std::uint32_t rows = (total + kThreads - 1) / kThreads;
  const std::uint32_t share = (rows + gridDim.x - 1) / gridDim.x * kThreads;
  const std::uint64_t first = static_cast<std::uint64_t>(blockIdx.x) * share;
  if (first >= total) return;
  std::uint32_t at = first;
  const std::uint32_t end = min(static_cast<std::uint64_t>(total), first + share);
  int run = 0;
  for (int last = table.num_runs - 1; run < last;) {
    const int middle = (run + last) / 2;
    if (table.ends[middle] > at)
      last = middle;
    else
      run = middle + 1;
  }
  for (; at < end; ++run) {
    const std::uint32_t begins = run == 0 ? 0 : table.ends[run - 1], ends = min(end, table.ends[run]);
    copy_units(reinterpret_cast<const uint4*>(table.source + table.source_offsets[run]) + (at - begins),
               reinterpret_cast<uint4*>(table.target + table.target_offsets[run]) + (at - begins), ends - at);
    at = ends;
  }
}

cudaError_t find_allocation(const void* address, CUdeviceptr& base, std::size_t* size) {
  void* entry = nullptr;  // asked for, so that the module loads where there is no driver
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto find = reinterpret_cast<decltype(&cuMemGetAddressRange)>(entry);
  return find(&base, size, reinterpret_cast<CUdeviceptr>(address)) == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t export_memory(const void* address, Exported& out) {
  CUdeviceptr base = 0;
  const cudaError_t error = find_allocation(address, base, nullptr);
  if (error != cudaSuccess) return error;
  out.offset = static_cast<std::int64_t>(reinterpret_cast<CUdeviceptr>(address) - base);
  return cudaIpcGetMemHandle(&out.handle, reinterpret_cast<void*>(base));
}

cudaError_t map_memory(cudaIpcMemHandle_t handle, void*& base, std::size_t& size) {
  const cudaError_t error = cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) return error;
  CUdeviceptr begins = 0;
  return find_allocation(base, begins, &size);
}

cudaError_t copy_runs(const void* source, void* target, const Runs& runs, unsigned blocks, cudaStream_t stream) {
  RunTable table;
  table.source = static_cast<const char*>(source);
  table.target = static_cast<char*>(target);
  table.num_runs = 0;
  std::int64_t units = 0;
  const auto flush = [&] {
    if (table.num_runs == 0) return cudaSuccess;
    const auto needed = static_cast<unsigned>(div_up<std::int64_t>(units, kThreads));
    const cudaError_t error = launch(copy_runs_kernel, {std::min(blocks, needed), kThreads, stream}, table);
    table.num_runs = 0;
    units = 0;
    return error;
  };
  for (std::size_t i = 0; i < runs.lengths.size(); ++i) {
    const std::int64_t length = runs.lengths[i] / kUnit;
    if (length > kMaxUnits) return cudaErrorInvalidValue;
    if (table.num_runs == kMaxRuns || units + length > kMaxUnits) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    units += length;
    table.source_offsets[table.num_runs] = runs.source_offsets[i];
    table.target_offsets[table.num_runs] = runs.target_offsets[i];
    table.ends[table.num_runs++] = static_cast<std::uint32_t>(units);
  }
  return flush();
}

}  // namespace disagg::cuda
