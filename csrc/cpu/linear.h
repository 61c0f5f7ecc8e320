// Matrix products with a weight `[n, k]`, split over threads by panels of its rows.
//
// Thread-safe. Cost: the weight is read once whatever the number of rows, so few rows run at
// memory's speed and many at that of the multipliers.
#pragma once

#include "cpu/kernels.h"

namespace disagg::cpu {

constexpr std::int64_t num_panels(std::int64_t n) { return (n + kPanel - 1) / kPanel; }

// Packs a contiguous weight of `panels` whole panels where it lies.
void pack_linear(const Kernels& kernels, void* weight, std::int64_t panels, std::int64_t k_words, int threads);

// Copies rows of a packed weight out of it: out is `[count, k_words]` words.
// Requires: every id is a row of the weight.
void unpack_rows(const std::uint32_t* packed, std::int64_t k_words, const std::int64_t* ids, std::int64_t count,
                 std::uint32_t* out, int threads);

// Computes args.out. With args.packed == nullptr each panel of `weight` is packed on the way, which
// costs less the more rows share it; the result is the same to the bit.
void linear(const Kernels& kernels, const LinearArgs& args, const void* weight, int threads);

}  // namespace disagg::cpu
