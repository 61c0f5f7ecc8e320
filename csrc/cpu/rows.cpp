#include "cpu/rows.h"

#include <algorithm>

#include "cpu/thread_pool.h"

namespace disagg::cpu {
namespace {

constexpr std::int64_t kRunsPerThread = 4;

template <class Args>
void split_rows(void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& args, std::int64_t rows,
                std::int64_t row_elements, int threads) {
  if (threads <= 1 || !worth_threads(rows * row_elements)) {
    kernel(args, 0, rows);
    return;
  }
  const std::int64_t runs = std::min(rows, threads * kRunsPerThread);
  shared_pool().run(runs, threads,
                    [&](std::int64_t i, int) { kernel(args, rows * i / runs, rows * (i + 1) / runs); });
}

}  // namespace

void rms_norm(const Kernels& kernels, const RmsNormArgs& args, std::int64_t rows, int threads) {
  split_rows(kernels.rms_norm, args, rows, args.n, threads);
}

void rope_and_store(const Kernels& kernels, const RopeArgs& args, std::int64_t tokens, int threads) {
  const std::int64_t heads = args.num_heads + 2 * args.num_kv_heads;
  split_rows(kernels.rope_and_store, args, tokens, heads * args.pool.head_dim, threads);
}

void silu_and_mul(const Kernels& kernels, const SiluArgs& args, std::int64_t rows, int threads) {
  // An exponential costs about eight times what an element costs elsewhere.
  split_rows(kernels.silu_and_mul, args, rows, args.n * 8, threads);
}

}  // namespace disagg::cpu
