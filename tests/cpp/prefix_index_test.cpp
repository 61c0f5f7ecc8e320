#include "core/prefix_index.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "check.h"

using namespace disagg;
using test::Random;

namespace {

using Twin = std::vector<std::set<PageHash>>;  // what each worker holds

std::vector<std::int32_t> match(PrefixIndex& index, const std::vector<PageHash>& prompt) {
  std::vector<std::int32_t> lengths(index.num_workers(), -1);
  index.match(prompt, lengths);
  return lengths;
}

std::int32_t walk(const std::set<PageHash>& held, const std::vector<PageHash>& prompt) {
  const auto is_held = [&held](PageHash hash) { return held.contains(hash); };
  return static_cast<std::int32_t>(std::ranges::find_if_not(prompt, is_held) - prompt.begin());
}

// Prompts that share beginnings, as chained hashes do: a tree of pages.
std::vector<PageHash> random_prompt(Random& random, std::size_t max_pages) {
  std::vector<PageHash> prompt(random.below(max_pages + 1));
  PageHash state = random.below(3);
  for (PageHash& hash : prompt) {
    state = Random(state * 8 + (random.below(8) == 0 ? random.below(3) : 7)).next();
    hash = state;
  }
  return prompt;
}

void check_all(PrefixIndex& index, const Twin& twin, const std::vector<PageHash>& prompt) {
  const auto lengths = match(index, prompt);
  for (std::size_t worker = 0; worker < twin.size(); ++worker) {
    const std::int32_t expected = walk(twin[worker], prompt);
    CHECK(worker < lengths.size() ? lengths[worker] == expected : expected == 0);
  }
}

// Workers store prompts from the front and lose them from the back, as prefix caches do.
void every_worker_gets_the_length_a_walk_finds(std::size_t num_workers, std::size_t max_pages, int num_steps,
                                               std::uint64_t seed) {
  Random random(seed);
  PrefixIndex index;
  Twin twin(num_workers);
  std::vector<std::vector<std::vector<PageHash>>> prompts(num_workers);
  for (int step = 0; step < num_steps; ++step) {
    const auto worker = static_cast<WorkerId>(random.below(num_workers));
    auto& own = prompts[worker];
    if (random.below(3) > 0 || own.empty()) {
      own.push_back(random_prompt(random, max_pages));
      index.store(worker, own.back());
      twin[worker].insert(own.back().begin(), own.back().end());
    } else if (random.below(50) == 0) {
      index.drop_worker(worker);
      twin[worker].clear();
      own.clear();
    } else {
      // A suffix goes, except what another prompt of the worker still needs.
      std::vector<PageHash>& prompt = own[random.below(own.size())];
      const auto num_kept = static_cast<std::ptrdiff_t>(random.below(prompt.size() + 1));
      const std::vector<PageHash> gone(prompt.begin() + num_kept, prompt.end());
      prompt.resize(prompt.size() - gone.size());
      std::set<PageHash> needed;
      for (const auto& other : own) needed.insert(other.begin(), other.end());
      std::vector<PageHash> removed;
      std::copy_if(gone.rbegin(), gone.rend(), std::back_inserter(removed),
                   [&needed](PageHash hash) { return !needed.contains(hash); });
      index.remove(worker, removed);
      for (const PageHash hash : removed) twin[worker].erase(hash);
    }
    check_all(index, twin, random_prompt(random, max_pages));
    if (step % 64 == 0) CHECK_SOUND(index);
  }
  CHECK_SOUND(index);
  std::set<PageHash> all;
  for (std::size_t worker = 0; worker < num_workers; ++worker) {
    all.insert(twin[worker].begin(), twin[worker].end());
    CHECK(index.digest(static_cast<WorkerId>(worker)).count == twin[worker].size());
  }
  CHECK(index.num_hashes() == all.size());
  for (WorkerId worker = 0; worker < num_workers; ++worker) index.drop_worker(worker);
  CHECK(index.num_hashes() == 0);
  CHECK_SOUND(index);
}

void every_worker_gets_the_length_a_walk_finds() {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    every_worker_gets_the_length_a_walk_finds(3, 40, 400, seed);
    every_worker_gets_the_length_a_walk_finds(70, 300, 400, seed);
    every_worker_gets_the_length_a_walk_finds(kMaxWorkers, 40, 200, seed);
  }
}

