// Norm and rotation of q and k, and the store of k and v to the paged pool, in one pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

// One layer of a pool `[page, kv_head, layer, 2, token, head_dim]`; strides are in elements.
struct KvPool {
  void* base;
  std::int64_t page_stride, head_stride, value_offset;
  std::int64_t page_size, head_dim;
  bool is_e4m3;  // else of the type of q, k and v
};

// Rows of q, k and v lie `*_stride` elements apart; heads are contiguous. Norms may be nullptr.
// A token whose page is -1 is padding: nothing of it is read or written.
// Requires: head_dim <= kMaxHeadDim; every page, offset and position is in range (nobody checks).
struct RopeArgs {
  void *q, *k;
  const void* v;
  std::int64_t q_stride, k_stride, v_stride;
  std::int32_t num_heads, num_kv_heads, rotary_dim;
  const float* cos_sin;  // [positions, rotary_dim]: cosines, then sines
  const void* positions;
  bool wide_positions;  // int64, else int32
  const std::int32_t *token_pages, *token_offsets;
  const void *q_norm, *k_norm;
  float eps;
  KvPool pool;
};

inline constexpr std::int64_t kMaxHeadDim = 1024;

[[nodiscard]] cudaError_t rope_and_store(DType dtype, const RopeArgs& args, std::int64_t tokens, cudaStream_t stream);

}  // namespace disagg::cuda
