#include "core/prefix_index.h"

#include <algorithm>
#include <bit>
#include <unordered_map>
#include <utility>

namespace disagg {
namespace {

// Hashes whose cache lines are on their way while one is worked on.
constexpr std::size_t kLookahead = 8;
// Parts a gap is cut into in one round of a search. A round waits twice for memory, for the hashes and
// for their buckets, whatever the number of parts; 16 parts read so many more lines that they take
// longer, 2 to 6 are alike (AMD EPYC, an index larger than the cache).
constexpr std::int32_t kFanout = 4;
// A search of 2^31 positions takes 16 rounds, each leaving fewer gaps than it has parts; a guess leaves 3.
constexpr std::size_t kMaxGaps = 16 * kFanout + 3;

constexpr double kMaxLoad = 0.85;
constexpr double kMinLoad = 0.35;
constexpr double kShrunkLoad = 0.6;

}  // namespace

// Works out what becomes of a set when one worker joins or leaves it. Neighbouring pages have the
// same set, so the answer is kept, and holders are counted once a run of equal sets.
class PrefixIndex::Moves {
 public:
  Moves(WorkerSets& sets, WorkerId worker, bool joins) : sets_(sets), worker_(worker), joins_(joins) {}
  ~Moves() { finish_run(); }
  Moves(const Moves&) = delete;
  Moves& operator=(const Moves&) = delete;

  // Returns the set that replaces `set` in an entry; the same if nothing changes.
  SetId move(SetId set) {
    if (set != from_ || !has_run_) {
      finish_run();
      from_ = set;
      to_ = joins_ ? sets_.with(set, worker_) : sets_.without(set, worker_);
      has_run_ = true;
    }
    num_moved_ += to_ != from_ ? 1 : 0;
    return to_;
  }

 private:
  void finish_run() {
    if (num_moved_ == 0) return;
    sets_.acquire(to_, num_moved_);
    sets_.release(from_, num_moved_);
    num_moved_ = 0;
  }

  WorkerSets& sets_;
  WorkerId worker_;
  bool joins_;
  bool has_run_ = false;
  SetId from_ = kEmptySet;
  SetId to_ = kEmptySet;
  std::uint32_t num_moved_ = 0;
};

// One lookup: finds where along a prompt workers drop out.
class PrefixIndex::Search {
 public:
  Search(PrefixIndex& index, std::span<const PageHash> hashes, std::span<std::int32_t> lengths)
      : index_(index), hashes_(hashes), lengths_(lengths) {}

  void run() {
    const auto last = static_cast<std::int32_t>(hashes_.size() - 1);
    prefetch(0);
    prefetch(last);
    const SetId first_set = set_at(0);
    if (first_set == kEmptySet) return;
    std::fill_n(alive_.begin(), (lengths_.size() + 63) / 64, std::uint64_t{0});
    for (const auto& word : index_.sets_.words_of(first_set)) alive_[word.position] = word.bits;
    follow_guesses({0, last, first_set, set_at(last)});
    while (num_gaps_ > 0) narrow(gaps_[--num_gaps_]);
    for (const auto& word : index_.sets_.words_of(first_set)) {
      settle(word.position, ~std::uint64_t{0}, last + 1);
    }
  }

 private:
  // Two positions; where their sets differ, some workers drop out between them.
  struct Gap {
    std::int32_t low;
    std::int32_t high;
    SetId low_set;
    SetId high_set;
  };

  void prefetch(std::int32_t position) const { index_.prefetch(hashes_[static_cast<std::size_t>(position)]); }
  SetId set_at(std::int32_t position) const {
    return index_.find(hashes_[static_cast<std::size_t>(position)]);
  }

  static std::int32_t step_of(const Gap& gap) { return (gap.high - gap.low + kFanout - 1) / kFanout; }

  // Adds a gap to those still to be narrowed, and asks for the memory that it will need.
  void push(const Gap& gap) {
    if (gap.low_set == gap.high_set) return;
    const std::int32_t step = step_of(gap);
    for (std::int64_t at = std::int64_t{gap.low} + step; at < gap.high; at += step) {
      prefetch(static_cast<std::int32_t>(at));
    }
    gaps_[num_gaps_++] = gap;
  }

