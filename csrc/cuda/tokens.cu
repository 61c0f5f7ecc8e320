#include "cuda/tokens.h"

#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ void fill_with_ones(uint4& word) { word = make_uint4(~0u, ~0u, ~0u, ~0u); }
__device__ __forceinline__ void fill_with_ones(std::uint16_t& word) { word = 0xffff; }

// A block a token; `Word` is what is copied at once.
template <class Word>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const EmbeddingArgs args) {
  const std::int64_t token = blockIdx.x, words = args.row_bytes / static_cast<std::int64_t>(sizeof(Word));
  begin();
  const std::int32_t id = args.token_ids[token];
  const bool is_known = id >= 0 && id < args.vocab;
  const Word* row = static_cast<const Word*>(args.weight) + (is_known ? id : 0) * words;
  Word* out = static_cast<Word*>(args.out) + token * words;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < words; i += kThreads) {
    Word word;
    if (is_known)
      word = row[i];
    else
      fill_with_ones(word);
    out[i] = word;
  }
}

__global__ void __launch_bounds__(kThreads) gather_tokens_kernel(std::int32_t* token_ids, const std::int32_t* slots,
                                                                 const std::int32_t* last_tokens,
                                                                 std::int64_t tokens) {
  begin();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= tokens || token_ids[i] != -1) return;
  const std::int32_t slot = slots[i];
  token_ids[i] = slot < 0 ? 0 : last_tokens[slot];
}

}  // namespace

cudaError_t embedding(const EmbeddingArgs& args, std::int64_t tokens, cudaStream_t stream) {
  const bool by_16 = args.row_bytes % 16 == 0 && is_aligned(args.weight) && is_aligned(args.out);
  return launch(by_16 ? embedding_kernel<uint4> : embedding_kernel<std::uint16_t>,
                {.blocks = static_cast<unsigned>(tokens), .threads = kThreads, .stream = stream}, args);
}

cudaError_t gather_tokens(std::int32_t* token_ids, const std::int32_t* slots, const std::int32_t* last_tokens,
                          std::int64_t tokens, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(div_up<std::int64_t>(tokens, kThreads));
  return launch(gather_tokens_kernel, {.blocks = blocks, .threads = kThreads, .stream = stream}, token_ids, slots,
                last_tokens, tokens);
}

}  // namespace disagg::cuda
