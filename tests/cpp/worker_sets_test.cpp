#include "core/worker_sets.h"

#include <map>
#include <set>
#include <vector>

#include "check.h"

using namespace disagg;
using test::Random;

namespace {

std::set<WorkerId> members(const WorkerSets& sets, SetId id) {
  std::set<WorkerId> workers;
  for (const auto& word : sets.words_of(id)) {
    for (std::uint64_t bit = 0; bit < 64; ++bit) {
      if (word.bits >> bit & 1) workers.insert(static_cast<WorkerId>(word.position * 64 + bit));
    }
  }
  return workers;
}

// Twenty holders each write down one set; now and then one of them changes its set by one worker.
void random_changes_agree_with_real_sets(WorkerId num_workers, std::uint64_t seed) {
  Random random(seed);
  WorkerSets sets;
  std::vector<SetId> held(20, kEmptySet);
  std::vector<std::set<WorkerId>> twins(held.size());
  for (int step = 0; step < 2000; ++step) {
    const std::size_t holder = random.below(held.size());
    const auto worker = static_cast<WorkerId>(random.below(num_workers));
    const bool joins = random.below(5) < 3;
    if (joins) {
      twins[holder].insert(worker);
    } else {
      twins[holder].erase(worker);
    }
    const SetId to = joins ? sets.with(held[holder], worker) : sets.without(held[holder], worker);
    if (to != held[holder]) {
      sets.acquire(to, 1);
      sets.release(held[holder], 1);
      held[holder] = to;
    }
    CHECK(sets.contains(to, worker) == joins);
    CHECK(members(sets, to) == twins[holder]);
    const std::size_t other = random.below(held.size());
    CHECK((held[holder] == held[other]) == (twins[holder] == twins[other]));
  }
  std::map<SetId, std::uint32_t> num_holders;
  for (const SetId set : held) ++num_holders[set];
  const std::string broken = sets.audit([&](SetId set) { return num_holders[set]; });
  CHECK(broken.empty());
  for (SetId set : held) sets.release(set, 1);
  CHECK(sets.num_sets() == 0);
}

void random_changes_agree_with_real_sets() {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    for (const WorkerId num_workers : {2U, 5U, 64U, 65U, 700U, kMaxWorkers}) {
      random_changes_agree_with_real_sets(num_workers, seed);
    }
  }
}

void the_space_of_freed_sets_is_used_again() {
  WorkerSets sets;
  const auto churn = [&sets] {
    SetId set = kEmptySet;
    for (WorkerId worker = 0; worker < kMaxWorkers; worker += 64) {
      const SetId larger = sets.with(set, worker);
      sets.acquire(larger, 1);
      sets.release(set, 1);
      set = larger;
    }
    sets.release(set, 1);
  };
  churn();
  const std::size_t num_bytes = sets.memory_bytes();
  for (int i = 0; i < 100; ++i) churn();
  CHECK(sets.memory_bytes() == num_bytes);
}

}  // namespace

int main() {
  return test::run({
      {"random changes agree with real sets", [] { random_changes_agree_with_real_sets(); }},
      {"the space of freed sets is used again", the_space_of_freed_sets_is_used_again},
  });
}
