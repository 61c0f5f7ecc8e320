// How a product of few rows of x with a weight is divided among CTAs, and how tiles lie in shared memory:
// plain arithmetic, for host and device, so that it is tested without a GPU.
//
// A *tile* is `64 * groups` rows of the weight, a *unit* is 64 of k for `multicast` neighbouring tiles, which
// as many CTAs take together: each loads a part of x and sends it to all. Units are numbered tile by tile,
// k by k; slice i of `slices` takes units [units * i / slices, units * (i + 1) / slices). Where k is split in
// a cluster, a tile's slices are exactly the cluster's CTAs.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>

#ifdef __CUDACC__
#define DISAGG_LINEAR_HD __host__ __device__ __forceinline__
#else
#define DISAGG_LINEAR_HD inline
#endif

namespace disagg::cuda {

inline constexpr int kLinearMaxRows = 256;
inline constexpr int kLinearDepth = 64;  // of k: 128 bytes, a swizzled row
inline constexpr int kLinearTile = 64;   // rows of the weight that a warpgroup takes
inline constexpr int kLinearMaxWarps = 8;  // of a CTA that multiply
// Products whose slices are cut anywhere: whatever a plan is, its flags are there, and nothing else.
inline constexpr int kLinearMaxCtas = 1024;
inline constexpr std::size_t kLinearFlagBytes = kLinearMaxCtas * kLinearMaxWarps * 4;
inline constexpr int kLinearSharedLimit = 227 * 1024;
inline constexpr int kLinearTokens[] = {16, 32, 64, 96, 128, 160, 192, 224, 256};

struct LinearPlan {
  int tokens;     // rows of x that a CTA takes, one of kLinearTokens; others take the rest
  int groups;     // warpgroups of a CTA
  int multicast;  // CTAs that share x
  int splits;     // CTAs of a cluster that share a tile's k
  int slices;
  int w_stages, x_stages;
  int sends;  // 1: sums are sent to those who add them; 0: stored there, and a barrier passed

  DISAGG_LINEAR_HD int token_tiles(int rows) const { return (rows + tokens - 1) / tokens; }
  // For each tile of tokens.
  DISAGG_LINEAR_HD int ctas() const { return slices * multicast; }
  DISAGG_LINEAR_HD int cluster() const { return multicast * splits; }
};

// The units of a slice in the order in which it takes them: tiles downwards, the ks of a tile upwards. So
// what a later slice waits for, the part of its last tile that this one has, comes first.
struct LinearWalk {
  int begin, end, depth;  // units; `depth`: of a tile
  int first = 0, last = 0;  // what this slice has of the current tile: ks [first, last)

  DISAGG_LINEAR_HD LinearWalk(int units, int tile_depth, int slice, int slices)
      : begin(begin_of(units, slice, slices)), end(begin_of(units, slice + 1, slices)), depth(tile_depth) {
    enter();
  }
  // Requires: units * slices < 2^32.
  DISAGG_LINEAR_HD static int begin_of(int units, int slice, int slices) {
    return static_cast<int>(static_cast<std::uint32_t>(units) * static_cast<std::uint32_t>(slice) /
                            static_cast<std::uint32_t>(slices));
  }
  DISAGG_LINEAR_HD bool is_over() const { return end == begin; }
  // The current tile; a division, not a member: the kernel has no register for it.
  DISAGG_LINEAR_HD int tile() const { return (end - 1) / depth; }
  DISAGG_LINEAR_HD void next_tile() {
    end -= last - first;
    enter();
  }

