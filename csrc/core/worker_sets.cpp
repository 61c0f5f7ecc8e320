#include "core/worker_sets.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace disagg {
namespace {

std::uint32_t hash_of(std::span<const WorkerSets::Word> words) {
  std::uint64_t hash = 0;
  for (const auto& word : words) {
    hash = (std::rotl(hash, 29) ^ word.bits ^ word.position) * 0x9e3779b97f4a7c15ULL;
    hash ^= hash >> 32;
  }
  return static_cast<std::uint32_t>(hash);
}

// How many words are set aside for a set of `num_words`, as a power of two.
std::size_t size_class(std::size_t num_words) {
  return static_cast<std::size_t>(std::bit_width(num_words - 1));
}

}  // namespace

// Set 0 is the empty set: a header without words.
WorkerSets::WorkerSets() : cells_(1), buckets_(64, kEmptySet) {}

void WorkerSets::put_header(SetId set, const Header& header) { cells_[set] = std::bit_cast<Word>(header); }

// Past 2^24 pages nothing is noted: there are no such prompts.
void WorkerSets::note_end(SetId set, std::int32_t position) {
  if (position >= 1 << 24) return;
  Header header = header_of(set);
  header.last_end = static_cast<std::uint32_t>(position) & 0xffffffU;
  put_header(set, header);
}

bool WorkerSets::contains(SetId set, WorkerId worker) const {
  for (const Word& word : words_of(set)) {
    if (word.position == worker / 64) return (word.bits >> (worker % 64) & 1) != 0;
  }
  return false;
}

SetId WorkerSets::with(SetId set, WorkerId worker) {
  std::array<Word, kMaxWords> words;
  const std::uint64_t position = worker / 64;
  const std::uint64_t bit = std::uint64_t{1} << (worker % 64);
  const std::span<const Word> old = words_of(set);
  const auto split = std::lower_bound(old.begin(), old.end(), position,
                                      [](const Word& word, std::uint64_t at) { return word.position < at; });
  auto end = std::copy(old.begin(), split, words.begin());
  const bool has_word = split != old.end() && split->position == position;
  *end++ = {bit | (has_word ? split->bits : 0), position};
  end = std::copy(has_word ? split + 1 : split, old.end(), end);
  return intern({words.begin(), end});
}

SetId WorkerSets::without(SetId set, WorkerId worker) {
  std::array<Word, kMaxWords> words;
  auto end = words.begin();
  for (Word word : words_of(set)) {
    if (word.position == worker / 64) word.bits &= ~(std::uint64_t{1} << (worker % 64));
    if (word.bits != 0) *end++ = word;
  }
  return intern({words.begin(), end});
}

SetId WorkerSets::intern(std::span<const Word> words) {
  if (words.empty()) return kEmptySet;
  const std::uint32_t hash = hash_of(words);
  for (SetId set = buckets_[hash & (buckets_.size() - 1)]; set != kEmptySet; set = header_of(set).next) {
    if (std::ranges::equal(words_of(set), words)) return set;
  }
  if (num_sets_ >= buckets_.size()) grow_buckets();
  const SetId set = allocate(words.size());
  SetId& bucket = buckets_[hash & (buckets_.size() - 1)];
  put_header(set, {0, hash, std::exchange(bucket, set), static_cast<std::uint32_t>(words.size()) & 0xffU, 0});
  std::ranges::copy(words, cells_.begin() + set + 1);
  ++num_sets_;
  return set;
}

SetId WorkerSets::allocate(std::size_t num_words) {
  const std::size_t size = size_class(num_words);
  if (const SetId set = free_[size]; set != kEmptySet) {
    free_[size] = header_of(set).next;
    return set;
  }
  const auto set = static_cast<SetId>(cells_.size());
  cells_.resize(cells_.size() + 1 + (std::size_t{1} << size));
  return set;
}

void WorkerSets::free(SetId set) {
  const Header header = header_of(set);
  SetId* at = &buckets_[header.hash & (buckets_.size() - 1)];
  if (*at == set) {
    *at = header.next;
  } else {
    SetId before = *at;
    while (header_of(before).next != set) before = header_of(before).next;
    Header changed = header_of(before);
    changed.next = header.next;
    put_header(before, changed);
  }
  SetId& free_list = free_[size_class(header.num_words)];
  put_header(set, {0, 0, std::exchange(free_list, set), 0, 0});
  --num_sets_;
}

void WorkerSets::grow_buckets() {
  const std::vector<SetId> old = std::exchange(buckets_, std::vector<SetId>(2 * buckets_.size(), kEmptySet));
  for (SetId set : old) {
    while (set != kEmptySet) {
      Header header = header_of(set);
      SetId& bucket = buckets_[header.hash & (buckets_.size() - 1)];
      const SetId next = std::exchange(header.next, std::exchange(bucket, set));
      put_header(set, header);
      set = next;
    }
  }
}

void WorkerSets::acquire(SetId set, std::uint32_t times) {
  if (set == kEmptySet) return;
  Header header = header_of(set);
  header.num_holders += times;
  put_header(set, header);
}

void WorkerSets::release(SetId set, std::uint32_t times) {
  if (set == kEmptySet) return;
  Header header = header_of(set);
  header.num_holders -= times;
  put_header(set, header);
  if (header.num_holders == 0) free(set);
}

std::size_t WorkerSets::memory_bytes() const {
  return cells_.capacity() * sizeof(Word) + buckets_.capacity() * sizeof(SetId);
}

std::string WorkerSets::audit(const std::function<std::uint32_t(SetId)>& num_holders) const {
  std::size_t num_found = 0;
  for (std::size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    for (SetId set = buckets_[bucket]; set != kEmptySet; set = header_of(set).next) {
      const Header header = header_of(set);
      const std::string name = "worker sets: set " + std::to_string(set);
      const std::span<const Word> words = words_of(set);
      if (header.num_holders != num_holders(set)) {
        return name + " counts " + std::to_string(header.num_holders) + " holders, " +
               std::to_string(num_holders(set)) + " hold it";
      }
      if (header.num_holders == 0) return name + " is held by nobody";
      if (header.hash != hash_of(words) || (header.hash & (buckets_.size() - 1)) != bucket) {
        return name + " lies in a wrong bucket";
      }
      for (std::size_t i = 0; i < words.size(); ++i) {
        if (words[i].bits == 0 || words[i].position >= kMaxWords ||
            (i > 0 && words[i - 1].position >= words[i].position)) {
          return name + " has a word that is empty or out of order";
        }
      }
      ++num_found;
    }
  }
  return num_found == num_sets_ ? "" : "worker sets: miscounted";
}

}  // namespace disagg
