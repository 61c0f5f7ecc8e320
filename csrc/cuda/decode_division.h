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

// What of a CTA's work crosses its borders: slot 0 is the (row, head) that an earlier CTA began, slot 1
// the one that this CTA begins and a later one ends. Without one, the slot's CTAs mean nothing.
struct alignas(16) DecodeBorders {
  int first_ended, last_ended, first_begun, last_begun;  // CTAs that have a part of it

  // Without an index, so that they stay in registers.
  DISAGG_HOST_DEVICE int first(int slot) const { return slot == 0 ? first_ended : first_begun; }
  DISAGG_HOST_DEVICE int parts(int slot) const {
    return slot == 0 ? last_ended - first_ended + 1 : last_begun - first_begun + 1;
  }
};

// Where a warp begins, with its row's facts, so that it starts with one load.
struct alignas(16) DecodeStart {
  int entry;  // of the list of rows that have KV
  int head;
  int unit;   // of that (row, head)
  int count;  // units that this warp takes; 0: it has no work, and the rest means nothing
  DecodeRow row;
  DecodeBorders borders;  // of the CTA
  // Whether this warp has all that its CTA has of the slot.
  int has_all_ended, has_all_begun, unused[2];

  DISAGG_HOST_DEVICE bool has_all(int slot) const { return (slot == 0 ? has_all_ended : has_all_begun) != 0; }
};

// Requires: 0 <= unit < units of all.
DISAGG_HOST_DEVICE int entry_of(std::int64_t unit, const DecodeRow* rows, int count, int num_kv_heads) {
  int low = 0, high = count;  // rows[low].first * heads <= unit < rows[high].first * heads
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (static_cast<std::int64_t>(rows[middle].first) * num_kv_heads <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where a unit lies: of which entry, head, and how far in.
struct DecodePlace {
  int entry, head, unit, units;

  DISAGG_HOST_DEVICE static DecodePlace of(std::int64_t at, const DecodeDivision& division, const DecodeRow* rows,
                                           int num_kv_heads) {
    const int entry = entry_of(at, rows, division.rows, num_kv_heads), units = units_of(rows[entry].kv_len);
    const auto within = static_cast<int>(at - static_cast<std::int64_t>(rows[entry].first) * num_kv_heads);
    return {entry, within / units, within % units, units};
  }
};

// `rows`: those that have KV.
DISAGG_HOST_DEVICE DecodeStart start_of(const DecodeDivision& division, int cta, int warp, const DecodeRow* rows,
                                        int num_kv_heads) {
  DecodeStart start{};
  if (cta >= division.ctas) return start;
  const std::int64_t from = division.warp_begin(cta, warp), to = division.warp_begin(cta, warp + 1);
  start.count = static_cast<int>(to - from);
  const auto place_of = [&](std::int64_t unit) { return DecodePlace::of(unit, division, rows, num_kv_heads); };
  const std::int64_t begin = division.begin(cta), end = division.begin(cta + 1);
  const DecodePlace ended = place_of(begin), begun = place_of(end - 1);
  const std::int64_t ended_from = begin - ended.unit, ended_to = ended_from + ended.units;
  const std::int64_t begun_from = end - 1 - begun.unit, begun_to = begun_from + begun.units;
  start.borders = {division.cta_of(ended_from), division.cta_of(ended_to - 1), cta, division.cta_of(begun_to - 1)};
  if (start.count == 0) return start;
  start.has_all_ended = ended_from < begin && from == begin && ended_to <= to;
  start.has_all_begun = begun_to > end && to == end && begun_from >= from;
  const DecodePlace place = place_of(from);
  start.entry = place.entry;
  start.head = place.head;
  start.unit = place.unit;
  start.row = rows[place.entry];
  return start;
}

// Units [begin, end) of one (row, head): what a warp, or a CTA, knows of it.
struct DecodePiece {
  int row, head, units;  // `units`: of the (row, head)
  int begin, end;        // nothing where they are equal

  DISAGG_HOST_DEVICE bool is_whole() const { return begin == 0 && end == units; }
  // A CTA has at most two unfinished pieces: one that an earlier CTA began, and one that it begins.
  DISAGG_HOST_DEVICE int slot() const { return begin == 0 ? 1 : 0; }
};

}  // namespace disagg::cuda