  // Goes from one set to the next by where each ended in the lookup before, while that is right.
  void follow_guesses(Gap gap) {
    while (gap.low_set != gap.high_set && gap.low_set != kEmptySet) {
      const std::int32_t guess = index_.sets_.last_end(gap.low_set);
      if (guess <= gap.low || guess >= gap.high) break;
      prefetch(guess + 1);
      const Gap end{guess, guess + 1, set_at(guess), set_at(guess + 1)};
      const Gap rest{end.high, gap.high, end.high_set, gap.high_set};
      if (end.low_set != gap.low_set) {
        push(rest);
        push(end);
        push({gap.low, guess, gap.low_set, end.low_set});
        return;
      }
      drop(end);
      gap = rest;
    }
    push(gap);
  }

  // Settles the workers that drop out in the leftmost gap, or cuts it into smaller gaps. Gaps are
  // taken from left to right, so a worker counts where it is first missed.
  void narrow(const Gap gap) {
    const std::int32_t step = step_of(gap);
    const std::size_t first_gap = num_gaps_;
    Gap part = gap;
    while (part.low < gap.high && part.low_set != kEmptySet) {
      part.high = gap.high - part.low > step ? part.low + step : gap.high;
      part.high_set = part.high < gap.high ? set_at(part.high) : gap.high_set;
      if (step == 1) {
        drop(part);
      } else {
        push(part);
      }
      part.low = part.high;
      part.low_set = part.high_set;
    }
    std::reverse(gaps_.begin() + static_cast<std::ptrdiff_t>(first_gap),
                 gaps_.begin() + static_cast<std::ptrdiff_t>(num_gaps_));
  }

  // Settles who is in the set of one position and not in that of the next.
  void drop(const Gap& gap) {
    if (gap.low_set == gap.high_set) return;
    // Only where the prompt goes on in a smaller set: there other prompts branch off, and the next
    // one will too. Where it goes on in none, it is this prompt that is new.
    if (gap.high_set != kEmptySet) index_.sets_.note_end(gap.low_set, gap.low);
    const auto high = index_.sets_.words_of(gap.high_set);
    auto kept = high.begin();
    for (const auto& word : index_.sets_.words_of(gap.low_set)) {
      while (kept != high.end() && kept->position < word.position) ++kept;
      const bool has_kept = kept != high.end() && kept->position == word.position;
      settle(word.position, word.bits & ~(has_kept ? kept->bits : 0), gap.high);
    }
  }

  // Writes the length of those workers that are still to be settled.
  void settle(std::uint64_t position, std::uint64_t bits, std::int32_t length) {
    bits &= alive_[position];
    alive_[position] &= ~bits;
    for (; bits != 0; bits &= bits - 1) {
      lengths_[position * 64 + static_cast<std::uint64_t>(std::countr_zero(bits))] = length;
    }
  }

  PrefixIndex& index_;
  std::span<const PageHash> hashes_;
  std::span<std::int32_t> lengths_;
  std::array<std::uint64_t, kMaxWords> alive_;  // workers not settled yet, as words of a set
  std::array<Gap, kMaxGaps> gaps_;              // the leftmost last
  std::size_t num_gaps_ = 0;
};

PrefixIndex::PrefixIndex() {
  for (Shard& shard : shards_) resize(shard, 1);
}

void PrefixIndex::store(WorkerId worker, std::span<const PageHash> hashes) {
  if (worker >= digests_.size()) digests_.resize(worker + 1);
  Digest& digest = digests_[worker];
  Moves moves(sets_, worker, true);
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    if (i + kLookahead < hashes.size()) prefetch(hashes[i + kLookahead]);
    Shard& shard = shard_of(hashes[i]);
    const std::optional<Entry> entry = find_entry(shard, hashes[i]);
    SetId* const set = entry ? &shard.buckets[entry->bucket].sets[entry->slot] : nullptr;
    const SetId old_set = set != nullptr ? *set : kEmptySet;
    const SetId new_set = moves.move(old_set);
    if (new_set == old_set) continue;
    if (set != nullptr) {
      *set = new_set;
    } else {
      if (shard.num_entries + 1 > kMaxLoad * kBucketEntries * shard.num_buckets) {
        resize(shard, shard.num_buckets + shard.num_buckets / 4 + 1);
      }
      add_entry(shard, hashes[i], new_set);
    }
    ++digest.count;
    digest.xor_of_all ^= hashes[i];
  }
}

