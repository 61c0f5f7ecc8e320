// RMSNorm of rows, with or without adding to a residual first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

// Strides are in elements. `residual` and `out` are contiguous; `out` may be `x`.
struct RmsNormArgs {
  const void* x;
  std::int64_t x_stride;
  void* residual;  // nullptr, or [rows, n]: `x` is added to it first, and the norm is of the sum
  const void* weight;
  void* out;
  std::int64_t n;
  float eps;
};

[[nodiscard]] cudaError_t rms_norm(DType dtype, const RmsNormArgs& args, std::int64_t rows, cudaStream_t stream);

}  // namespace disagg::cuda
