#include "core/page_pool.h"

#include <algorithm>
#include <set>
#include <vector>

#include "check.h"

using namespace disagg;
using test::Random;

namespace {

// The twin: a set of free pages.
void random_use_agrees_with_a_set_of_free_pages() {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Random random(seed);
    const auto num_pages = static_cast<PageId>(random.below(40));
    PagePool pool(num_pages);
    std::set<PageId> free;
    for (PageId page = 0; page < num_pages; ++page) free.insert(page);
    for (int step = 0; step < 300; ++step) {
      std::vector<PageId> pages(random.below(12));
      if (random.below(2) == 0) {
        const bool took = pool.take(pages);
        CHECK(took == (pages.size() <= free.size()));
        for (const PageId page : pages) CHECK(!took || free.erase(page) == 1);
      } else {
        for (PageId& page : pages) page = static_cast<PageId>(random.below(50)) - 5;
        std::set<PageId> after = free;
        const auto is_refused = [&](PageId page) {
          return page < 0 || page >= num_pages || !after.insert(page).second;
        };
        const auto first_wrong = std::ranges::find_if(pages, is_refused);
        const std::optional<PageId> refused = pool.give_back(pages);
        CHECK(refused.has_value() == (first_wrong != pages.end()));
        CHECK(!refused || *refused == *first_wrong);
        if (!refused) free = after;
      }
      CHECK(static_cast<std::size_t>(pool.num_free()) == free.size());
      CHECK_SOUND(pool);
    }
  }
}

void a_refused_return_takes_nothing_back() {
  PagePool pool(4);
  std::vector<PageId> pages(3);
  CHECK(pool.take(pages));
  const std::vector<PageId> twice{0, 1, 0};
  CHECK(pool.give_back(twice) == 0);
  CHECK(pool.num_free() == 1);
  CHECK(!pool.give_back(pages));
  CHECK_SOUND(pool);
}

}  // namespace

int main() {
  return test::run({
      {"random use agrees with a set of free pages", random_use_agrees_with_a_set_of_free_pages},
      {"a refused return takes nothing back", a_refused_return_takes_nothing_back},
  });
}
