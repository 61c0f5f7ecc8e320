// Element types of tensors, as kernels see them.
#pragma once

#include <cstdint>

namespace disagg::cpu {

struct BF16 {
  std::uint16_t bits;
};

}  // namespace disagg::cpu