 private:
  DISAGG_LINEAR_HD void enter() {
    if (is_over()) return;
    const int tile_begin = tile() * depth;
    last = end - tile_begin;
    first = begin > tile_begin ? begin - tile_begin : 0;
  }
};

DISAGG_LINEAR_HD int linear_tiles(int n, int groups) { return (n + kLinearTile * groups - 1) / (kLinearTile * groups); }

// Tiles of `multicast` CTAs, the last maybe past n.
DISAGG_LINEAR_HD int linear_units(int n, int k, const LinearPlan& plan) {
  return (linear_tiles(n, plan.groups) + plan.multicast - 1) / plan.multicast * (k / kLinearDepth);
}

// ---- shared memory ----

// Where TMA puts byte `byte` of row `row` of a box of 128-byte rows, with 128-byte swizzle, from a tile's
// begin at a multiple of 1,024: the 16-byte chunk's number is xored with the row's in its group of eight.
DISAGG_LINEAR_HD std::uint32_t swizzled(std::uint32_t row, std::uint32_t byte) {
  return row * 128 + (((byte / 16) ^ (row % 8)) * 16 + byte % 16);
}

// wgmma's matrix descriptor of such a tile, "major" in k: begin / 16; stride between groups of eight rows
// / 16; swizzle of 128 bytes. The stride within a row is not used. Sixteen more of k: add 2.
DISAGG_LINEAR_HD std::uint64_t tile_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle128 = 1, kRows = 1024 / 16, kUnused = 1;
  return (address & 0x3ffff) >> 4 | kUnused << 16 | kRows << 32 | kSwizzle128 << 62;
}

struct LinearShared {
  int w_bytes, x_bytes, partials_at, barriers_at, factors_at, bytes;  // `bytes` of all, `*_bytes` of a stage
  bool partials_apart;  // else in the rings' place

  DISAGG_LINEAR_HD static LinearShared of(const LinearPlan& plan, int limit) {
    LinearShared shared{};
    shared.w_bytes = plan.groups * kLinearTile * 128;
    shared.x_bytes = plan.tokens * 128;
    const int rings = plan.w_stages * shared.w_bytes + plan.x_stages * shared.x_bytes;
    const int barriers = 16 * (plan.w_stages + plan.x_stages + 1), factors = 4 * plan.tokens;
    const int partials = plan.splits > 1 ? plan.splits * slice_columns(plan) * plan.groups * 128 * 16 : 0;
    shared.partials_apart = rings + partials + barriers + factors <= limit;
    shared.partials_at = shared.partials_apart ? rings : 0;
    shared.barriers_at = shared.partials_apart ? rings + partials : (rings > partials ? rings : partials);
    shared.factors_at = shared.barriers_at + barriers;
    shared.bytes = shared.factors_at + factors;
    return shared;
  }
  // Groups of eight tokens whose sums one CTA of a tile's makes.
  DISAGG_LINEAR_HD static int slice_columns(const LinearPlan& plan) {
    return (plan.tokens / 8 + plan.splits - 1) / plan.splits;
  }
};

// ---- host ----

// Why a product of these sizes is not for this; nullptr where it is.
[[nodiscard]] inline const char* check_linear(int rows, int n, int k, bool gated) {
  if (rows > kLinearMaxRows) return "x has more than 256 rows";
  if (k < kLinearDepth || k % kLinearDepth != 0) return "k must be a multiple of 64";
  if (n < kLinearTile || n % kLinearTile != 0) return "n must be a multiple of 64";
  if (gated && n % 16 != 0) return "gate and up must be interleaved by eight rows";
  if (static_cast<std::int64_t>(n) * (k / kLinearDepth) >= std::int64_t{1} << 31) return "the weight is too large";
  return nullptr;
}

