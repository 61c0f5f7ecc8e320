// Products of at most 256 rows with a weight, `out = x w^T` and what follows it: what a decode step does
// four times a layer. Weights are read once, which bounds it for few rows.
//
// Equal from run to run, bit by bit; a row's sums are in an order that the shapes alone decide.
//
// Requires: the weight is written, and the device synchronized, before the first call; for it is loaded
// before the kernel that precedes this one has ended (programmatic dependent launch).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/linear_division.h"

namespace disagg::cuda {

// Strides are in elements, multiples of 8; all is bfloat16 and 16-byte aligned.
//
// RMSNorm needs no kernel of its own between two products. The first, which adds to the residual, leaves
// the sum times the norm's weight, and of each row the sums of squares of 64 elements each. The second
// takes the former as x, and divides its own sums by the root mean square that the latter make.
struct LinearArgs {
  const void* x;  // [rows, k]
  std::int64_t x_stride;
  const void* w;  // [n, k], contiguous
  void* out;      // [rows, n], or [rows, n / 2] where `gated`
  std::int64_t out_stride;
  const void* bias;      // nullptr, or [n]
  const void* residual;  // nullptr, or as out, which may be the same: added before the rounding
  std::int64_t residual_stride;
  const float* squares;  // nullptr, or [k / 64, 256] of x before its norm's weight
  float eps;
  float* squares_out;  // nullptr, or [n / 64, 256]; then a residual, the next two, and a plan with splits
  const void* norm;    // [n]
  void* normed;        // as out: what out has, times norm
  std::int64_t normed_stride;
  bool gated;  // w has eight rows of gate, then eight of up, and so on: out = silu(gate) * up
  int rows, n, k;
  void* workspace;  // nullptr where the plan needs none
};

// Requires: check_linear() and check_linear_plan() find nothing.
[[nodiscard]] cudaError_t linear(const LinearArgs& args, const LinearPlan& plan, cudaStream_t stream);

}  // namespace disagg::cuda
