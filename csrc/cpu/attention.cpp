#include "cpu/attention.h"

#include <algorithm>
#include <functional>
#include <new>

#include "cpu/thread_pool.h"

namespace disagg::cpu {
namespace {

// Runs of tasks that a thread should find, so that threads of unequal speed end together.
constexpr std::int64_t kRunsPerThread = 4;
// What packing the KV of a chunk costs, in rows of attention over it.
constexpr std::int64_t kPackingRows = 8;

constexpr std::int64_t chunks_of(std::int64_t tokens) { return (tokens + kKvChunk - 1) / kKvChunk; }

std::int64_t rows_of(const AttentionTask& task, std::int64_t group) { return task.num_tokens * group; }

std::int64_t cost_of(const AttentionTask& task, std::int64_t group) {
  return (rows_of(task, group) + kPackingRows) * (task.kv_end - task.kv_begin);
}

bool ascends(std::span<const std::int32_t> indptr) {
  return !indptr.empty() && indptr.front() == 0 && std::is_sorted(indptr.begin(), indptr.end());
}

}  // namespace

void PagedAttention::Free::operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }

PagedAttention::Memory PagedAttention::allocate(std::size_t bytes) {
  return Memory(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
}

PagedAttention::PagedAttention(Shape shape, int threads, Isa isa)
    : shape_(shape), threads_(std::clamp(threads, 1, ThreadPool::kMaxThreads)), isa_(isa) {
  scratch_bytes_ = (attention_scratch_bytes(shape.head_dim) + 63) / 64 * 64;
  const std::size_t bytes = scratch_bytes_ * static_cast<std::size_t>(threads_);
  scratch_ = allocate(bytes);
  std::fill_n(scratch_.get(), bytes, std::byte{0});
}

const char* PagedAttention::check(const Shape& shape) {
  if (shape.num_kv_heads < 1 || shape.num_heads < 1 || shape.num_heads % shape.num_kv_heads != 0)
    return "query heads must be a multiple of KV heads";
  if (shape.group() > kMaxQueryRows) return "at most 96 query heads may share a KV head";
  if (shape.head_dim < 8 || shape.head_dim > kMaxHeadDim || shape.head_dim % 8 != 0)
    return "head_dim must be a multiple of 8 and at most 256";
  if (shape.page_size < 1) return "page_size must be at least 1";
  return nullptr;
}

// Visits every block of at most kMaxQueryRows rows, with its KV whole and its pages not yet set.
template <class Visit>
void PagedAttention::each_block(std::span<const std::int32_t> qo_indptr, std::span<const std::int32_t> kv_lens,
                                Visit&& visit) const {
  const std::int64_t most = kMaxQueryRows / shape_.group();
  for (std::size_t i = 0; i < kv_lens.size(); ++i) {
    const std::int64_t first = qo_indptr[i], count = qo_indptr[i + 1] - first, computed = kv_lens[i] - count;
    const std::int64_t blocks = (count + most - 1) / most;
    for (std::int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t begin = count * b / blocks, end = count * (b + 1) / blocks;
        visit(i, AttentionTask{.pages = nullptr,
                               .kv_begin = 0,
                               .kv_end = computed + end,
                               .first_token = first + begin,
                               .num_tokens = end - begin,
                               .first_position = computed + begin,
                               .kv_head = head,
                               .partials_at = -1});
      }
    }
  }
}

// Few blocks of long sequences are cut along their KV, into about as many tasks as keep all busy.
std::int64_t PagedAttention::chunks_a_task(std::span<const std::int32_t> qo_indptr,
                                           std::span<const std::int32_t> kv_lens) const {
  std::int64_t blocks = 0, chunks = 0, longest = 1;
  each_block(qo_indptr, kv_lens, [&](std::size_t, const AttentionTask& task) {
    ++blocks;
    chunks += chunks_of(task.kv_end);
    longest = std::max(longest, chunks_of(task.kv_end));
  });
  const std::int64_t wanted = threads_ * kRunsPerThread;
  if (threads_ == 1 || blocks >= 2 * wanted) return longest;
  return std::max<std::int64_t>(1, chunks / wanted);
}

