#include "cpu/linear.h"

#include <algorithm>
#include <memory>

#include "cpu/thread_pool.h"

namespace disagg::cpu {
namespace {

// Runs of panels that a thread takes at a time: several a thread, so that a core which another
// process uses half of the time takes fewer; but each long enough for the hardware's prefetchers.
constexpr std::int64_t kRunsPerThread = 8;
// Waking a thread is not worth less than this: weights' words read plus products computed.
constexpr std::int64_t kWorthAThread = 16 * 1024;

struct Runs {
  std::int64_t panels, count;
  std::int64_t begin(std::int64_t i) const { return panels * i / count; }
};

Runs split(std::int64_t panels, int threads) {
  return {panels, std::min<std::int64_t>(panels, threads * kRunsPerThread)};
}

// Room for one packed panel; kept by the thread for its next call.
std::uint32_t* panel_scratch(std::int64_t words) {
  struct Free {
    void operator()(std::uint32_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<std::uint32_t[], Free> scratch;
  thread_local std::int64_t capacity = 0;
  if (capacity < words) {
    scratch.reset(static_cast<std::uint32_t*>(
        ::operator new[](static_cast<std::size_t>(words) * 4, std::align_val_t{64})));
    capacity = words;
  }
  return scratch.get();
}

}  // namespace

void pack_linear(const Kernels& kernels, void* weight, std::int64_t panels, std::int64_t k_words, int threads) {
  const std::int64_t words = k_words * kPanel;
  shared_pool().run(panels, threads, [&](std::int64_t p, int) {
    std::uint32_t* panel = static_cast<std::uint32_t*>(weight) + p * words;
    std::uint32_t* copy = panel_scratch(words);
    std::copy_n(panel, words, copy);
    kernels.pack_panel(copy, kPanel, k_words, 0, panel);
  });
}

void unpack_rows(const std::uint32_t* packed, std::int64_t k_words, const std::int64_t* ids, std::int64_t count,
                 std::uint32_t* out, int threads) {
  if (count * k_words < kWorthAThread) threads = 1;
  shared_pool().run(count, threads, [&](std::int64_t row, int) {
    const std::uint32_t* from = packed + ids[row] / kPanel * k_words * kPanel + ids[row] % kPanel;
    for (std::int64_t i = 0; i < k_words; ++i) out[row * k_words + i] = from[i * kPanel];
  });
}

void linear(const Kernels& kernels, const LinearArgs& args, const void* weight, int threads) {
  if (args.rows == 0 || args.n == 0) return;
  const Runs runs = split(num_panels(args.n), threads);
  if (runs.panels * kPanel * args.k_words < kWorthAThread) threads = 1;
  shared_pool().run(runs.count, threads, [&](std::int64_t i, int) {
    const std::int64_t begin = runs.begin(i), end = runs.begin(i + 1);
    if (args.packed != nullptr) {
      kernels.linear(args, args.packed + begin * args.k_words * kPanel, begin, end);
      return;
    }
    std::uint32_t* panel = panel_scratch(args.k_words * kPanel);
    for (std::int64_t p = begin; p < end; ++p) {
      kernels.pack_panel(weight, args.n, args.k_words, p, panel);
      kernels.linear(args, panel, p, p + 1);
    }
  });
}

}  // namespace disagg::cpu
