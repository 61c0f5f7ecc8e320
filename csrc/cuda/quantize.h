// Rows in eight bits, each with its own scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

// `values[row] * scales[row]` is `x[row]`, whose largest element becomes e4m3's largest, 448.
struct QuantizeArgs {
  const void* x;  // [rows, n], contiguous
  void* values;   // e4m3 [rows, n]
  float* scales;  // [rows]
  std::int64_t n;
};

[[nodiscard]] cudaError_t quantize(DType dtype, const QuantizeArgs& args, std::int64_t rows, cudaStream_t stream);

}  // namespace disagg::cuda