void PrefixIndex::remove(WorkerId worker, std::span<const PageHash> hashes) {
  if (worker >= digests_.size()) return;
  Digest& digest = digests_[worker];
  Moves moves(sets_, worker, false);
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    if (i + kLookahead < hashes.size()) prefetch(hashes[i + kLookahead]);
    Shard& shard = shard_of(hashes[i]);
    const std::optional<Entry> entry = find_entry(shard, hashes[i]);
    if (!entry) continue;
    SetId& set = shard.buckets[entry->bucket].sets[entry->slot];
    const SetId new_set = moves.move(set);
    if (new_set == set) continue;
    set = new_set;
    if (new_set == kEmptySet) {
      erase_entry(shard, *entry);
      shrink(shard);
    }
    --digest.count;
    digest.xor_of_all ^= hashes[i];
  }
}

void PrefixIndex::drop_worker(WorkerId worker) {
  if (worker >= digests_.size()) return;
  struct Change {
    SetId to;
    std::uint32_t times;
  };
  std::unordered_map<SetId, Change> changes;
  for (Shard& shard : shards_) {
    for (std::uint32_t bucket = 0; bucket < shard.num_buckets; ++bucket) {
      for (std::uint32_t slot = 0; slot < kBucketEntries; ++slot) {
        SetId& set = shard.buckets[bucket].sets[slot];
        if (!sets_.contains(set, worker)) continue;
        const auto [change, is_new] = changes.try_emplace(set, Change{kEmptySet, 0});
        if (is_new) change->second.to = sets_.without(set, worker);
        ++change->second.times;
        set = change->second.to;
        if (set == kEmptySet) erase_entry(shard, {bucket, slot});
      }
    }
    shrink(shard);
  }
  for (const auto& [from, change] : changes) sets_.acquire(change.to, change.times);
  for (const auto& [from, change] : changes) sets_.release(from, change.times);
  digests_[worker] = {};
}

void PrefixIndex::match(std::span<const PageHash> hashes, std::span<std::int32_t> lengths) {
  std::ranges::fill(lengths, 0);
  if (!hashes.empty() && !lengths.empty()) Search(*this, hashes, lengths).run();
}

PrefixIndex::Digest PrefixIndex::digest(WorkerId worker) const {
  return worker < digests_.size() ? digests_[worker] : Digest{};
}

std::size_t PrefixIndex::num_hashes() const {
  std::size_t count = 0;
  for (const Shard& shard : shards_) count += shard.num_entries;
  return count;
}

std::size_t PrefixIndex::memory_bytes() const {
  std::size_t num_bytes = sizeof(*this) + sets_.memory_bytes() + digests_.capacity() * sizeof(Digest);
  for (const Shard& shard : shards_) num_bytes += shard.num_buckets * sizeof(Bucket);
  return num_bytes;
}

// The table

// Page hashes are spread well, but nothing here may depend on it: a product's upper bits depend on
// every bit of the hash.
std::uint64_t PrefixIndex::spread(PageHash hash) { return hash * 0x9e3779b97f4a7c15ULL; }

std::uint32_t PrefixIndex::home_of(const Shard& shard, std::uint64_t spread_hash) {
  const std::uint64_t below_shard = spread_hash << 8 >> 32;
  return static_cast<std::uint32_t>(below_shard * shard.num_buckets >> 32);
}

void PrefixIndex::prefetch(PageHash hash) const {
  const Shard& shard = shard_of(hash);
  __builtin_prefetch(&shard.buckets[home_of(shard, spread(hash))]);
}

// find_entry without saying where: the entry's set, or none.
SetId PrefixIndex::find(PageHash hash) const {
  const Shard& shard = shard_of(hash);
  std::uint32_t at = home_of(shard, spread(hash));
  for (std::uint32_t num_probed = 0; num_probed < shard.num_buckets; ++num_probed) {
    const Bucket& bucket = shard.buckets[at];
    SetId found = kEmptySet;  // at most one entry agrees, so no branch is needed to pick it
    for (std::size_t slot = 0; slot < kBucketEntries; ++slot) {
      found |= bucket.hashes[slot] == hash ? bucket.sets[slot] : kEmptySet;
    }
    if (found != kEmptySet || bucket.num_passed == 0) return found;
    at = at + 1 == shard.num_buckets ? 0 : at + 1;
  }
  return kEmptySet;
}

std::optional<PrefixIndex::Entry> PrefixIndex::find_entry(const Shard& shard, PageHash hash) {
  std::uint32_t at = home_of(shard, spread(hash));
  for (std::uint32_t num_probed = 0; num_probed < shard.num_buckets; ++num_probed) {
    const Bucket& bucket = shard.buckets[at];
    for (std::uint32_t slot = 0; slot < kBucketEntries; ++slot) {
      if (bucket.hashes[slot] == hash && bucket.sets[slot] != kEmptySet) return Entry{at, slot};
    }
    if (bucket.num_passed == 0) break;
    at = at + 1 == shard.num_buckets ? 0 : at + 1;
  }
  return std::nullopt;
}

