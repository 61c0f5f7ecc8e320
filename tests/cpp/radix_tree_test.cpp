#include "core/radix_tree.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "check.h"

using namespace disagg;
using test::Random;

namespace {

constexpr std::size_t kPageSize = 2;

// The slow twin: a map from every cached prefix to its page.
struct Twin {
  using Key = std::pair<std::string, std::vector<Token>>;
  std::map<Key, PageId> pages;

  static Key key(const std::string& salt, const std::vector<Token>& tokens, std::size_t num_pages) {
    return {salt, {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(num_pages * kPageSize)}};
  }
  std::vector<PageId> match(const std::string& salt, const std::vector<Token>& tokens) const {
    std::vector<PageId> found;
    while ((found.size() + 1) * kPageSize <= tokens.size()) {
      const auto page = pages.find(key(salt, tokens, found.size() + 1));
      if (page == pages.end()) break;
      found.push_back(page->second);
    }
    return found;
  }
};

std::vector<Token> random_prompt(Random& random) {
  std::vector<Token> tokens(random.below(14));
  for (Token& token : tokens) token = static_cast<Token>(random.below(8) == 0 ? 1 : 0);
  return tokens;
}

// A worker with a small pool: it matches, locks, inserts, evicts and unlocks at random.
class Worker {
 public:
  explicit Worker(std::uint64_t seed) : random_(seed) {}

  void step() {
    switch (random_.below(7)) {
      case 0:
      case 1: insert(); break;
      case 2: match_and_lock(); break;
      case 3: unlock(); break;
      case 4: evict(random_.below(6)); break;
      case 5: extend(); break;
      default: drain(); break;
    }
    CHECK_SOUND(tree_);
    CHECK(tree_.num_pages() == twin_.pages.size());
    CHECK(tree_.num_locked_pages() == locked().size());
  }

  void finish() {
    while (!locks_.empty()) unlock();
    const auto pages = tree_.clear();
    CHECK(pages && pages->size() == twin_.pages.size());
    CHECK(tree_.num_nodes() == 0 && tree_.num_pages() == 0);
    CHECK(tree_.digest() == DeltaLog::Digest{});
    CHECK_SOUND(tree_);
  }

 private:
  struct Lock {
    RadixTree::Handle node;
    std::string salt;
    std::vector<Token> tokens;
  };

  std::string random_salt() { return random_.below(3) == 0 ? "other" : ""; }

  void insert() {
    const std::string salt = random_salt();
    const std::vector<Token> tokens = random_prompt(random_);
    std::vector<PageId> pages(tokens.size() / kPageSize);
    for (PageId& page : pages) page = next_page_++;
    const std::vector<PageId> held = twin_.match(salt, tokens);
    const RadixTree::Prefix prefix = tree_.insert(tokens, pages, salt);
    std::copy(held.begin(), held.end(), pages.begin());
    CHECK(prefix.pages == pages);
    CHECK((prefix.node == 0) == pages.empty());
    for (std::size_t i = 0; i < pages.size(); ++i) twin_.pages[Twin::key(salt, tokens, i + 1)] = pages[i];
  }

  // As an insert of the whole, told of what is new alone.
  void extend() {
    if (locks_.empty()) return;
    const Lock& lock = locks_[random_.below(locks_.size())];
    const std::vector<Token> more = random_prompt(random_);
    std::vector<PageId> pages(more.size() / kPageSize);
    for (PageId& page : pages) page = next_page_++;
    std::vector<Token> tokens = lock.tokens;
    tokens.insert(tokens.end(), more.begin(), more.end());
    const std::size_t num_before = lock.tokens.size() / kPageSize;
    const std::vector<PageId> held = twin_.match(lock.salt, tokens);
    const std::optional<RadixTree::Prefix> prefix = tree_.extend(lock.node, more, pages);
    std::copy(held.begin() + static_cast<std::ptrdiff_t>(num_before), held.end(), pages.begin());
    CHECK(prefix && prefix->pages == pages);
    CHECK_SOUND(tree_);
    CHECK(prefix->node == tree_.match(tokens, lock.salt).node);
    for (std::size_t i = 0; i < pages.size(); ++i) {
      twin_.pages[Twin::key(lock.salt, tokens, num_before + i + 1)] = pages[i];
    }
  }

