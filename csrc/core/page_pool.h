// PagePool hands out KV pages by number and takes them back.
//
// A free stack (the page given back last is taken first: it is the warmest) and one bit per page.
// What is given back is checked, so a double free is refused and never ends in one page under two
// requests. Threading: owned by the scheduler thread; not thread-safe.
// Invariant: the stack holds exactly the pages whose bit says free, each once.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace disagg {

using PageId = std::int32_t;

class PagePool {
 public:
  // All pages 0..num_pages-1 are free; the lowest is taken first. Requires: num_pages >= 0.
  explicit PagePool(PageId num_pages);

  [[nodiscard]] PageId num_pages() const { return static_cast<PageId>(is_free_.size()); }
  [[nodiscard]] PageId num_free() const { return static_cast<PageId>(free_.size()); }

  // Fills `out` with pages, or returns false and takes none: fewer are free. O(out.size()).
  [[nodiscard]] bool take(std::span<PageId> out);

  // Takes all pages back, or returns the first that is out of range or free already (also when it
  // stands twice in `pages`) and takes none back. O(pages.size()).
  [[nodiscard]] std::optional<PageId> give_back(std::span<const PageId> pages);

  // Returns what is wrong, or an empty string. O(num_pages).
  [[nodiscard]] std::string audit() const;

 private:
  std::vector<PageId> free_;
  std::vector<bool> is_free_;
};

}  // namespace disagg
