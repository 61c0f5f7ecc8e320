#include "core/page_hash.h"

#include <set>
#include <vector>

#include "check.h"

using namespace disagg;
using test::Random;

namespace {

std::vector<Token> random_tokens(Random& random, std::size_t count) {
  std::vector<Token> tokens(count);
  for (Token& token : tokens) token = static_cast<Token>(random.below(150'000));
  return tokens;
}

std::vector<PageHash> hashes_of(std::span<const Token> tokens, std::size_t page_size, std::string_view salt) {
  std::vector<PageHash> hashes(tokens.size() / page_size);
  page_hashes(seed_of(salt, page_size), tokens, page_size, hashes);
  return hashes;
}

void hashing_page_by_page_is_hashing_at_once() {
  Random random(1);
  for (std::size_t page_size = 1; page_size <= 20; ++page_size) {
    const auto tokens = random_tokens(random, 7 * page_size + page_size / 2);
    PageHash previous = seed_of("tenant", page_size);
    const auto all = hashes_of(tokens, page_size, "tenant");
    CHECK(all.size() == 7);
    for (std::size_t i = 0; i < all.size(); ++i) {
      page_hashes(previous, std::span(tokens).subspan(i * page_size, page_size), page_size, {&previous, 1});
      CHECK(previous == all[i]);
    }
  }
}

void one_changed_token_changes_its_page_and_all_after() {
  Random random(2);
  for (std::size_t page_size = 1; page_size <= 20; ++page_size) {
    const auto tokens = random_tokens(random, 8 * page_size);
    const auto hashes = hashes_of(tokens, page_size, "");
    for (std::size_t changed = 0; changed < tokens.size(); ++changed) {
      auto others = tokens;
      others[changed] ^= 1;
      const auto other_hashes = hashes_of(others, page_size, "");
      for (std::size_t page = 0; page < hashes.size(); ++page) {
        CHECK((hashes[page] == other_hashes[page]) == (page < changed / page_size));
      }
    }
  }
}

// Small and repeated tokens, the kind that weak multiplicative hashes confuse.
void nearby_pages_and_salts_do_not_collide() {
  std::set<PageHash> seen;
  std::size_t num_hashes = 0;
  const auto see = [&](std::span<const Token> page, std::string_view salt) {
    seen.insert(hashes_of(page, page.size(), salt).front());
    ++num_hashes;
  };
  for (Token a = -2; a < 30; ++a) {
    for (Token b = -2; b < 30; ++b) {
      for (Token c = -2; c < 30; ++c) see(std::vector<Token>{a, b, c, a, b}, "");
      see(std::vector<Token>{a, b}, "");
    }
  }
  const std::vector<Token> page(16, 0);
  for (std::size_t length = 0; length < 40; ++length) {
    see(page, std::string(length, '\0'));
    see(page, std::string(length, 'x') + "y");
  }
  CHECK(seen.size() == num_hashes);
}

// Routers and workers of different releases compare these numbers.
void the_value_is_fixed() {
  const std::vector<Token> tokens{1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  CHECK(hashes_of(tokens, 4, "").back() == 0x8ec9fb344f0b1878ULL);
  CHECK(hashes_of(tokens, 5, "salt").back() == 0x58df95d34487e742ULL);
}

}  // namespace

int main() {
  return test::run({
      {"hashing page by page is hashing at once", hashing_page_by_page_is_hashing_at_once},
      {"one changed token changes its page and all after", one_changed_token_changes_its_page_and_all_after},
      {"nearby pages and salts do not collide", nearby_pages_and_salts_do_not_collide},
      {"the value is fixed", the_value_is_fixed},
  });
}
