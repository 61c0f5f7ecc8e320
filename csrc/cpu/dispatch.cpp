#include "cpu/kernels.h"

namespace disagg::cpu {

bool supports(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      // AVX-512 without its bf16 products (before Cooper Lake and Zen 4) runs the AVX2 kernels.
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa best_isa() {
  if (supports(Isa::kAvx512)) return Isa::kAvx512;
  return supports(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
}

const Kernels& kernels_for(Isa isa, DType dtype) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kernels(dtype);
  if (isa == Isa::kAvx2) return avx2::kernels(dtype);
#endif
  (void)isa;
  return baseline::kernels(dtype);
}

std::size_t attention_scratch_bytes(std::int64_t head_dim) {
  const std::int64_t dim = padded_dim(head_dim);
  const std::int64_t words = kMaxQueryRows * dim                            // queries
                             + 2 * partial_floats(kMaxQueryRows, head_dim)             // two partial results
                             + kMaxQueryRows * 16                           // weight sums by lane
                             + 2 * kKvTile * dim                            // packed K and V
                             + 16 * kKvTile;                                // scores of one block
  return static_cast<std::size_t>(words) * 4 + 64 * 8;
}

}  // namespace disagg::cpu