// Any hashes at all, in any order: summaries that lie must not break the structure, and the answer is
// still the length of a prefix whose last page the worker holds and whose next it does not.
void holes_never_break_it() {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Random random(seed);
    PrefixIndex index;
    Twin twin(5);
    for (int step = 0; step < 400; ++step) {
      const auto worker = static_cast<WorkerId>(random.below(twin.size()));
      std::vector<PageHash> hashes(random.below(20));
      for (PageHash& hash : hashes) hash = random.below(100);
      if (random.below(2) == 0) {
        index.store(worker, hashes);
        twin[worker].insert(hashes.begin(), hashes.end());
      } else {
        index.remove(worker, hashes);
        for (const PageHash hash : hashes) twin[worker].erase(hash);
      }
      std::vector<PageHash> prompt(100);
      for (PageHash hash = 0; hash < 100; ++hash) prompt[hash] = hash;
      prompt.resize(random.below(101));
      const auto lengths = match(index, prompt);
      for (std::size_t i = 0; i < lengths.size(); ++i) {
        const auto length = static_cast<std::size_t>(lengths[i]);
        CHECK(lengths[i] >= walk(twin[i], prompt));
        CHECK(length == 0 || twin[i].contains(prompt[length - 1]));
        CHECK(length == prompt.size() || !twin[i].contains(prompt[length]));
      }
      if (step % 50 == 0) CHECK_SOUND(index);
    }
  }
}

// A worker that lost the middle of a prompt is no good from there on, whatever it still has later.
void a_hole_that_was_seen_ends_the_match() {
  PrefixIndex index;
  std::vector<PageHash> prompt(256);
  for (PageHash i = 0; i < prompt.size(); ++i) prompt[i] = i + 1;
  index.store(0, prompt);
  index.remove(0, std::span(prompt).subspan(26, 154));
  index.remove(0, std::span(prompt).subspan(230));
  index.store(1, prompt);
  CHECK((match(index, prompt) == std::vector<std::int32_t>{26, 256}));
}

// The second lookup is guided by where the first one found the sets to end, rightly or wrongly.
void guesses_never_change_an_answer() {
  for (std::size_t first_end = 1; first_end < 20; ++first_end) {
    for (std::size_t second_end = 0; second_end <= 20; ++second_end) {
      PrefixIndex index;
      std::vector<std::vector<PageHash>> prompts(2, std::vector<PageHash>(20));
      for (PageHash i = 0; i < 20; ++i) {
        prompts[0][i] = i + 1;
        prompts[1][i] = i < second_end ? i + 1 : i + 101;
      }
      index.store(0, prompts[0]);
      index.store(1, std::span(prompts[0]).first(first_end));
      for (const std::size_t length : {std::size_t{20}, second_end}) {
        for (const auto& prompt : prompts) {
          std::vector<PageHash> asked = prompt;
          asked.resize(length);
          const std::size_t known = &prompt == &prompts[0] ? length : std::min(length, second_end);
          const std::vector<std::int32_t> expected{static_cast<std::int32_t>(known),
                                                   static_cast<std::int32_t>(std::min(known, first_end))};
          CHECK(match(index, asked) == expected);
        }
      }
    }
  }
}

// Equal, consecutive and extreme numbers land in few buckets of a careless table.
void any_numbers_may_be_hashes() {
  PrefixIndex index;
  std::vector<PageHash> hashes{0, 0, ~PageHash{0}, PageHash{1} << 63};
  for (PageHash i = 0; i < 3000; ++i) hashes.push_back(i << 40);
  index.store(0, hashes);
  const std::set<PageHash> distinct(hashes.begin(), hashes.end());
  CHECK(index.num_hashes() == distinct.size());
  CHECK(match(index, hashes).front() == static_cast<std::int32_t>(hashes.size()));
  CHECK_SOUND(index);
}

void memory_follows_what_is_held() {
  Random random(1);
  PrefixIndex index;
  std::vector<PageHash> hashes(200'000);
  for (PageHash& hash : hashes) hash = random.next();
  index.store(3, hashes);
  const std::size_t full = index.memory_bytes();
  CHECK(full < 20 * hashes.size());
  index.remove(3, std::span(hashes).subspan(1000));
  CHECK(index.memory_bytes() < full / 8);
  CHECK_SOUND(index);
}

}  // namespace

int main() {
  return test::run({
      {"every worker gets the length a walk finds", [] { every_worker_gets_the_length_a_walk_finds(); }},
      {"holes never break it", holes_never_break_it},
      {"a hole that was seen ends the match", a_hole_that_was_seen_ends_the_match},
      {"guesses never change an answer", guesses_never_change_an_answer},
      {"any numbers may be hashes", any_numbers_may_be_hashes},
      {"memory follows what is held", memory_follows_what_is_held},
  });
}
