// Element types that the CUDA kernels know.
#pragma once

namespace disagg::cuda {

enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr int item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace disagg::cuda
