// WorkerSets keeps each distinct set of workers once and names it by a number.
//
// Neighbouring pages of a prompt are held by the same workers, so a million pages share a few
// thousand sets, and two pages are held by the same workers exactly when their numbers are equal.
// A set is kept as its non-empty 64-bit words: four workers of 64 take one, four of 4,096 at most
// four.
//
// Sets are counted. Whoever writes a number down acquires it and releases it when overwriting it; a
// set that nobody holds is freed and its number used again.
//
// Threading: not thread-safe. Cost: 16 bytes and 16 a word, words rounded up to a power of two.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace disagg {

using WorkerId = std::uint32_t;
using SetId = std::uint32_t;

inline constexpr WorkerId kMaxWorkers = 4096;
inline constexpr std::size_t kMaxWords = kMaxWorkers / 64;
inline constexpr SetId kEmptySet = 0;  // not counted

class WorkerSets {
 public:
  // Workers 64 * position to 64 * position + 63, a bit each.
  struct alignas(16) Word {
    std::uint64_t bits;
    std::uint64_t position;
    bool operator==(const Word&) const = default;
  };

  WorkerSets();

  // The words of a set: none empty, positions rising. Valid until a call that is not const.
  [[nodiscard]] std::span<const Word> words_of(SetId set) const {
    return {cells_.data() + set + 1, header_of(set).num_words};
  }

  // A note on a set for whoever searches: a position in a prompt, 0 until there is one.
  [[nodiscard]] std::int32_t last_end(SetId set) const {
    return static_cast<std::int32_t>(header_of(set).last_end);
  }
  void note_end(SetId set, std::int32_t position);

  [[nodiscard]] bool contains(SetId set, WorkerId worker) const;

  // Returns the set with (without) `worker`. Acquire it before any other call: a new set is held by
  // nobody yet. O(words). Requires: worker < kMaxWorkers.
  [[nodiscard]] SetId with(SetId set, WorkerId worker);
  [[nodiscard]] SetId without(SetId set, WorkerId worker);

  // Counts `times` holders more (less). Requires: no more are released than were acquired.
  void acquire(SetId set, std::uint32_t times);
  void release(SetId set, std::uint32_t times);

  [[nodiscard]] std::size_t num_sets() const { return num_sets_; }
  [[nodiscard]] std::size_t memory_bytes() const;

  // Returns what is wrong, or an empty string; `num_holders` tells how often a set is written down.
  [[nodiscard]] std::string audit(const std::function<std::uint32_t(SetId)>& num_holders) const;

 private:
  // Lies in the cell before a set's words; the index of that cell is the set's number.
  struct Header {
    std::uint32_t num_holders;
    std::uint32_t hash;
    SetId next;  // in the bucket of `hash`, or in the free list
    std::uint32_t num_words : 8;
    std::uint32_t last_end : 24;
  };
  static_assert(sizeof(Header) == sizeof(Word));

  [[nodiscard]] Header header_of(SetId set) const { return std::bit_cast<Header>(cells_[set]); }
  void put_header(SetId set, const Header& header);
  [[nodiscard]] SetId intern(std::span<const Word> words);
  [[nodiscard]] SetId allocate(std::size_t num_words);
  void free(SetId set);
  void grow_buckets();

  std::vector<Word> cells_;     // headers and words of all sets
  std::vector<SetId> buckets_;  // power of two
  std::array<SetId, 8> free_{};  // cells of freed sets, by the logarithm of how many words fit
  std::size_t num_sets_ = 0;
};

}  // namespace disagg
