// RadixTree is a worker's prefix cache: which KV page holds which page of which prompt.
//
// A compressed tree over whole pages. A node holds a run of pages that always occur together; the
// path from a root to a node spells a prefix of some prompt. Pages are compared token by token;
// hashes only find candidates and tell routers what is here. Each salt has a root of its own, so
// prompts with different salts share nothing.
//
// Ownership: pages given to insert() belong to the tree until evict() or clear() hands them back.
// A page on the path to a locked node is never handed back.
//
// Handles: a handle names a node and keeps meaning the same full prefix while the tree around it is
// split and grown. It goes stale when a page of its node is evicted; what is locked cannot. A stale
// or invented handle is recognised, never followed. Handle 0 is the empty prefix, of every salt.
//
// Threading: owned by the scheduler thread; not thread-safe.
//
// Invariants, all checked by audit():
//  - two children of one node differ within their first page;
//  - a node's pages are protected when it or a node below it is locked;
//  - the heap holds exactly the leaves that are not protected, least recently used on top;
//  - no node was used later than its parent, so a parent is never evicted before its child;
//  - no page occurs twice.
//
// Cost: match and insert are one pass over the tokens plus one hash probe a node, extend is that for
// what it adds plus a step along the nodes above; splits copy the run that is split; a node is 112
// bytes, a page 4 * page_size + 12 bytes. Nothing recurses, so a prompt of a million tokens needs no
// deeper stack than a short one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/delta_log.h"
#include "core/page_hash.h"
#include "core/page_pool.h"

namespace disagg {

class RadixTree {
 public:
  using Handle = std::uint64_t;

  // A prefix that is cached: the node at its end and its pages in prompt order.
  struct Prefix {
    Handle node = 0;
    std::vector<PageId> pages;
  };

  // Requires: page_size > 0.
  explicit RadixTree(std::size_t page_size);

  // Finds the longest cached prefix of whole pages and marks it as just used. The result is not
  // locked: lock its node before the next evict().
  [[nodiscard]] Prefix match(std::span<const Token> tokens, std::string_view salt);

  // Protects the prefix that ends at `node`, counted; false if the handle is stale. O(1) when the
  // prefix is protected already, otherwise O(nodes newly protected).
  [[nodiscard]] bool lock(Handle node);

  // Takes one lock back; false if the handle is stale or its node is not locked.
  [[nodiscard]] bool unlock(Handle node);

  // Caches a prompt. Returns the node of the whole of it and, for each page, the page that is cached
  // there now: the caller's own, which then belongs to the tree, or the one the tree held already;
  // where that is another page, the caller's stays the caller's.
  // Requires: pages.size() == tokens.size() / page_size (whole pages); no page that is new to the
  // tree occurs twice.
  [[nodiscard]] Prefix insert(std::span<const Token> tokens, std::span<const PageId> pages,
                              std::string_view salt);

  // The same for what follows the prefix that ends at `node`, without another look at that prefix:
  // returns the node of the whole and the pages of `tokens` alone; nullopt if the handle is stale.
  // Requires: node != 0, and as insert().
  [[nodiscard]] std::optional<Prefix> extend(Handle node, std::span<const Token> tokens,
                                             std::span<const PageId> pages);

  // Hands back up to `count` pages, least recently used leaves first and each from its tail, fewer
  // when the rest is protected. O(log leaves) a leaf, O(1) a page.
  [[nodiscard]] std::vector<PageId> evict(std::size_t count);

  // Hands back every page and begins a new epoch; nullopt (and nothing done) while a lock is held.
  [[nodiscard]] std::optional<std::vector<PageId>> clear();

  [[nodiscard]] std::size_t num_pages() const { return num_pages_; }
  [[nodiscard]] std::size_t num_locked_pages() const { return num_locked_pages_; }
  [[nodiscard]] std::size_t num_nodes() const { return nodes_.size() - free_nodes_.size() - 1; }
  [[nodiscard]] std::size_t page_size() const { return page_size_; }
  [[nodiscard]] std::uint64_t epoch() const { return epoch_; }

  // The changes since the last drain, see DeltaLog. A new epoch counts from 0 again.
  [[nodiscard]] DeltaLog::Delta drain_delta() { return log_.drain(); }

