// A mixture of experts: which tokens go to which expert, the experts' products, and their weighted sum.
//
// A token and one of the experts that it chose is a *pair*; pairs are ordered by expert, so that those
// of one expert are neighbours. A *segment* is up to kSegmentPairs of them, of one expert.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace disagg::cuda {

constexpr int kSegmentPairs = 32;
constexpr int kMaxExperts = 512, kMaxChoices = 32;

struct alignas(16) Segment {
  std::int32_t expert, begin, count, unused;
};

// Segments of `pairs` pairs at most; as many records and one more are in memory.
constexpr std::int64_t max_segments(std::int64_t pairs, std::int64_t experts) {
  return (pairs < experts ? pairs : experts) + pairs / kSegmentPairs;
}

// The `choices` likeliest experts of each token, equal ones by their number, and the order of pairs.
struct RouteArgs {
  const void* logits;  // [tokens, experts], rows `stride` elements apart
  std::int64_t stride;
  const std::int32_t* token_pages;  // nullptr, or one a token: negative is padding, which goes to nobody
  std::int32_t num_experts, choices;
  bool normalize;          // weights of a token sum to one; otherwise they are shares of all experts'
  std::int32_t* experts;   // [tokens, choices]; -1 of padding
  float* weights;          // [tokens, choices]
  std::int32_t* places;    // [tokens, choices]: the pair's place in the order; -1 of padding
  std::int32_t* tokens;    // [tokens * choices]: of each place, its token; places past the last pair are not written
  std::int32_t* ends;      // [experts]: where each expert's pairs end
  Segment* segments;       // the first holds their number in `count`, the others follow
};
[[nodiscard]] cudaError_t route(DType dtype, const RouteArgs& args, std::int64_t tokens, cudaStream_t stream);

// Each pair's row by its expert's weights `[experts, outputs, inputs]`.
struct ExpertsArgs {
  const void* x;               // [.., inputs], contiguous
  const std::int32_t* tokens;  // row of `x` of each place; nullptr: the place itself
  const void* weight;
  void* out;  // [places, outputs]
  std::int32_t inputs, outputs;
  const Segment* segments;
};
// Whether products of these sizes run at the speed of memory; others are right, and slow.
[[nodiscard]] bool experts_are_fast(DType dtype, std::int64_t inputs, std::int64_t outputs);
// `out = silu(x gate) * (x up)`; `weight` is [experts, 2 * outputs, inputs]: gate, then up.
[[nodiscard]] cudaError_t experts_gate_up(DType dtype, const ExpertsArgs& args, cudaStream_t stream);
// `out = x weight`. Launched directly behind `experts_gate_up`, it begins while that one ends.
[[nodiscard]] cudaError_t experts_down(DType dtype, const ExpertsArgs& args, cudaStream_t stream);

// `out[token] = sum of weight * y[place]` over the token's choices; zero for padding.
struct CombineArgs {
  const void* y;  // [places, n]
  const float* weights;
  const std::int32_t* places;
  std::int32_t choices;
  void* out;
  std::int64_t n;
};
[[nodiscard]] cudaError_t combine(DType dtype, const CombineArgs& args, std::int64_t tokens, cudaStream_t stream);

}  // namespace disagg::cuda
