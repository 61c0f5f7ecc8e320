// The gated activation of the MLP.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

// `out[rows, n] = silu(gate) * up`, of rows `gate[n], up[n]` that lie `stride` elements apart. Where they
// are interleaved, a row has eight of gate, eight of up, and so on, and n is a multiple of 8.
struct SiluArgs {
  const void* gate_up;
  std::int64_t stride;
  void* out;
  std::int64_t n;
  bool interleaved;
};

[[nodiscard]] cudaError_t silu_and_mul(DType dtype, const SiluArgs& args, std::int64_t rows, cudaStream_t stream);

}  // namespace disagg::cuda
