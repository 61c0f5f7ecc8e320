// Draws one token of each row of logits: greedy, or by the Gumbel-max rule, without a sort.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

// Parameters have one entry a row. Temperature is applied first, then min_p, top_k and top_p; tokens
// that tie with the last one kept are kept as well. `keys` are pairs, the lower half first.
// A row whose slot is negative is padding: nothing of it is read or written.
struct SampleArgs {
  const void* logits;  // rows of `vocab` elements that lie `stride` elements apart
  std::int64_t stride;
  std::int32_t vocab;
  const float* temperature;
  const std::int32_t* top_k;
  const float *top_p, *min_p;
  const std::uint32_t* keys;
  const std::int32_t* slots;
  std::int32_t* out;
  std::int32_t* last_tokens;  // by slot
};

// The largest vocabulary: a row lies in the shared memory of a cluster.
[[nodiscard]] std::int64_t max_vocab(DType dtype);

// Requires: 0 < vocab <= max_vocab(dtype).
[[nodiscard]] cudaError_t sample(DType dtype, const SampleArgs& args, std::int64_t rows, cudaStream_t stream);

}  // namespace disagg::cuda
