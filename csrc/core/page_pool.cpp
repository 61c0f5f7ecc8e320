#include "core/page_pool.h"

#include <algorithm>

namespace disagg {

PagePool::PagePool(PageId num_pages) : is_free_(static_cast<std::size_t>(num_pages), true) {
  free_.reserve(is_free_.size());
  for (PageId page = num_pages; page-- > 0;) free_.push_back(page);
}

bool PagePool::take(std::span<PageId> out) {
  if (out.size() > free_.size()) return false;
  for (PageId& page : out) {
    page = free_.back();
    free_.pop_back();
    is_free_[static_cast<std::size_t>(page)] = false;
  }
  return true;
}

std::optional<PageId> PagePool::give_back(std::span<const PageId> pages) {
  const auto is_held = [this](PageId page) {
    return page >= 0 && page < num_pages() && !is_free_[static_cast<std::size_t>(page)];
  };
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (is_held(pages[i])) {
      is_free_[static_cast<std::size_t>(pages[i])] = true;
      continue;
    }
    for (const PageId undone : pages.first(i)) is_free_[static_cast<std::size_t>(undone)] = false;
    return pages[i];
  }
  free_.insert(free_.end(), pages.begin(), pages.end());
  return std::nullopt;
}

std::string PagePool::audit() const {
  const auto num_marked = std::count(is_free_.begin(), is_free_.end(), true);
  if (static_cast<std::size_t>(num_marked) != free_.size()) {
    return "page pool: " + std::to_string(num_marked) + " pages are marked free, the stack holds " +
           std::to_string(free_.size());
  }
  std::vector<bool> seen(is_free_.size(), false);
  for (const PageId page : free_) {
    const auto index = static_cast<std::size_t>(page);
    if (page < 0 || index >= is_free_.size() || !is_free_[index] || seen[index]) {
      return "page pool: page " + std::to_string(page) + " does not belong on the free stack";
    }
    seen[index] = true;
  }
  return "";
}

}  // namespace disagg
