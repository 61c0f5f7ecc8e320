#include "core/delta_log.h"

#include <set>

#include "check.h"

using namespace disagg;
using test::Random;

namespace {

DeltaLog::Digest digest_of(const std::set<PageHash>& hashes) {
  DeltaLog::Digest digest{hashes.size(), 0};
  for (const PageHash hash : hashes) digest.xor_of_all ^= hash;
  return digest;
}

// The twin: two sets, what is held and what the listener was told.
void random_changes_reach_the_listener() {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Random random(seed);
    DeltaLog log;
    std::set<PageHash> held;
    std::set<PageHash> told;
    std::uint64_t seq = 0;
    for (int step = 0; step < 60'000; ++step) {
      const PageHash hash = random.below(1000);
      if (held.insert(hash).second) {
        log.on_stored(hash);
      } else {
        held.erase(hash);
        log.on_removed(hash);
      }
      if (random.below(5'000) != 0) continue;
      const std::set<PageHash> before = told;
      const DeltaLog::Delta delta = log.drain();
      for (const PageHash stored : delta.stored) CHECK(told.insert(stored).second);
      for (const PageHash removed : delta.removed) CHECK(told.erase(removed) == 1);
      for (const PageHash stored : delta.stored) CHECK(!before.contains(stored));
      seq += delta.stored.empty() && delta.removed.empty() ? 0 : 1;
      CHECK(delta.seq == seq && log.seq() == seq);
      CHECK(told == held);
      CHECK(log.digest() == digest_of(told));
    }
  }
}

void the_order_of_what_remains_is_kept() {
  DeltaLog log;
  for (const PageHash hash : {30, 10, 20}) log.on_stored(hash);
  for (const PageHash hash : {20, 10}) log.on_removed(hash);
  for (const PageHash hash : {10, 40}) log.on_stored(hash);
  CHECK((log.drain().stored == std::vector<PageHash>{30, 10, 40}));
  log.on_removed(40);
  log.on_removed(10);
  log.on_stored(40);
  log.on_removed(40);
  log.on_removed(30);
  CHECK((log.pending().removed == std::vector<PageHash>{10, 40, 30}));
  CHECK(log.seq() == 1);
}

void what_cancels_is_an_empty_drain() {
  DeltaLog log;
  CHECK(log.drain().seq == 0);
  log.on_stored(7);
  log.on_removed(7);
  const DeltaLog::Delta delta = log.drain();
  CHECK(delta.seq == 0 && delta.stored.empty() && delta.removed.empty());
}

}  // namespace

int main() {
  return test::run({
      {"random changes reach the listener", random_changes_reach_the_listener},
      {"the order of what remains is kept", the_order_of_what_remains_is_kept},
      {"what cancels is an empty drain", what_cancels_is_an_empty_drain},
  });
}
