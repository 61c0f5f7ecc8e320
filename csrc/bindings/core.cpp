// Python's view of csrc/core: plain ints and numpy arrays.
//
// Arrays are taken as they are (`noconvert`: a wrong dtype is a TypeError, never a silent copy) and
// returned as fresh arrays. Results own their memory. What Python could get wrong is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "core/page_hash.h"
#include "core/page_pool.h"
#include "core/prefix_index.h"
#include "core/radix_tree.h"

namespace nb = nanobind;
using nb::literals::operator""_a;
using namespace disagg;

namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Output = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
using Matrix = nb::ndarray<const PageHash, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutputMatrix = nb::ndarray<nb::numpy, std::int32_t, nb::ndim<2>>;

// Below this much work, letting another thread run costs more than the work.
constexpr std::size_t kWorthDroppingGil = 16384;  // tokens or hashes

class GilDropped {
 public:
  explicit GilDropped(std::size_t work) {
    if (work >= kWorthDroppingGil) release_.emplace();
  }

 private:
  std::optional<nb::gil_scoped_release> release_;
};

template <typename T>
std::span<const T> span_of(const Input<T>& array) {
  return {array.data(), array.size()};
}

// Keeps a vector alive for as long as an array looks at it.
template <typename T>
nb::capsule owner_of(std::unique_ptr<std::vector<T>> values) {
  return nb::capsule(values.release(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
}

template <typename T>
Output<T> to_numpy(std::vector<T> values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* const data = owned->data();
  const std::size_t size = owned->size();
  return Output<T>(data, {size}, owner_of(std::move(owned)));
}

// Reports a broken invariant as our own exception, which ends the process with its evidence.
void raise_if_broken(const std::string& broken) {
  if (broken.empty()) return;
  const nb::object type = nb::module_::import_("disagg.errors").attr("InvariantBroken");
  PyErr_SetString(type.ptr(), broken.c_str());
  throw nb::python_error();
}

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

std::size_t checked_page_size(std::int64_t page_size) {
  if (page_size < 1) refuse("page_size must be at least 1, got " + std::to_string(page_size));
  return static_cast<std::size_t>(page_size);
}

WorkerId checked_worker(std::int64_t worker) {
  if (worker < 0 || worker >= std::int64_t{kMaxWorkers}) {
    refuse("worker must be in [0, " + std::to_string(kMaxWorkers) + "), got " + std::to_string(worker));
  }
  return static_cast<WorkerId>(worker);
}

Output<PageHash> hash_pages(const Input<Token>& token_ids, std::int64_t page_size, std::string_view salt) {
  const std::size_t size = checked_page_size(page_size);
  std::vector<PageHash> hashes(token_ids.size() / size);
  {
    const GilDropped dropped(token_ids.size());
    page_hashes(seed_of(salt, size), span_of(token_ids), size, hashes);
  }
  return to_numpy(std::move(hashes));
}

void init_pool(PagePool* place, std::int64_t num_pages) {
  if (num_pages < 0 || num_pages > INT32_MAX) {
    refuse("num_pages must be in [0, 2**31), got " + std::to_string(num_pages));
  }
  new (place) PagePool(static_cast<PageId>(num_pages));
}

std::optional<Output<PageId>> take_pages(PagePool& pool, std::int64_t count) {
  if (count < 0) refuse("n must be at least 0, got " + std::to_string(count));
  if (count > pool.num_free()) return std::nullopt;
  std::vector<PageId> pages(static_cast<std::size_t>(count));
  if (!pool.take(pages)) return std::nullopt;
  return to_numpy(std::move(pages));
}

void give_back_pages(PagePool& pool, const Input<PageId>& page_ids) {
  if (const auto page = pool.give_back(span_of(page_ids))) {
    refuse("page " + std::to_string(*page) +
           " is not in use: it is free already, stands twice in page_ids or is outside [0, " +
           std::to_string(pool.num_pages()) + ")");
  }
}

using NodeAndPages = std::pair<RadixTree::Handle, Output<PageId>>;

NodeAndPages match_prefix(RadixTree& tree, const Input<Token>& token_ids, std::string_view salt) {
  RadixTree::Prefix prefix = tree.match(span_of(token_ids), salt);
  return {prefix.node, to_numpy(std::move(prefix.pages))};
}

[[noreturn]] void refuse_node(RadixTree::Handle node, const char* reason) {
  refuse("node " + std::to_string(node) + reason);
}

NodeAndPages insert_pages(RadixTree& tree, const Input<Token>& token_ids, const Input<PageId>& page_ids,
                          std::string_view salt, RadixTree::Handle after) {
  const std::size_t num_full = token_ids.size() / tree.page_size();
  if (page_ids.size() != num_full) {
    refuse("page_ids must have one entry for each of the " + std::to_string(num_full) + " full pages, got " +
           std::to_string(page_ids.size()));
  }
  std::optional<RadixTree::Prefix> prefix =
      after == 0 ? tree.insert(span_of(token_ids), span_of(page_ids), salt)
                 : tree.extend(after, span_of(token_ids), span_of(page_ids));
  if (!prefix) refuse_node(after, " was evicted or never existed");
  return {prefix->node, to_numpy(std::move(prefix->pages))};
}

void init_tree(RadixTree* place, std::int64_t page_size) {
  new (place) RadixTree(checked_page_size(page_size));
}

Output<PageId> evict_pages(RadixTree& tree, std::int64_t num_pages) {
  if (num_pages < 0) refuse("num_pages must be at least 0, got " + std::to_string(num_pages));
  return to_numpy(tree.evict(static_cast<std::size_t>(num_pages)));
}

Output<PageId> clear_tree(RadixTree& tree) {
  auto pages = tree.clear();
  if (!pages) {
    refuse("clear needs all locks released; " + std::to_string(tree.num_locked_pages()) +
           " pages are locked");
  }
  return to_numpy(std::move(*pages));
}

std::tuple<std::uint64_t, Output<PageHash>, Output<PageHash>> drain_delta(RadixTree& tree) {
  DeltaLog::Delta delta = tree.drain_delta();
  return {delta.seq, to_numpy(std::move(delta.stored)), to_numpy(std::move(delta.removed))};
}

std::pair<std::uint64_t, std::uint64_t> pair_of(const DeltaLog::Digest& digest) {
  return {digest.count, digest.xor_of_all};
}

// A PrefixIndex that notices two threads inside at once. Long calls let other Python threads run, so
// Python's lock alone does not keep them out.
class SharedIndex {
 public:
  class Use {
   public:
    explicit Use(SharedIndex& shared) : shared_(shared) {
      if (shared_.busy_.test_and_set(std::memory_order_acquire)) {
        throw std::runtime_error("this PrefixIndex is in use by another thread");
      }
    }
    ~Use() { shared_.busy_.clear(std::memory_order_release); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    PrefixIndex* operator->() { return &shared_.index_; }

   private:
    SharedIndex& shared_;
  };

 private:
  PrefixIndex index_;
  std::atomic_flag busy_;
};

void store_hashes(SharedIndex& shared, std::int64_t worker, const Input<PageHash>& hashes) {
  const WorkerId checked = checked_worker(worker);
  SharedIndex::Use index(shared);
  const GilDropped dropped(hashes.size());
  index->store(checked, span_of(hashes));
}

void remove_hashes(SharedIndex& shared, std::int64_t worker, const Input<PageHash>& hashes) {
  const WorkerId checked = checked_worker(worker);
  SharedIndex::Use index(shared);
  const GilDropped dropped(hashes.size());
  index->remove(checked, span_of(hashes));
}

void drop_worker(SharedIndex& shared, std::int64_t worker) {
  const WorkerId checked = checked_worker(worker);
  SharedIndex::Use index(shared);
  const GilDropped dropped(index->num_hashes());
  index->drop_worker(checked);
}

Output<std::int32_t> match_hashes(SharedIndex& shared, const Input<PageHash>& hashes) {
  SharedIndex::Use index(shared);
  std::vector<std::int32_t> lengths(index->num_workers());
  index->match(span_of(hashes), lengths);
  return to_numpy(std::move(lengths));
}

OutputMatrix match_all_hashes(SharedIndex& shared, const Matrix& hashes) {
  SharedIndex::Use index(shared);
  const std::size_t num_prompts = hashes.shape(0);
  const std::size_t num_pages = hashes.shape(1);
  const std::size_t num_workers = index->num_workers();
  auto owned = std::make_unique<std::vector<std::int32_t>>(num_prompts * num_workers);
  std::int32_t* const data = owned->data();
  {
    const GilDropped dropped(hashes.size());
    for (std::size_t i = 0; i < num_prompts; ++i) {
      index->match({hashes.data() + i * num_pages, num_pages}, {data + i * num_workers, num_workers});
    }
  }
  return OutputMatrix(data, {num_prompts, num_workers}, owner_of(std::move(owned)));
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Page hashes, page pool, radix tree and prefix index. Documented in _core.pyi and csrc/core/*.h.";

  m.def("page_hashes", &hash_pages, "token_ids"_a.noconvert(), "page_size"_a, "salt"_a = "");

  nb::class_<PagePool>(m, "PagePool")
      .def("__init__", &init_pool, "num_pages"_a)
      .def_prop_ro("num_pages", &PagePool::num_pages)
      .def_prop_ro("num_free", &PagePool::num_free)
      .def("take", &take_pages, "n"_a)
      .def("give_back", &give_back_pages, "page_ids"_a.noconvert())
      .def("audit", [](const PagePool& pool) { raise_if_broken(pool.audit()); });

  nb::class_<RadixTree>(m, "RadixTree")
      .def("__init__", &init_tree, "page_size"_a)
      .def_prop_ro("num_pages", &RadixTree::num_pages)
      .def_prop_ro("num_locked_pages", &RadixTree::num_locked_pages)
      .def_prop_ro("num_nodes", &RadixTree::num_nodes)
      .def_prop_ro("epoch", &RadixTree::epoch)
      .def("match", &match_prefix, "token_ids"_a.noconvert(), "salt"_a = "")
      .def("lock",
           [](RadixTree& tree, RadixTree::Handle node) {
             if (!tree.lock(node)) refuse_node(node, " was evicted or never existed");
           },
           "node"_a)
      .def("unlock",
           [](RadixTree& tree, RadixTree::Handle node) {
             if (!tree.unlock(node)) refuse_node(node, " is not locked");
           },
           "node"_a)
      .def("insert", &insert_pages, "token_ids"_a.noconvert(), "page_ids"_a.noconvert(), "salt"_a = "",
           "after"_a = 0)
      .def("evict", &evict_pages, "num_pages"_a)
      .def("clear", &clear_tree)
      .def("drain_delta", &drain_delta)
      .def("snapshot", [](const RadixTree& tree) { return to_numpy(tree.snapshot()); })
      .def("digest", [](const RadixTree& tree) { return pair_of(tree.digest()); })
      .def("audit", [](const RadixTree& tree) { raise_if_broken(tree.audit()); });

  nb::class_<SharedIndex>(m, "PrefixIndex")
      .def(nb::init<>())
      .def("store", &store_hashes, "worker"_a, "hashes"_a.noconvert())
      .def("remove", &remove_hashes, "worker"_a, "hashes"_a.noconvert())
      .def("drop_worker", &drop_worker, "worker"_a)
      .def("match", &match_hashes, "hashes"_a.noconvert())
      .def("match_all", &match_all_hashes, "hashes"_a.noconvert())
      .def("digest",
           [](SharedIndex& shared, std::int64_t worker) {
             const WorkerId checked = checked_worker(worker);
             return pair_of(SharedIndex::Use(shared)->digest(checked));
           },
           "worker"_a)
      .def_prop_ro("num_workers", [](SharedIndex& shared) { return SharedIndex::Use(shared)->num_workers(); })
      .def_prop_ro("num_hashes", [](SharedIndex& shared) { return SharedIndex::Use(shared)->num_hashes(); })
      .def_prop_ro("memory_bytes",
                   [](SharedIndex& shared) { return SharedIndex::Use(shared)->memory_bytes(); })
      .def("audit", [](SharedIndex& shared) { raise_if_broken(SharedIndex::Use(shared)->audit()); });
}
