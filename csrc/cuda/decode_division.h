// How a decode step's KV is divided among the warps of a fixed grid: plain arithmetic, for host and
// device, so that it is tested without a GPU.
//
// A *unit* is 16 tokens of one (row, KV head). Units are numbered row by row, head by head, token by
// token; rows without KV have none. CTA c of `ctas` takes units [units * c / ctas, units * (c + 1) / ctas),
// and its warps equal parts of that in order. So any lengths are balanced to one unit, a grid of fixed
// size serves them all, and the parts of one (row, head) lie in consecutive warps and CTAs.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DISAGG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DISAGG_HOST_DEVICE inline
#endif

namespace disagg::cuda {

inline constexpr int kUnitTokens = 16;
inline constexpr int kDecodeWarps = 8;  // of a CTA

DISAGG_HOST_DEVICE int units_of(int kv_len) { return kv_len > 0 ? (kv_len - 1) / kUnitTokens + 1 : 0; }

// A row that has KV. `first`: units of one head in the rows before.
struct alignas(16) DecodeRow {
  int row, kv_len, page_begin, first;
};

struct alignas(16) DecodeDivision {
  std::int64_t units;
  int ctas;  // that have work
  int rows;  // that have KV

  // Fewer CTAs than there are where each warp would not have a unit: less to merge, and no slower.
  DISAGG_HOST_DEVICE static DecodeDivision of(std::int64_t units, int rows, int max_ctas) {
    const std::int64_t wanted = (units + kDecodeWarps - 1) / kDecodeWarps;
    return {units, static_cast<int>(wanted < max_ctas ? wanted : max_ctas), rows};
  }
  DISAGG_HOST_DEVICE std::int64_t begin(int cta) const { return units * cta / ctas; }
  DISAGG_HOST_DEVICE std::int64_t warp_begin(int cta, int warp) const {
    const std::int64_t from = begin(cta), to = begin(cta + 1);
    return from + (to - from) * warp / kDecodeWarps;
  }
  // The CTA that has a unit. Requires: 0 <= unit < units.
  DISAGG_HOST_DEVICE int cta_of(std::int64_t unit) const {
    return static_cast<int>(((unit + 1) * ctas - 1) / units);
  }
};

// Where a warp begins, with its row's facts, so that it starts with one load.
struct alignas(16) DecodeStart {
  int entry;  // of the list of rows that have KV
  int head;
  int unit;   // of that (row, head)
  int count;  // units that this warp takes; 0: it has no work, and the rest means nothing
  DecodeRow row;
};

// `firsts[entry]` is that row's `first`. Requires: 0 <= unit < units of all.
DISAGG_HOST_DEVICE int entry_of(std::int64_t unit, const int* firsts, int rows, int num_kv_heads) {
  int low = 0, high = rows;  // firsts[low] * heads <= unit < firsts[high] * heads
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (static_cast<std::int64_t>(firsts[middle]) * num_kv_heads <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

DISAGG_HOST_DEVICE DecodeStart start_of(const DecodeDivision& division, int cta, int warp, const int* firsts,
                                        const DecodeRow* rows, int num_kv_heads) {
  DecodeStart start{};
  if (cta >= division.ctas) return start;
  const std::int64_t from = division.warp_begin(cta, warp);
  start.count = static_cast<int>(division.warp_begin(cta, warp + 1) - from);
  if (start.count == 0) return start;
  start.entry = entry_of(from, firsts, division.rows, num_kv_heads);
  start.row = rows[start.entry];
  const auto within = static_cast<int>(from - static_cast<std::int64_t>(start.row.first) * num_kv_heads);
  start.head = within / units_of(start.row.kv_len);
  start.unit = within % units_of(start.row.kv_len);
  return start;
}

// Units [begin, end) of one (row, head): what a warp, or a CTA, knows of it.
struct DecodePiece {
  int row, head, first, units;  // `first` and `units`: of the row, as above
  int begin, end;               // nothing where they are equal

  DISAGG_HOST_DEVICE bool continues(const DecodePiece& before) const {
    return row == before.row && head == before.head;
  }
  DISAGG_HOST_DEVICE bool is_whole() const { return begin == 0 && end == units; }
  // A CTA has at most two unfinished pieces: one that an earlier CTA began, and one that it begins.
  DISAGG_HOST_DEVICE int slot() const { return begin == 0 ? 1 : 0; }
  DISAGG_HOST_DEVICE std::int64_t first_unit(int num_kv_heads) const {
    return static_cast<std::int64_t>(first) * num_kv_heads + static_cast<std::int64_t>(head) * units;
  }
};

}  // namespace disagg::cuda
