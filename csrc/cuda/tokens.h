// Token ids: those that are still on the device, and their embeddings.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace disagg::cuda {

// Rows of a weight `[vocab, row_bytes]` for `tokens` ids, to contiguous rows. An id outside of the
// vocabulary reads nothing; its row becomes NaN in every element type.
struct EmbeddingArgs {
  const std::int32_t* token_ids;
  const void* weight;
  void* out;
  std::int64_t vocab, row_bytes;
};

[[nodiscard]] cudaError_t embedding(const EmbeddingArgs& args, std::int64_t tokens, cudaStream_t stream);

// `token_ids[i] = last_tokens[slots[i]]` where it is PENDING (-1); 0 where the slot is none (-1), too.
[[nodiscard]] cudaError_t gather_tokens(std::int32_t* token_ids, const std::int32_t* slots,
                                        const std::int32_t* last_tokens, std::int64_t tokens, cudaStream_t stream);

}  // namespace disagg::cuda
