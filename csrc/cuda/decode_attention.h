// Attention of one query token a row over the paged KV pool: what a decode step does once a layer.
//
// Reads each row's KV once, which bounds it: batch 64, 2,048 tokens, 8 KV heads of 128 in bfloat16
// are 537 MB, 125 us at 4.3 TB/s. `plan` divides the step's KV among a fixed grid on the device; `run`
// follows that division, one layer a call. Both only launch kernels, so both can be captured in a CUDA
// graph and replayed with other lengths. Results are equal from run to run, bit by bit.
//
// Fast path: head_dim 128 or, but for E4M3, 64; 16-bit elements, KV also in E4M3; at most 8 query heads a KV head, pages of 16 tokens
// times a power of two, Hopper. Everything else goes a plain way, one warp a (row, head).
//
// Requires, of what `plan` reads (kv_lens, page_indptr) and of page_indices: written before `plan` on
// the same stream, and changed only after the last `run` of the step. Likewise the pool, but for the
// 16 tokens that hold a row's newest: `run` may load the rest before the kernel that precedes it has
// ended (programmatic dependent launch). Every kernel of the step that is launched that way must
// itself wait for its predecessor before it ends.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

class DecodeAttention {
 public:
  static constexpr int kMaxRows = 8192;
  static constexpr int kMaxHeadDim = 256;

  struct Shape {
    int num_heads, num_kv_heads, head_dim, page_size, max_rows;
    DType dtype;
    int num_sms;  // CTAs of the grid
    bool kv_is_e4m3 = false;  // instead of dtype; scaled by 1
    int kv_bytes() const { return kv_is_e4m3 ? 1 : item_bytes(dtype); }
    int group() const { return num_heads / num_kv_heads; }
    bool is_fast() const;
  };

  // Strides in elements. All is device memory.
  struct Run {
    const void* q;  // [rows, num_heads, head_dim], heads contiguous
    std::int64_t q_stride;
    const void* pool;  // [num_pages, num_kv_heads, num_layers, 2, page_size, head_dim], contiguous
    std::int64_t num_pages;
    int num_layers, layer;
    const int* page_indices;
    const int* kv_lens;
    const int* page_indptr;
    void* out;  // as q; rows without KV become zeros
    std::int64_t out_stride;
    int rows;  // those planned
    void* workspace;
  };

  // What is wrong with a shape, or nullptr.
  static const char* check(const Shape& shape);
  // Requires: check(shape) == nullptr. Touches no device.
  explicit DecodeAttention(const Shape& shape) : shape_(shape) {}

  const Shape& shape() const { return shape_; }
  // Bytes that `plan` and `run` share, aligned to 16; needs no initial value. 0 off the fast path.
  std::size_t workspace_bytes() const;
  // Divides rows <= max_rows. One small kernel; also mends what an aborted run left in the workspace.
  cudaError_t plan(const int* kv_lens, const int* page_indptr, int rows, void* workspace, cudaStream_t stream) const;
  cudaError_t run(const Run& run, cudaStream_t stream) const;

 private:
  Shape shape_;
};

}  // namespace disagg::cuda