  void match_and_lock() {
    const std::string salt = random_salt();
    std::vector<Token> tokens = random_prompt(random_);
    const RadixTree::Prefix prefix = tree_.match(tokens, salt);
    CHECK(prefix.pages == twin_.match(salt, tokens));
    CHECK((prefix.node == 0) == prefix.pages.empty());
    tokens.resize(prefix.pages.size() * kPageSize);
    CHECK(tree_.lock(prefix.node));
    if (prefix.node != 0) locks_.push_back({prefix.node, salt, tokens});
  }

  void unlock() {
    if (locks_.empty()) return;
    const auto at = locks_.begin() + static_cast<std::ptrdiff_t>(random_.below(locks_.size()));
    CHECK(tree_.match(at->tokens, at->salt).pages.size() * kPageSize == at->tokens.size());
    CHECK(tree_.unlock(at->node));
    locks_.erase(at);
  }

  void evict(std::size_t count) {
    const std::set<PageId> kept = locked();
    const std::size_t num_evictable = twin_.pages.size() - kept.size();
    const std::vector<PageId> evicted = tree_.evict(count);
    CHECK(evicted.size() == std::min(count, num_evictable));
    for (const PageId page : evicted) {
      CHECK(!kept.contains(page));
      const auto entry =
          std::ranges::find_if(twin_.pages, [page](const auto& cached) { return cached.second == page; });
      CHECK(entry != twin_.pages.end());
      // Leaves first: nothing that continues this prefix is left.
      for (const auto& [other, unused] : twin_.pages) {
        const auto& [salt, tokens] = entry->first;
        const bool continues = other.first == salt && other.second.size() > tokens.size() &&
                               std::equal(tokens.begin(), tokens.end(), other.second.begin());
        CHECK(!continues);
      }
      twin_.pages.erase(entry);
    }
  }

  void drain() {
    const DeltaLog::Delta delta = tree_.drain_delta();
    for (const PageHash hash : delta.stored) CHECK(told_.insert(hash).second);
    for (const PageHash hash : delta.removed) CHECK(told_.erase(hash) == 1);
    const std::vector<PageHash> snapshot = tree_.snapshot();
    CHECK(snapshot.size() == told_.size() && std::set(snapshot.begin(), snapshot.end()) == told_);
    CHECK(told_ == all_hashes());
  }

  std::set<PageHash> all_hashes() const {
    std::set<PageHash> hashes;
    for (const auto& [key, page] : twin_.pages) {
      std::vector<PageHash> run(key.second.size() / kPageSize);
      page_hashes(seed_of(key.first, kPageSize), key.second, kPageSize, run);
      hashes.insert(run.back());
    }
    return hashes;
  }

  std::set<PageId> locked() const {
    std::set<PageId> pages;
    for (const Lock& lock : locks_) {
      const auto run = twin_.match(lock.salt, lock.tokens);
      pages.insert(run.begin(), run.end());
    }
    return pages;
  }

  Random random_;
  RadixTree tree_{kPageSize};
  Twin twin_;
  std::vector<Lock> locks_;
  std::set<PageHash> told_;
  PageId next_page_ = 0;
};

void random_use_agrees_with_a_map_of_prefixes() {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Worker worker(seed);
    for (int step = 0; step < 300; ++step) worker.step();
    worker.finish();
  }
}

