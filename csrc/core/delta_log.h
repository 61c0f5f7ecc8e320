// DeltaLog remembers which page hashes a prefix cache gained and lost since it was last asked, and
// what its listener knows: everything up to the last drain.
//
// A hash gained and lost between two drains cancels, whichever came first. The log stays in
// proportion to the cache when nobody drains it: it cancels by itself as it doubles.
//
// Threading: owned by the scheduler thread; not thread-safe.
// Requires: on_stored and on_removed alternate for each hash. Two pages whose hashes collide break
// that by chance (2^-64 a pair); then the digest disagrees until the cache is emptied, no more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/page_hash.h"

namespace disagg {

class DeltaLog {
 public:
  struct Delta {
    std::uint64_t seq;              // counts the drains that were not empty
    std::vector<PageHash> stored;   // parents before children, where they were stored so
    std::vector<PageHash> removed;  // children before parents, where they were removed so
  };
  // Count and XOR of all hashes: two caches that agree in both agree, up to chance.
  struct Digest {
    std::uint64_t count = 0;
    std::uint64_t xor_of_all = 0;
    bool operator==(const Digest&) const = default;
  };

  // Amortized O(log n) each, n the net changes since the last drain; in most calls one append.
  void on_stored(PageHash hash) { append({hash, true}); }
  void on_removed(PageHash hash) { append({hash, false}); }

  // Returns the net changes and forgets them. O(n log n); O(n) when all point one way.
  [[nodiscard]] Delta drain();

  // Returns the net changes without forgetting them; `seq` is the last one drained.
  [[nodiscard]] Delta pending() const;

  // As of the last drain.
  [[nodiscard]] std::uint64_t seq() const { return seq_; }
  [[nodiscard]] const Digest& digest() const { return drained_; }

 private:
  struct Event {
    PageHash hash;
    bool stored;
  };
  static void cancel(std::vector<Event>& events);
  void append(Event event);

  std::vector<Event> events_;
  std::size_t cancel_at_ = 4096;  // events
  std::uint64_t seq_ = 0;
  Digest drained_;
};

}  // namespace disagg