void PagedAttention::plan_block(const AttentionTask& block, std::int64_t chunks_a_task) {
  const std::int64_t chunks = chunks_of(block.kv_end);
  if (chunks <= chunks_a_task) {
    tasks_.push_back(block);
    return;
  }
  const std::int64_t floats = partial_floats(rows_of(block, shape_.group()), shape_.head_dim);
  splits_.push_back({block, partial_floats_, chunks});
  for (std::int64_t at = 0; at < chunks; at += chunks_a_task) {
    AttentionTask task = block;
    task.kv_begin = at * kKvChunk;
    task.kv_end = std::min(block.kv_end, (at + chunks_a_task) * kKvChunk);
    task.partials_at = partial_floats_ + at * floats;
    tasks_.push_back(task);
  }
  partial_floats_ += chunks * floats;
}

// The costliest tasks go first, and each run has about the same cost.
void PagedAttention::plan_runs() {
  const auto cost = [&](const AttentionTask& task) { return cost_of(task, shape_.group()); };
  std::ranges::stable_sort(tasks_, std::ranges::greater{}, cost);
  std::int64_t total = 0, run = 0;
  for (const AttentionTask& task : tasks_) total += cost(task);
  const std::int64_t wanted = threads_ == 1 ? total : total / (threads_ * kRunsPerThread);
  runs_.assign(1, 0);
  for (std::size_t i = 0; i < tasks_.size(); ++i) {
    run += cost(tasks_[i]);
    if (run < wanted && i + 1 < tasks_.size()) continue;
    runs_.push_back(i + 1);
    run = 0;
  }
}

const char* PagedAttention::plan(std::span<const std::int32_t> qo_indptr, std::span<const std::int32_t> kv_lens,
                                 std::span<const std::int32_t> page_indptr,
                                 std::span<const std::int32_t> page_indices) {
  num_tokens_ = 0;
  max_page_ = -1;
  tasks_.clear();
  splits_.clear();
  runs_.assign(1, 0);
  partial_floats_ = 0;
  if (qo_indptr.size() != kv_lens.size() + 1 || page_indptr.size() != kv_lens.size() + 1)
    return "qo_indptr and page_indptr must be one longer than kv_lens";
  if (!ascends(qo_indptr) || !ascends(page_indptr)) return "indptr must ascend from 0";
  if (page_indptr.back() > static_cast<std::int64_t>(page_indices.size())) return "page_indices is too short";
  for (std::size_t i = 0; i < kv_lens.size(); ++i) {
    if (kv_lens[i] < qo_indptr[i + 1] - qo_indptr[i]) return "a sequence has fewer tokens in KV than new ones";
    if ((page_indptr[i + 1] - page_indptr[i]) * shape_.page_size < kv_lens[i]) return "a sequence has too few pages";
  }
  page_indices_.assign(page_indices.begin(), page_indices.end());
  for (const std::int32_t page : page_indices_) {
    if (page < 0) return "a page id is negative";
    max_page_ = std::max<std::int64_t>(max_page_, page);
  }
  const std::int64_t chunks = chunks_a_task(qo_indptr, kv_lens);
  each_block(qo_indptr, kv_lens, [&](std::size_t i, AttentionTask task) {
    task.pages = page_indices_.data() + page_indptr[i];
    plan_block(task, chunks);
  });
  plan_runs();
  if (const auto bytes = static_cast<std::size_t>(partial_floats_) * sizeof(float); bytes > partials_bytes_) {
    partials_ = allocate(bytes);
    partials_bytes_ = bytes;
  }
  num_tokens_ = qo_indptr.back();
  return nullptr;
}

void PagedAttention::run(DType dtype, const AttentionArgs& args) {
  const Kernels& kernels = kernels_for(isa_, dtype);
  float* partials = reinterpret_cast<float*>(partials_.get());
  const auto num_runs = static_cast<std::int64_t>(runs_.size()) - 1;
  shared_pool().run(num_runs, threads_, [&](std::int64_t run, int slot) {
    const std::size_t end = runs_[static_cast<std::size_t>(run) + 1];
    for (std::size_t i = runs_[static_cast<std::size_t>(run)]; i < end; ++i) {
      kernels.attend(args, tasks_[i], i + 1 < end ? &tasks_[i + 1] : nullptr, partials,
                     scratch_.get() + scratch_bytes_ * static_cast<std::size_t>(slot));
    }
  });
  shared_pool().run(static_cast<std::int64_t>(splits_.size()), threads_, [&](std::int64_t i, int) {
    const Split& split = splits_[static_cast<std::size_t>(i)];
    kernels.merge(args, split.task, partials + split.offset, split.num_chunks);
  });
}

}  // namespace disagg::cpu