void the_least_recently_used_leaf_goes_first() {
  RadixTree tree(1);
  const auto insert = [&tree](std::vector<Token> tokens, PageId first_page) {
    std::vector<PageId> pages(tokens.size());
    for (PageId& page : pages) page = first_page++;
    return tree.insert(tokens, pages, "");
  };
  static_cast<void>(insert({1, 2, 3}, 0));
  static_cast<void>(insert({1, 2, 4}, 10));
  static_cast<void>(insert({5, 6}, 20));
  static_cast<void>(tree.match(std::vector<Token>{1, 2, 3}, ""));
  CHECK((tree.evict(1) == std::vector<PageId>{12}));
  CHECK((tree.evict(1) == std::vector<PageId>{21}));
  CHECK((tree.evict(2) == std::vector<PageId>{20, 2}));
  CHECK((tree.evict(9) == std::vector<PageId>{1, 0}));
  CHECK_SOUND(tree);
}

void a_stale_handle_is_recognised() {
  RadixTree tree(1);
  const std::vector<Token> tokens{1, 2, 3};
  const std::vector<PageId> pages{0, 1, 2};
  const auto prefix = tree.insert(tokens, pages, "");
  CHECK(tree.evict(1).size() == 1);
  CHECK(!tree.lock(prefix.node));
  CHECK(!tree.unlock(prefix.node));
  CHECK(!tree.lock(prefix.node + 1));
  CHECK(!tree.lock(~RadixTree::Handle{0}));
  const auto again = tree.insert(tokens, pages, "");
  CHECK(again.node != prefix.node && tree.lock(again.node));
  CHECK(!tree.clear());
  CHECK(tree.unlock(again.node));
  CHECK(!tree.unlock(again.node));
  CHECK_SOUND(tree);
}

// Tokens that wipe out the hash's state (no vocabulary has them) make two pages collide.
void colliding_hashes_are_told_apart_by_tokens() {
  RadixTree tree(4);
  const auto low = static_cast<Token>(0xf8bd642fU);
  const auto high = static_cast<Token>(0xa0761d64U);
  const std::vector<Token> a{low, high, 1, 2};
  const std::vector<Token> b{low, high, 3, 4};
  std::vector<PageHash> hashes(2);
  page_hashes(1, a, 4, std::span(hashes).first(1));
  page_hashes(1, b, 4, std::span(hashes).last(1));
  CHECK(hashes[0] == hashes[1]);
  static_cast<void>(tree.insert(a, std::vector<PageId>{0}, ""));
  CHECK(tree.match(b, "").pages.empty());
  CHECK((tree.insert(b, std::vector<PageId>{1}, "").pages == std::vector<PageId>{1}));
  CHECK((tree.match(a, "").pages == std::vector<PageId>{0}));
}

// One node a page: a prompt inserted after every page it grows by.
void a_long_chain_of_nodes_is_one_prefix() {
  RadixTree tree(1);
  constexpr std::size_t kDepth = 2'000;
  const std::vector<Token> tokens(kDepth);
  std::vector<PageId> pages(kDepth);
  for (std::size_t i = 0; i < kDepth; ++i) pages[i] = static_cast<PageId>(i);
  RadixTree::Prefix prefix;
  for (std::size_t length = 1; length <= kDepth; ++length) {
    prefix = tree.insert(std::span(tokens).first(length), std::span(pages).first(length), "");
  }
  CHECK(prefix.pages == pages && tree.num_nodes() == kDepth + 1);
  CHECK(tree.lock(prefix.node) && tree.num_locked_pages() == kDepth && tree.evict(kDepth).empty());
  CHECK(tree.unlock(prefix.node) && tree.num_locked_pages() == 0);
  CHECK_SOUND(tree);
  std::ranges::reverse(pages);
  CHECK(tree.evict(kDepth) == pages);
}

}  // namespace

int main() {
  return test::run({
      {"random use agrees with a map of prefixes", random_use_agrees_with_a_map_of_prefixes},
      {"the least recently used leaf goes first", the_least_recently_used_leaf_goes_first},
      {"a stale handle is recognised", a_stale_handle_is_recognised},
      {"colliding hashes are told apart by tokens", colliding_hashes_are_told_apart_by_tokens},
      {"a long chain of nodes is one prefix", a_long_chain_of_nodes_is_one_prefix},
  });
}
