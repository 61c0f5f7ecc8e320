// Paged attention of a batch: plan() cuts it into tasks once a step, run() does them once a layer.
//
// Not thread-safe: one engine's thread owns it. Holds the step's page table, scratch for each thread
// and the partial results of long sequences. How a batch is cut changes no bit of any result, see
// kernels.h. Cost: each task packs its KV once for up to kMaxQueryRows rows; a decode of one
// sequence reads its KV once, at up to memory's speed.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/kernels.h"

namespace disagg::cpu {

class PagedAttention {
 public:
  struct Shape {
    std::int64_t num_heads, num_kv_heads, head_dim, page_size;
    std::int64_t group() const { return num_heads / num_kv_heads; }
  };

  // Requires: check() found nothing.
  PagedAttention(Shape shape, int threads, Isa isa);
  // What of this shape the kernels cannot do, or nullptr.
  static const char* check(const Shape& shape);

  // Plans a batch of sequences whose page tables are given as CSR. Copies what it is given. Returns
  // what is wrong with the batch, or nullptr; if something is, no tokens are planned.
  [[nodiscard]] const char* plan(std::span<const std::int32_t> qo_indptr, std::span<const std::int32_t> kv_lens,
                                 std::span<const std::int32_t> page_indptr,
                                 std::span<const std::int32_t> page_indices);
  // Requires: q and out have num_tokens() tokens, and the pool more than max_page() pages.
  void run(DType dtype, const AttentionArgs& args);

  const Shape& shape() const { return shape_; }
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t max_page() const { return max_page_; }

 private:
  // A block of rows whose KV is split over several tasks, `num_chunks` partial results from `offset`.
  struct Split {
    AttentionTask task;
    std::int64_t offset, num_chunks;
  };
  struct Free {
    void operator()(std::byte* p) const;
  };
  using Memory = std::unique_ptr<std::byte[], Free>;

  static Memory allocate(std::size_t bytes);
  void plan_runs();
  void plan_block(const AttentionTask& block, std::int64_t chunks_a_task);
  std::int64_t chunks_a_task(std::span<const std::int32_t> qo_indptr, std::span<const std::int32_t> kv_lens) const;
  template <class Visit>
  void each_block(std::span<const std::int32_t> qo_indptr, std::span<const std::int32_t> kv_lens,
                  Visit&& visit) const;

  Shape shape_;
  int threads_;
  Isa isa_;
  std::int64_t num_tokens_ = 0, max_page_ = -1;
  std::vector<std::int32_t> page_indices_;  // tasks point into it
  std::vector<AttentionTask> tasks_;   // the costliest first
  std::vector<std::size_t> runs_;      // where each run of tasks of about equal cost begins, and the end
  std::vector<Split> splits_;
  std::int64_t partial_floats_ = 0;
  Memory scratch_, partials_;
  std::size_t scratch_bytes_ = 0, partials_bytes_ = 0;
};

}  // namespace disagg::cpu
