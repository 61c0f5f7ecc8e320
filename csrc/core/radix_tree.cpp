#include "core/radix_tree.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <utility>

namespace disagg {

RadixTree::RadixTree(std::size_t page_size) : page_size_(page_size), nodes_(1), buckets_(64, kNone) {}

// Looking up

RadixTree::Prefix RadixTree::match(std::span<const Token> tokens, std::string_view salt) {
  const auto root = roots_.find(std::string(salt));
  if (root == roots_.end()) return {};
  const Walk end = walk(root->second, tokens);
  return {handle_of(end.node), pages_to(end.node, end.num_pages)};
}

// Follows cached pages from a root, marking them as used. A node that agrees only in part is split,
// so that a node ends exactly where the match does.
RadixTree::Walk RadixTree::walk(NodeId from, std::span<const Token> tokens) {
  ++now_;
  for (NodeId id = from; id != kNone; id = nodes_[id].parent) touch(id);
  NodeId at = from;
  std::size_t num_matched = 0;
  const std::size_t num_wanted = tokens.size() / page_size_;
  while (num_matched < num_wanted) {
    const std::span<const Token> rest = tokens.subspan(num_matched * page_size_);
    const NodeId child = find_child(at, page_at(rest, 0));
    if (child == kNone) break;
    const std::size_t num_common = num_common_pages(nodes_[child], rest);
    num_matched += num_common;
    if (num_common < nodes_[child].pages.size()) {
      split(child, num_common);
      at = nodes_[child].parent;
      touch(at);
      break;
    }
    at = child;
    touch(at);
  }
  return {at, num_matched};
}

std::span<const Token> RadixTree::page_at(std::span<const Token> tokens, std::size_t index) const {
  return tokens.subspan(index * page_size_, page_size_);
}

std::size_t RadixTree::num_common_pages(const Node& node, std::span<const Token> tokens) const {
  const std::size_t limit = std::min(node.pages.size(), tokens.size() / page_size_);
  const auto is_equal = [&](std::size_t from_page, std::size_t num_pages) {
    const std::size_t from = from_page * page_size_;
    const std::size_t num_bytes = num_pages * page_size_ * sizeof(Token);
    return std::memcmp(node.tokens.data() + from, tokens.data() + from, num_bytes) == 0;
  };
  if (is_equal(0, limit)) return limit;
  std::size_t num_common = 0;
  while (is_equal(num_common, 1)) ++num_common;
  return num_common;
}

// Parent and content, not the chained hash: a split then moves one node to another bucket and not
// everything below it.
std::uint64_t RadixTree::key_of(NodeId parent, std::span<const Token> first_page) const {
  PageHash key = 0;
  page_hashes(parent, first_page, page_size_, {&key, 1});
  return key;
}

RadixTree::NodeId RadixTree::find_child(NodeId parent, std::span<const Token> first_page) const {
  const std::uint64_t key = key_of(parent, first_page);
  NodeId id = buckets_[key & (buckets_.size() - 1)];
  for (; id != kNone; id = nodes_[id].next_in_bucket) {
    const Node& node = nodes_[id];
    if (node.key == key && node.parent == parent && num_common_pages(node, first_page) == 1) break;
  }
  return id;
}

RadixTree::Handle RadixTree::handle_of(NodeId id) const {
  const Node& node = nodes_[id];
  return node.is_root() ? 0 : (Handle{node.generation} << 32 | id);
}

// Returns kNone for a handle that is stale or was never given out.
RadixTree::NodeId RadixTree::resolve(Handle handle) const {
  const auto id = static_cast<NodeId>(handle);
  if (id >= nodes_.size() || !nodes_[id].is_live) return kNone;
  return handle == handle_of(id) ? id : kNone;
}

std::vector<PageId> RadixTree::pages_to(NodeId id, std::size_t count) const {
  std::vector<PageId> pages(count);
  auto end = pages.end();
  for (; end != pages.begin(); id = nodes_[id].parent) {
    end = std::copy_backward(nodes_[id].pages.begin(), nodes_[id].pages.end(), end);
  }
  return pages;
}

// Locking

bool RadixTree::lock(Handle handle) {
  if (handle == 0) return true;
  NodeId id = resolve(handle);
  if (id == kNone) return false;
  bool was_protected = nodes_[id].is_protected();
  ++nodes_[id].num_locks;
  while (!was_protected) {
    num_locked_pages_ += nodes_[id].pages.size();
    update_heap(id);
    id = nodes_[id].parent;
    if (id == kNone) break;
    was_protected = nodes_[id].is_protected();
    ++nodes_[id].num_protected_children;
  }
  return true;
}

bool RadixTree::unlock(Handle handle) {
  if (handle == 0) return true;
  NodeId id = resolve(handle);
  if (id == kNone || nodes_[id].num_locks == 0) return false;
  --nodes_[id].num_locks;
  while (!nodes_[id].is_protected()) {
    num_locked_pages_ -= nodes_[id].pages.size();
    update_heap(id);
    id = nodes_[id].parent;
    if (id == kNone) break;
    --nodes_[id].num_protected_children;
  }
  return true;
}

// Growing

RadixTree::Prefix RadixTree::insert(std::span<const Token> tokens, std::span<const PageId> pages,
                                    std::string_view salt) {
  if (pages.empty()) return {};
  return grow(find_or_add_root(salt), tokens, pages);
}

std::optional<RadixTree::Prefix> RadixTree::extend(Handle node, std::span<const Token> tokens,
                                                   std::span<const PageId> pages) {
  const NodeId id = resolve(node);
  if (id == kNone) return std::nullopt;
  return grow(id, tokens, pages);
}

RadixTree::Prefix RadixTree::grow(NodeId from, std::span<const Token> tokens,
                                  std::span<const PageId> pages) {
  const Walk end = walk(from, tokens);
  Prefix prefix{handle_of(end.node), pages_to(end.node, end.num_pages)};
  const std::span<const PageId> added = pages.subspan(end.num_pages);
  if (!added.empty()) {
    const auto rest = tokens.subspan(end.num_pages * page_size_, added.size() * page_size_);
    prefix.node = handle_of(add_child(end.node, rest, added));
    prefix.pages.insert(prefix.pages.end(), added.begin(), added.end());
  }
  return prefix;
}

RadixTree::NodeId RadixTree::find_or_add_root(std::string_view salt) {
  const auto [entry, is_new] = roots_.try_emplace(std::string(salt), kNone);
  if (is_new) {
    entry->second = add_node();
    nodes_[entry->second].hashes = {seed_of(salt, page_size_)};
    salts_.emplace(entry->second, salt);
  }
  return entry->second;
}

RadixTree::NodeId RadixTree::add_node() {
  if (free_nodes_.empty()) {
    free_nodes_.push_back(static_cast<NodeId>(nodes_.size()));
    nodes_.emplace_back();
  }
  const NodeId id = free_nodes_.back();
  free_nodes_.pop_back();
  nodes_[id].is_live = true;
  if (nodes_.size() > buckets_.size()) grow_buckets();
  return id;
}

void RadixTree::remove_node(NodeId id) {
  const std::uint32_t generation = nodes_[id].generation + 1;
  nodes_[id] = Node{};
  nodes_[id].generation = generation;
  free_nodes_.push_back(id);
}

RadixTree::NodeId RadixTree::add_child(NodeId parent, std::span<const Token> tokens,
                                       std::span<const PageId> pages) {
  const NodeId id = add_node();
  Node& node = nodes_[id];
  node.tokens.assign(tokens.begin(), tokens.end());
  node.pages.assign(pages.begin(), pages.end());
  node.hashes.resize(pages.size());
  page_hashes(nodes_[parent].hashes.back(), tokens, page_size_, node.hashes);
  for (const PageHash hash : node.hashes) log_.on_stored(hash);
  node.parent = parent;
  link(id);
  ++nodes_[parent].num_children;
  num_pages_ += pages.size();
  update_heap(parent);
  touch(id);
  update_heap(id);
  return id;
}

// Moves the first pages of a node into a new node above it. The old node stays the deeper one, so
// handles, locks and children keep their meaning without being touched. The caller touches the new one.
void RadixTree::split(NodeId id, std::size_t num_upper_pages) {
  const NodeId upper_id = add_node();
  unlink(id);
  Node& lower = nodes_[id];
  Node& upper = nodes_[upper_id];
  const auto move_front = [](auto& from, auto& to, std::size_t count) {
    const auto middle = from.begin() + static_cast<std::ptrdiff_t>(count);
    to.assign(from.begin(), middle);
    from.erase(from.begin(), middle);
  };
  move_front(lower.tokens, upper.tokens, num_upper_pages * page_size_);
  move_front(lower.pages, upper.pages, num_upper_pages);
  move_front(lower.hashes, upper.hashes, num_upper_pages);
  upper.parent = std::exchange(lower.parent, upper_id);
  upper.num_children = 1;
  upper.num_protected_children = lower.is_protected() ? 1 : 0;
  link(upper_id);
  link(id);
}

// Evicting

std::vector<PageId> RadixTree::evict(std::size_t count) {
  std::vector<PageId> evicted;
  while (evicted.size() < count && !heap_.empty()) {
    const NodeId leaf = heap_.front();
    evict_tail(leaf, std::min(count - evicted.size(), nodes_[leaf].pages.size()), evicted);
    if (nodes_[leaf].pages.empty()) remove_leaf(leaf);
  }
  return evicted;
}

void RadixTree::evict_tail(NodeId leaf, std::size_t count, std::vector<PageId>& out) {
  Node& node = nodes_[leaf];
  ++node.generation;  // handles meant the pages that now go
  out.insert(out.end(), node.pages.rbegin(), node.pages.rbegin() + static_cast<std::ptrdiff_t>(count));
  std::for_each(node.hashes.rbegin(), node.hashes.rbegin() + static_cast<std::ptrdiff_t>(count),
                [this](PageHash hash) { log_.on_removed(hash); });
  const std::size_t num_left = node.pages.size() - count;
  node.tokens.resize(num_left * page_size_);
  node.pages.resize(num_left);
  node.hashes.resize(num_left);
  num_pages_ -= count;
}

// Removes a leaf that has no page left, and its root with it when that was the last prompt of its
// salt: salts come from requests, so a root each would grow without bound.
void RadixTree::remove_leaf(NodeId leaf) {
  const NodeId parent = nodes_[leaf].parent;
  heap_erase(leaf);
  unlink(leaf);
  remove_node(leaf);
  --nodes_[parent].num_children;
  update_heap(parent);
  if (!nodes_[parent].is_root() || nodes_[parent].num_children > 0) return;
  const auto salt = salts_.find(parent);
  roots_.erase(salt->second);
  salts_.erase(salt);
  remove_node(parent);
}

std::optional<std::vector<PageId>> RadixTree::clear() {
  if (num_locked_pages_ > 0) return std::nullopt;
  std::vector<PageId> pages = evict(num_pages_);
  log_ = DeltaLog{};
  ++epoch_;
  return pages;
}

std::vector<PageHash> RadixTree::snapshot() const {
  DeltaLog::Delta pending = log_.pending();
  std::sort(pending.stored.begin(), pending.stored.end());
  const auto is_drained = [&pending](PageHash hash) {
    return !std::binary_search(pending.stored.begin(), pending.stored.end(), hash);
  };
  std::vector<PageHash> hashes;
  hashes.reserve(num_pages_);
  std::vector<bool> is_done(nodes_.size(), false);
  std::vector<NodeId> path;
  for (NodeId id = 1; id < nodes_.size(); ++id) {
    if (!nodes_[id].is_live) continue;
    for (NodeId at = id; !nodes_[at].is_root() && !is_done[at]; at = nodes_[at].parent) path.push_back(at);
    for (; !path.empty(); path.pop_back()) {
      is_done[path.back()] = true;
      const std::vector<PageHash>& run = nodes_[path.back()].hashes;
      std::copy_if(run.begin(), run.end(), std::back_inserter(hashes), is_drained);
    }
  }
  // Gone since, but the listener does not know: children went first, so backwards parents come first.
  hashes.insert(hashes.end(), pending.removed.rbegin(), pending.removed.rend());
  return hashes;
}

// Buckets

void RadixTree::link(NodeId id) {
  Node& node = nodes_[id];
  node.key = key_of(node.parent, page_at(node.tokens, 0));
  NodeId& bucket = buckets_[node.key & (buckets_.size() - 1)];
  node.next_in_bucket = std::exchange(bucket, id);
}

void RadixTree::unlink(NodeId id) {
  NodeId* at = &buckets_[nodes_[id].key & (buckets_.size() - 1)];
  while (*at != id) at = &nodes_[*at].next_in_bucket;
  *at = nodes_[id].next_in_bucket;
}

void RadixTree::grow_buckets() {
  buckets_.assign(2 * buckets_.size(), kNone);
  for (NodeId id = 1; id < nodes_.size(); ++id) {
    if (nodes_[id].is_live && nodes_[id].parent != kNone) link(id);
  }
}

// The heap of leaves that may be evicted, least recently used on top

// Marks a node as used by the current operation. Parents are touched before their children.
void RadixTree::touch(NodeId id) {
  nodes_[id].last_used = now_;
  if (nodes_[id].heap_slot != kNotInHeap) heap_down(nodes_[id].heap_slot);
}

// Puts a node into the heap or takes it out, after its children or its protection have changed.
void RadixTree::update_heap(NodeId id) {
  const Node& node = nodes_[id];
  const bool belongs = !node.is_root() && node.num_children == 0 && !node.is_protected();
  if (belongs == (node.heap_slot != kNotInHeap)) return;
  if (!belongs) return heap_erase(id);
  heap_.push_back(id);
  heap_up(static_cast<std::uint32_t>(heap_.size() - 1));
}

void RadixTree::heap_erase(NodeId id) {
  const std::uint32_t slot = std::exchange(nodes_[id].heap_slot, kNotInHeap);
  const NodeId last = heap_.back();
  heap_.pop_back();
  if (last == id) return;
  heap_place(slot, last);
  heap_up(slot);
  heap_down(nodes_[last].heap_slot);
}

void RadixTree::heap_place(std::uint32_t slot, NodeId id) {
  heap_[slot] = id;
  nodes_[id].heap_slot = slot;
}

void RadixTree::heap_up(std::uint32_t slot) {
  const NodeId id = heap_[slot];
  while (slot > 0) {
    const std::uint32_t parent = (slot - 1) / 2;
    if (nodes_[heap_[parent]].last_used <= nodes_[id].last_used) break;
    heap_place(slot, heap_[parent]);
    slot = parent;
  }
  heap_place(slot, id);
}

void RadixTree::heap_down(std::uint32_t slot) {
  const NodeId id = heap_[slot];
  for (;;) {
    std::size_t child = 2 * std::size_t{slot} + 1;
    if (child >= heap_.size()) break;
    const auto used = [this](std::size_t at) { return nodes_[heap_[at]].last_used; };
    if (child + 1 < heap_.size() && used(child + 1) < used(child)) ++child;
    if (nodes_[id].last_used <= used(child)) break;
    heap_place(slot, heap_[child]);
    slot = static_cast<std::uint32_t>(child);
  }
  heap_place(slot, id);
}

// Auditing

std::string RadixTree::audit() const {
  std::vector<std::uint32_t> num_children(nodes_.size(), 0);
  std::vector<std::uint32_t> num_protected_children(nodes_.size(), 0);
  std::unordered_set<PageId> pages;
  std::size_t num_pages = 0;
  std::size_t num_locked_pages = 0;
  std::size_t num_roots = 0;
  std::size_t num_leaves = 0;
  for (NodeId id = 1; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (!node.is_live) continue;
    if (std::string broken = audit_node(id); !broken.empty()) return broken;
    if (node.is_root()) {
      ++num_roots;
      continue;
    }
    pages.insert(node.pages.begin(), node.pages.end());
    num_pages += node.pages.size();
    num_children[node.parent] += 1;
    num_protected_children[node.parent] += node.is_protected() ? 1 : 0;
    num_locked_pages += node.is_protected() ? node.pages.size() : 0;
    num_leaves += node.heap_slot != kNotInHeap ? 1 : 0;
  }
  for (NodeId id = 1; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (node.num_children != num_children[id] || node.num_protected_children != num_protected_children[id]) {
      return "radix tree: node " + std::to_string(id) + " miscounts its children";
    }
  }
  if (pages.size() != num_pages) return "radix tree: a page occurs twice";
  if (num_pages != num_pages_ || num_locked_pages != num_locked_pages_) {
    return "radix tree: " + std::to_string(num_pages) + " pages, " + std::to_string(num_locked_pages) +
           " locked, counted as " + std::to_string(num_pages_) + " and " + std::to_string(num_locked_pages_);
  }
  if (num_roots != roots_.size() || num_roots != salts_.size()) return "radix tree: a root without a salt";
  if (num_leaves != heap_.size()) return "radix tree: the heap holds a node twice or a dead one";
  return audit_log();
}

std::string RadixTree::audit_node(NodeId id) const {
  const Node& node = nodes_[id];
  const std::string name = "radix tree: node " + std::to_string(id);
  if (node.is_root()) {
    const auto salt = salts_.find(id);
    if (salt == salts_.end() || node.hashes != std::vector{seed_of(salt->second, page_size_)}) {
      return name + " is a root with a wrong seed";
    }
    return node.num_children == 0 || node.num_locks > 0 ? name + " is a root without a page" : "";
  }
  if (node.pages.size() != node.hashes.size() || node.tokens.size() != node.pages.size() * page_size_) {
    return name + " has runs of different lengths";
  }
  if (!nodes_[node.parent].is_live) return name + " has a dead parent";
  if (node.last_used > nodes_[node.parent].last_used) return name + " was used later than its parent";
  if (find_child(node.parent, page_at(node.tokens, 0)) != id) return name + " is not found by its first page";
  std::vector<PageHash> hashes(node.hashes.size());
  page_hashes(nodes_[node.parent].hashes.back(), node.tokens, page_size_, hashes);
  if (hashes != node.hashes) return name + " has wrong hashes";
  const bool is_evictable = node.num_children == 0 && !node.is_protected();
  if (is_evictable != (node.heap_slot != kNotInHeap)) return name + " is wrongly in or out of the heap";
  if (!is_evictable) return "";
  if (node.heap_slot >= heap_.size() || heap_[node.heap_slot] != id) return name + " is lost in the heap";
  const NodeId above = heap_[node.heap_slot == 0 ? 0 : (node.heap_slot - 1) / 2];
  return nodes_[above].last_used > node.last_used ? name + " lies below a later one in the heap" : "";
}

// The snapshot is what the digest counts, and with the pending changes it is what the tree holds.
std::string RadixTree::audit_log() const {
  const std::vector<PageHash> known = snapshot();
  DeltaLog::Digest digest{known.size(), 0};
  for (const PageHash hash : known) digest.xor_of_all ^= hash;
  if (digest != log_.digest()) return "radix tree: the snapshot and the digest disagree";
  const DeltaLog::Delta pending = log_.pending();
  if (known.size() + pending.stored.size() - pending.removed.size() != num_pages_) {
    return "radix tree: the delta log does not lead to what the tree holds";
  }
  return "";
}

}  // namespace disagg
