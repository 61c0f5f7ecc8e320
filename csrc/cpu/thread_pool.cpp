#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace disagg::cpu {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

std::atomic<ThreadPool*> process_pool{nullptr};

}  // namespace

ThreadPool::~ThreadPool() {
  stop_.store(true);
  state_.fetch_add(kEpoch);
  state_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(std::int64_t num_items, int slot) {
  for (;;) {
    const std::int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    if (item >= num_items) return;
    job_.call(job_.context, item, slot);
  }
}

void ThreadPool::run_erased(Job job) {
  job.threads = static_cast<int>(std::min<std::int64_t>({job.threads, job.num_items, kMaxThreads}));
  std::unique_lock lock(busy_, std::defer_lock);
  if (job.threads <= 1 || !lock.try_lock()) {
    for (std::int64_t item = 0; item < job.num_items; ++item) job.call(job.context, item, 0);
    return;
  }
  while (num_workers() < job.threads - 1)
    workers_.emplace_back([this, slot = num_workers() + 1] { serve(slot); });
  job_ = job;
  next_.store(0, std::memory_order_relaxed);
  // Nobody is inside: the epoch goes up by one and the job opens in one store.
  state_.store(((state_.load(std::memory_order_relaxed) & ~(kInside | kOpen)) + kEpoch) | kOpen);
  state_.notify_all();
  work(job.num_items, 0);
  std::uint32_t state = state_.fetch_and(~kOpen) & ~kOpen;
  while ((state & kInside) != 0) state = await_change(state);
}

// Spins, then sleeps, until the state differs from `seen`; returns it.
std::uint32_t ThreadPool::await_change(std::uint32_t seen) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t state = state_.load();
      if (state != seen) return state;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  state_.wait(seen);
  return state_.load();
}

// Counts the worker into an open job that it has not served yet. On failure `seen` is what it saw.
bool ThreadPool::enter(std::uint32_t& seen, std::uint32_t last_epoch) {
  while ((seen & kOpen) != 0 && seen / kEpoch != last_epoch)
    if (state_.compare_exchange_weak(seen, seen + 1)) return true;
  return false;
}

void ThreadPool::serve(int slot) {
  std::uint32_t last_epoch = 0, seen = state_.load();
  while (!stop_.load(std::memory_order_relaxed)) {
    if (!enter(seen, last_epoch)) {
      seen = await_change(seen);
      continue;
    }
    last_epoch = seen / kEpoch;
    if (slot < job_.threads) work(job_.num_items, slot);
    seen = state_.fetch_sub(1) - 1;
    // The caller may sleep, waiting for the last one to leave.
    if ((seen & (kOpen | kInside)) == 0) state_.notify_all();
  }
}

ThreadPool& shared_pool() {
  if (ThreadPool* pool = process_pool.load(std::memory_order_acquire)) return *pool;
  static std::once_flag registered;
  // The child of a fork has none of the threads, and maybe a lock that nobody will ever release.
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, [] { process_pool.store(nullptr); }); });
  // Never destroyed: its threads may be asleep in it when the process ends.
  auto fresh = std::make_unique<ThreadPool>();
  ThreadPool* expected = nullptr;
  if (process_pool.compare_exchange_strong(expected, fresh.get())) return *fresh.release();
  return *expected;
}

int available_cpus() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace disagg::cpu