  // All page hashes as of the last drain, parents before children. O(pages log pages).
  [[nodiscard]] std::vector<PageHash> snapshot() const;
  [[nodiscard]] const DeltaLog::Digest& digest() const { return log_.digest(); }

  // Returns what is wrong, or an empty string. O(pages).
  [[nodiscard]] std::string audit() const;

 private:
  using NodeId = std::uint32_t;
  static constexpr NodeId kNone = 0;  // no node; its place in nodes_ is never used
  static constexpr std::uint32_t kNotInHeap = UINT32_MAX;

  struct Node {
    std::vector<Token> tokens;     // page_size a page
    std::vector<PageId> pages;     // empty in a root and in no other node
    std::vector<PageHash> hashes;  // one a page; in a root the seed of its salt
    std::uint64_t last_used = 0;
    std::uint64_t key = 0;  // of (parent, first page), finds the node in buckets_
    NodeId parent = kNone;  // kNone in a root
    NodeId next_in_bucket = kNone;
    std::uint32_t generation = 0;  // in handles; counts up when they go stale
    std::uint32_t num_children = 0;
    std::uint32_t num_locks = 0;
    std::uint32_t num_protected_children = 0;
    std::uint32_t heap_slot = kNotInHeap;
    bool is_live = false;

    [[nodiscard]] bool is_root() const { return pages.empty(); }
    [[nodiscard]] bool is_protected() const { return num_locks + num_protected_children > 0; }
  };
  // The end of a walk along cached pages.
  struct Walk {
    NodeId node;            // where it began if nothing matched, kNone if there is not even a root
    std::size_t num_pages;  // matched
  };

  [[nodiscard]] std::span<const Token> page_at(std::span<const Token> tokens, std::size_t index) const;
  [[nodiscard]] std::uint64_t key_of(NodeId parent, std::span<const Token> first_page) const;
  [[nodiscard]] std::size_t num_common_pages(const Node& node, std::span<const Token> tokens) const;
  [[nodiscard]] NodeId find_child(NodeId parent, std::span<const Token> first_page) const;
  [[nodiscard]] NodeId resolve(Handle handle) const;
  [[nodiscard]] Handle handle_of(NodeId id) const;
  [[nodiscard]] std::vector<PageId> pages_to(NodeId id, std::size_t count) const;
  [[nodiscard]] std::string audit_node(NodeId id) const;
  [[nodiscard]] std::string audit_log() const;

  [[nodiscard]] Walk walk(NodeId from, std::span<const Token> tokens);
  [[nodiscard]] Prefix grow(NodeId from, std::span<const Token> tokens, std::span<const PageId> pages);
  [[nodiscard]] NodeId find_or_add_root(std::string_view salt);
  [[nodiscard]] NodeId add_node();
  void remove_node(NodeId id);
  NodeId add_child(NodeId parent, std::span<const Token> tokens, std::span<const PageId> pages);
  void remove_leaf(NodeId leaf);
  void split(NodeId id, std::size_t num_upper_pages);
  void evict_tail(NodeId leaf, std::size_t count, std::vector<PageId>& out);

  void link(NodeId id);
  void unlink(NodeId id);
  void grow_buckets();

  void touch(NodeId id);
  void update_heap(NodeId id);
  void heap_erase(NodeId id);
  void heap_place(std::uint32_t slot, NodeId id);
  void heap_up(std::uint32_t slot);
  void heap_down(std::uint32_t slot);

  std::size_t page_size_;
  std::vector<Node> nodes_;
  std::vector<NodeId> free_nodes_;
  std::vector<NodeId> buckets_;  // power of two; a list through next_in_bucket each
  std::unordered_map<std::string, NodeId> roots_;
  std::unordered_map<NodeId, std::string> salts_;  // the way back, to drop a root that lost its last page
  std::vector<NodeId> heap_;
  DeltaLog log_;
  std::uint64_t now_ = 0;  // counts uses
  std::uint64_t epoch_ = 1;
  std::size_t num_pages_ = 0;
  std::size_t num_locked_pages_ = 0;
};

}  // namespace disagg
