// PrefixIndex is a router's picture of what every worker's prefix cache holds, and answers for one
// prompt how many of its pages each worker has.
//
// It maps a page hash to the set of workers that hold the page. Page hashes are chained, so a hash
// stands for a whole prefix; workers evict the last page of a prompt first, so a worker that holds
// page i holds every page before it. Hence the set of holders only shrinks along a prompt, and where
// two positions have the same set, so has everything between: a lookup probes a few positions at
// once and then looks only between those that differ. It reads O(changes * log(pages)) hashes, where
// changes is the number of distinct match lengths, never more than every page.
//
// Prompts share beginnings, so a set tends to end where it ended in the lookup before: every set
// remembers that place and it is tried first. A right guess saves the search, a wrong one narrows it.
//
// Robust to lies. Summaries arrive late, so a worker may have holes for a while. Then the answer for
// that worker is the length of some prefix whose last page it was seen to hold, where it was seen to
// hold every page probed before, and seen not to hold the next page (or there is none): at most the
// true match plus holes nobody probed. Removing what is absent and storing what is held change
// nothing. Hashes may be any 64-bit numbers.
//
// Threading: owned by one thread; not thread-safe. match() writes too, the guesses.
//
// Layout: 256 shards of 64-byte buckets, five entries each, so that almost every probe is one cache
// line and growing moves one shard at a time (no long stall, little slack). An entry is a hash and a
// number of a set (see WorkerSets): 12 bytes, about 16 a page with the slack.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/delta_log.h"
#include "core/page_hash.h"
#include "core/worker_sets.h"

namespace disagg {

class PrefixIndex {
 public:
  using Digest = DeltaLog::Digest;

  PrefixIndex();

  // Notes that `worker` now holds these pages (holds them no more). One probe a hash.
  // Requires: worker < kMaxWorkers.
  void store(WorkerId worker, std::span<const PageHash> hashes);
  void remove(WorkerId worker, std::span<const PageHash> hashes);

  // Forgets all that `worker` holds. O(size of the index).
  void drop_worker(WorkerId worker);

  // Writes for each worker how many leading pages of the prompt it holds.
  // Requires: lengths.size() == num_workers(); hashes.size() < 2^31.
  void match(std::span<const PageHash> hashes, std::span<std::int32_t> lengths);

  // Count and XOR of what `worker` holds, to compare with the digest that it sends.
  [[nodiscard]] Digest digest(WorkerId worker) const;

  // One more than the highest worker that ever stored.
  [[nodiscard]] std::size_t num_workers() const { return digests_.size(); }
  [[nodiscard]] std::size_t num_hashes() const;
  [[nodiscard]] std::size_t memory_bytes() const;

  // Returns what is wrong, or an empty string. O(size of the index).
  [[nodiscard]] std::string audit() const;

 private:
  static constexpr std::size_t kNumShards = 256;
  static constexpr std::size_t kBucketEntries = 5;

  // Entries whose set is empty are free. An entry lies in its home bucket or, that being full, in the
  // first one after it with room; every full bucket it passed counts it.
  struct alignas(64) Bucket {
    std::array<PageHash, kBucketEntries> hashes{};
    std::array<SetId, kBucketEntries> sets{};
    std::uint32_t num_passed = 0;
  };
  static_assert(sizeof(Bucket) == 64);

  struct Shard {
    std::unique_ptr<Bucket[]> buckets;
    std::uint32_t num_buckets = 0;
    std::uint32_t num_entries = 0;
  };

  // A place within a shard.
  struct Entry {
    std::uint32_t bucket;
    std::uint32_t slot;
  };
  class Moves;
  class Search;

  [[nodiscard]] static std::uint64_t spread(PageHash hash);
  [[nodiscard]] static std::uint32_t home_of(const Shard& shard, std::uint64_t spread_hash);
  [[nodiscard]] static std::optional<Entry> find_entry(const Shard& shard, PageHash hash);
  static Entry add_entry(Shard& shard, PageHash hash, SetId set);
  static void erase_entry(Shard& shard, Entry entry);
  static void resize(Shard& shard, std::uint32_t num_buckets);
  static void shrink(Shard& shard);

  [[nodiscard]] const Shard& shard_of(PageHash hash) const { return shards_[spread(hash) >> 56]; }
  [[nodiscard]] Shard& shard_of(PageHash hash) { return shards_[spread(hash) >> 56]; }
  [[nodiscard]] SetId find(PageHash hash) const;
  void prefetch(PageHash hash) const;

  std::array<Shard, kNumShards> shards_;
  WorkerSets sets_;
  std::vector<Digest> digests_;  // by worker
};

}  // namespace disagg