// Requires: the hash is absent and the shard has room.
PrefixIndex::Entry PrefixIndex::add_entry(Shard& shard, PageHash hash, SetId set) {
  for (std::uint32_t at = home_of(shard, spread(hash));; at = at + 1 == shard.num_buckets ? 0 : at + 1) {
    Bucket& bucket = shard.buckets[at];
    const auto slot = std::ranges::find(bucket.sets, kEmptySet) - bucket.sets.begin();
    if (static_cast<std::size_t>(slot) == kBucketEntries) {
      ++bucket.num_passed;
      continue;
    }
    bucket.hashes[static_cast<std::size_t>(slot)] = hash;
    bucket.sets[static_cast<std::size_t>(slot)] = set;
    ++shard.num_entries;
    return {at, static_cast<std::uint32_t>(slot)};
  }
}

void PrefixIndex::erase_entry(Shard& shard, Entry entry) {
  Bucket& bucket = shard.buckets[entry.bucket];
  bucket.sets[entry.slot] = kEmptySet;
  --shard.num_entries;
  std::uint32_t at = home_of(shard, spread(bucket.hashes[entry.slot]));
  for (; at != entry.bucket; at = at + 1 == shard.num_buckets ? 0 : at + 1) --shard.buckets[at].num_passed;
}

void PrefixIndex::shrink(Shard& shard) {
  if (shard.num_buckets <= 1 || shard.num_entries >= kMinLoad * kBucketEntries * shard.num_buckets) return;
  resize(shard, static_cast<std::uint32_t>(shard.num_entries / (kShrunkLoad * kBucketEntries)) + 1);
}

void PrefixIndex::resize(Shard& shard, std::uint32_t num_buckets) {
  Shard old = std::exchange(shard, {std::make_unique<Bucket[]>(num_buckets), num_buckets, 0});
  for (std::uint32_t at = 0; at < old.num_buckets; ++at) {
    const Bucket& bucket = old.buckets[at];
    for (std::size_t slot = 0; slot < kBucketEntries; ++slot) {
      if (bucket.sets[slot] != kEmptySet) add_entry(shard, bucket.hashes[slot], bucket.sets[slot]);
    }
  }
}

std::string PrefixIndex::audit() const {
  std::unordered_map<SetId, std::uint32_t> num_holders;
  std::vector<Digest> digests(digests_.size());
  for (const Shard& shard : shards_) {
    std::vector<std::uint32_t> num_passed(shard.num_buckets, 0);
    std::size_t num_entries = 0;
    for (std::uint32_t bucket = 0; bucket < shard.num_buckets; ++bucket) {
      for (std::size_t slot = 0; slot < kBucketEntries; ++slot) {
        const SetId set = shard.buckets[bucket].sets[slot];
        const PageHash hash = shard.buckets[bucket].hashes[slot];
        if (set == kEmptySet) continue;
        ++num_entries;
        ++num_holders[set];
        if (&shard_of(hash) != &shard || find(hash) != set) return "prefix index: an entry is not found";
        std::uint32_t at = home_of(shard, spread(hash));
        for (; at != bucket; at = at + 1 == shard.num_buckets ? 0 : at + 1) ++num_passed[at];
        for (const auto& word : sets_.words_of(set)) {
          for (std::uint64_t bits = word.bits; bits != 0; bits &= bits - 1) {
            const auto worker = word.position * 64 + static_cast<std::uint64_t>(std::countr_zero(bits));
            if (worker >= digests.size()) return "prefix index: a worker that never stored";
            ++digests[worker].count;
            digests[worker].xor_of_all ^= hash;
          }
        }
      }
    }
    if (num_entries != shard.num_entries) return "prefix index: a shard miscounts its entries";
    for (std::uint32_t bucket = 0; bucket < shard.num_buckets; ++bucket) {
      if (shard.buckets[bucket].num_passed != num_passed[bucket]) {
        return "prefix index: a bucket miscounts who passed";
      }
    }
  }
  if (digests != digests_) return "prefix index: a digest disagrees with the entries";
  return sets_.audit([&num_holders](SetId set) {
    const auto found = num_holders.find(set);
    return found == num_holders.end() ? 0 : found->second;
  });
}

}  // namespace disagg
