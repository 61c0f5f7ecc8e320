// Kernels that act on each token's vector alone, split over threads by rows. Thread-safe.
#pragma once

#include "cpu/kernels.h"

namespace disagg::cpu {

void rms_norm(const Kernels& kernels, const RmsNormArgs& args, std::int64_t rows, int threads);
void rope_and_store(const Kernels& kernels, const RopeArgs& args, std::int64_t tokens, int threads);
void silu_and_mul(const Kernels& kernels, const SiluArgs& args, std::int64_t rows, int threads);

// Whether so many elements are worth more threads than the caller's: below that it ends sooner than
// another thread begins.
constexpr bool worth_threads(std::int64_t elements) { return elements >= 32 * 1024; }

}  // namespace disagg::cpu
