// What the CUDA bindings share: tensors of a GPU, their element types, streams and errors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/tensor.h"
#include "cuda/dtype.h"

namespace disagg::bindings {

using Tensor = TensorOn<dlpack::kCuda>;

inline cuda::DType dtype_of(const Tensor& t) {
  if (t.is(dlpack::kFloat, 32)) return cuda::DType::kFloat32;
  if (t.is(dlpack::kFloat, 16)) return cuda::DType::kFloat16;
  require(t.is(dlpack::kBfloat, 16), "tensors must be float32, float16 or bfloat16");
  return cuda::DType::kBFloat16;
}

// The raw handle that torch gives of a stream.
inline cudaStream_t stream_of(std::uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// Throws RuntimeError with CUDA's words: a kernel could not be launched.
inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // this one is told, it must not be found again
  throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
}

}  // namespace disagg::bindings