// Decided by the sizes alone: what was fastest of those that benchmarks/engine/linear.py --sweep tries.
[[nodiscard]] inline LinearPlan plan_linear(int rows, int n, int k, int num_sms) {
  LinearPlan plan{.tokens = 0,
                  .groups = 2,
                  .multicast = 1,
                  .splits = 1,
                  .slices = 1,
                  .w_stages = 1,
                  .x_stages = 1,
                  .sends = 1};
  const int depth = k / kLinearDepth;
  const auto padded = [](int count) {
    return *std::ranges::find_if(kLinearTokens, [count](int tokens) { return tokens >= count; });
  };
  const bool is_large = static_cast<std::int64_t>(n) * k > std::int64_t{8} << 20;
  plan.tokens = padded(is_large ? rows : std::min(rows, 64));
  if (!is_large && linear_tiles(n, 1) * 4 <= num_sms) plan.groups = 1;
  const int tiles = linear_tiles(n, plan.groups), token_tiles = std::max(1, plan.token_tiles(rows));
  // Narrow ones are cut in k until all SMs have a part; wider ones have enough bytes on their way with fewer.
  const int wanted = plan.groups == 1 ? num_sms : num_sms * 3 / 4;
  while (plan.splits < 8 && tiles * token_tiles * plan.splits * 2 <= wanted && depth >= plan.splits * 4)
    plan.splits *= 2;
  plan.slices = tiles * plan.splits;
  constexpr int kHalf = 113 * 1024;  // beside another of that size
  int limit = plan.groups == 1 ? kHalf : kLinearSharedLimit;
  if (tiles > num_sms && rows <= 64) {  // two CTAs an SM, one's end under the other's loads
    plan.multicast = plan.tokens > 32 ? 2 : 1;
    plan.slices = linear_units(n, k, plan) / depth;
    limit = kHalf;
  } else if (tiles > num_sms) {  // equal parts for all SMs, wherever they cut
    plan.multicast = 2;
    plan.slices = std::min(num_sms / 2, linear_units(n, k, plan));
  }
  const int each = (linear_units(n, k, plan) + plan.slices - 1) / plan.slices;
  for (int stages = std::min(each, 24); stages > 0; --stages) {
    plan.w_stages = plan.x_stages = stages;
    if (stages <= 2 || LinearShared::of(plan, kLinearSharedLimit).bytes <= limit) break;
  }
  return plan;
}

// Zeroed before its first use; products that are ordered in a stream may share it. 0 where none is needed.
[[nodiscard]] inline std::size_t linear_workspace_bytes(const LinearPlan& plan, int rows, int n, int k) {
  if (plan.splits > 1 || linear_units(n, k, plan) / (k / kLinearDepth) % plan.slices == 0) return 0;
  return kLinearFlagBytes + static_cast<std::size_t>(plan.ctas() * plan.token_tiles(rows)) * static_cast<std::size_t>(plan.tokens / 8) *
                                static_cast<std::size_t>(128 * plan.groups) * 16;
}

// Why a plan does not fit the sizes; nullptr where it does.
[[nodiscard]] inline const char* check_linear_plan(const LinearPlan& plan, int rows, int n, int k) {
  if (std::ranges::find(kLinearTokens, plan.tokens) == std::end(kLinearTokens))
    return "a plan's tokens must be one of the sizes";
  if (plan.groups != 1 && plan.groups != 2) return "a plan's groups must be 1 or 2";
  if (plan.multicast < 1 || plan.splits < 1 || plan.cluster() > 8 || !std::has_single_bit(static_cast<unsigned>(plan.multicast)))
    return "a plan's cluster must be at most 8 CTAs, and multicast a power of two";
  if (plan.tokens % (8 * plan.multicast) != 0) return "a plan's CTAs must share x by eight tokens";
  const int units = linear_units(n, k, plan), depth = k / kLinearDepth;
  if (plan.slices < 1 || plan.slices > units || static_cast<std::int64_t>(units) * plan.slices >= std::int64_t{1} << 31) return "a plan's slices must each have a unit";
  if (plan.splits > 1 && (plan.slices != units / depth * plan.splits || plan.splits > depth))
    return "a plan's clusters must have a tile each";
  if (linear_workspace_bytes(plan, rows, n, k) > 0 && plan.ctas() * plan.token_tiles(rows) > kLinearMaxCtas)
    return "a plan that cuts tiles must have at most 1024 CTAs";
  // A stage is free when the product after it has begun.
  const int least = std::min(2, (units + plan.slices - 1) / plan.slices);
  if (plan.w_stages < least || plan.x_stages < least || plan.w_stages > 32 || plan.x_stages > 32)
    return "a plan's stages must be 2 to 32";
  if (LinearShared::of(plan, kLinearSharedLimit).bytes > kLinearSharedLimit) return "a plan's stages do not fit";
  return nullptr;
}

}  // namespace disagg::cuda
