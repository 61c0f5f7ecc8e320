#include "cpu/thread_pool.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"

using namespace disagg::cpu;

namespace {

double cpu_seconds() {
  rusage used;
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec); };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

// Every item once, slots never shared, everything visible to the caller afterwards.
void each_item_runs_once() {
  ThreadPool pool;
  for (int round = 0; round < 20'000; ++round) {
    const int items = round % 37, threads = 1 + round % 5;
    std::vector<int> done(static_cast<std::size_t>(items));  // not atomic: run() must order them
    std::vector<std::atomic<int>> inside(static_cast<std::size_t>(threads));
    pool.run(items, threads, [&](std::int64_t item, int slot) {
      CHECK(slot >= 0 && slot < threads);
      CHECK(inside[static_cast<std::size_t>(slot)].fetch_add(1) == 0);
      done[static_cast<std::size_t>(item)] += 1;
      inside[static_cast<std::size_t>(slot)].fetch_sub(1);
    });
    for (const int count : done) CHECK(count == 1);
  }
}

// A second caller, or a body that calls again, must not wait for the first: it works alone.
void callers_do_not_wait_for_each_other() {
  ThreadPool pool;
  std::vector<std::thread> callers;
  std::atomic<std::int64_t> sum{0};
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 2'000; ++round) pool.run(10, 3, [&](std::int64_t item, int) { sum += item; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 3 * 2'000 * 45);
}

// Workers that have nothing to do are asleep: a server that waits for requests costs nothing.
void idle_workers_cost_nothing() {
  ThreadPool pool;
  pool.run(8, 4, [](std::int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(cpu_seconds() - before < 0.01);
  std::atomic<int> count{0};
  pool.run(100, 4, [&](std::int64_t, int) { ++count; });  // and they wake
  CHECK(count == 100);
}

// A forked child has none of the threads; it must not wait for them.
void a_forked_child_has_a_pool_of_its_own() {
  const auto sum = [] {
    std::atomic<std::int64_t> total{0};
    shared_pool().run(1000, 3, [&](std::int64_t item, int) { total += item; });
    return total.load();
  };
  CHECK(sum() == 499'500);
  const pid_t child = fork();
  if (child == 0) _exit(sum() == 499'500 ? 0 : 1);
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

}  // namespace

int main() {
  each_item_runs_once();
  callers_do_not_wait_for_each_other();
  idle_workers_cost_nothing();
  a_forked_child_has_a_pool_of_its_own();
}
