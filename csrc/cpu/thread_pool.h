// ThreadPool splits short parallel loops over a few threads.
//
// The caller takes part and never waits for a thread that has not begun: on a machine whose cores
// are taken it does all the work itself. A worker that runs out of work spins for kSpin, so that the
// next operator of a step finds it awake, then sleeps in the kernel; idle, the pool costs nothing.
//
// Thread-safe: if a loop is running already, a second caller's loop runs on its own thread alone.
// After fork() the child has no workers; shared_pool() gives it a fresh pool.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace disagg::cpu {

class ThreadPool {
 public:
  // A step's operators follow each other within some 10 us; two processes share the cores, so
  // spinning for longer would take time from the other one's work.
  static constexpr std::chrono::microseconds kSpin{40};
  static constexpr int kMaxThreads = 128;

  ThreadPool() = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls body(item, slot) once for each item in [0, num_items), on at most `threads` threads, the
  // caller's included, and returns when all have returned. `slot` is below `threads` and no two calls
  // at one time share it. Workers are started when first needed. Requires: body does not throw.
  template <class Body>
  void run(std::int64_t num_items, int threads, Body&& body) {
    run_erased({[](void* context, std::int64_t item, int slot) {
                  (*static_cast<std::remove_reference_t<Body>*>(context))(item, slot);
                },
                &body, num_items, threads});
  }

  int num_workers() const { return static_cast<int>(workers_.size()); }

 private:
  struct Job {
    void (*call)(void* context, std::int64_t item, int slot) = nullptr;
    void* context = nullptr;
    std::int64_t num_items = 0;
    int threads = 0;
  };
  // state_ = epoch << 9 | open << 8 | workers inside. A worker enters by counting itself in while
  // the job is open; the caller closes it, waits until the count is 0, and only then lets go of it.
  static constexpr std::uint32_t kInside = 0xff, kOpen = 0x100, kEpoch = 0x200;

  void run_erased(Job job);
  void work(std::int64_t num_items, int slot);
  void serve(int slot);
  bool enter(std::uint32_t& seen, std::uint32_t last_epoch);
  std::uint32_t await_change(std::uint32_t seen);

  std::mutex busy_;
  std::vector<std::thread> workers_;
  Job job_;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<std::uint32_t> state_{0};
  alignas(64) std::atomic<std::int64_t> next_{0};
};

// The process's pool. Its threads are shared by every engine in it, as cores are.
ThreadPool& shared_pool();

// Processors that this process may run on.
int available_cpus();

}  // namespace disagg::cpu
