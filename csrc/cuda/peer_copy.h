// Copies of KV pages into a pool of another process of this host, by one kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace disagg::cuda {

// What lets other processes map the allocation that `address` lies in, and how far in it lies.
struct Exported {
  cudaIpcMemHandle_t handle;
  std::int64_t offset;
};
[[nodiscard]] cudaError_t export_memory(const void* address, Exported& out);

// Maps an allocation of another process; `size` is how large it is. It stays, whatever becomes of that process, until
// cudaIpcCloseMemHandle, which no copy into it may outlive.
[[nodiscard]] cudaError_t map_memory(cudaIpcMemHandle_t handle, void*& base, std::size_t& size);

// Row i copies `lengths[i]` bytes from `source + source_offsets[i]` to `target + target_offsets[i]`.
// All of them are multiples of 16, lengths above 0, and targets do not overlap.
struct Runs {
  std::span<const std::int64_t> source_offsets, target_offsets, lengths;
};

// Launches the copies on `blocks` SMs, a kernel for each thousand runs; the other SMs are left to the engine.
// Bytes moved: twice their length, so at most 2.1 TB/s of copies within one H200, of which 256 pages of 2 MiB get
// 257 GB/s by 8 blocks, 482 by 16, 815 by 32, 1312 by 64 and 1631 by 132. A block waits for a free SM, which
// under large products took up to 1.5 ms.
[[nodiscard]] cudaError_t copy_runs(const void* source, void* target, const Runs& runs, unsigned blocks,
                                    cudaStream_t stream);

}  // namespace disagg::cuda
