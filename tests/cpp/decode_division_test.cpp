#include "cuda/decode_division.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "check.h"

using namespace disagg::cuda;
using disagg::test::Random;

namespace {

// What the device's plan makes of some lengths.
struct Plan {
  std::vector<DecodeRow> rows;
  int num_kv_heads;
  DecodeDivision division{};

  Plan(const std::vector<int>& kv_lens, int heads, int max_ctas) : num_kv_heads(heads) {
    int first = 0;
    for (std::size_t i = 0; i < kv_lens.size(); ++i) {
      if (kv_lens[i] == 0) continue;
      rows.push_back({static_cast<int>(i), kv_lens[i], static_cast<int>(i) * 7, first});
      first += units_of(kv_lens[i]);
    }
    division = DecodeDivision::of(std::int64_t{first} * heads, static_cast<int>(rows.size()), max_ctas);
  }
  DecodeStart start(int cta, int warp) const {
    return start_of(division, cta, warp, rows.data(), num_kv_heads);
  }
  // The pieces that a warp takes, in order, walked as the kernel does.
  std::vector<DecodePiece> pieces(int cta, int warp) const {
    std::vector<DecodePiece> found;
    DecodeStart at = start(cta, warp);
    while (at.count > 0) {
      const int units = units_of(at.row.kv_len), end = std::min(units, at.unit + at.count);
      found.push_back({at.row.row, at.head, units, at.unit, end});
      at.count -= end - at.unit;
      at.unit = 0;
      if (at.count > 0 && ++at.head == num_kv_heads) {
        at.head = 0;
        at.row = rows[static_cast<std::size_t>(++at.entry)];
      }
    }
    return found;
  }
};

std::vector<int> random_lengths(Random& random) {
  std::vector<int> lengths(1 + random.below(random.below(2) ? 6 : 300));
  const std::uint64_t most = random.below(2) ? 40 : 3000;
  for (int& length : lengths) length = random.below(5) == 0 ? 0 : static_cast<int>(random.below(most));
  return lengths;
}

template <class Check>
void over_random_plans(const Check& check) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    Random random(seed);
    const std::vector<int> lengths = random_lengths(random);
    const int heads = 1 + static_cast<int>(random.below(8)), max_ctas = 1 + static_cast<int>(random.below(140));
    check(lengths, heads, max_ctas, Plan(lengths, heads, max_ctas));
  }
}

void each_unit_belongs_to_one_warp_in_order() {
  over_random_plans([](const std::vector<int>& lengths, int heads, int max_ctas, const Plan& plan) {
    std::vector<std::pair<std::pair<int, int>, int>> expected, found;
    for (std::size_t row = 0; row < lengths.size(); ++row)
      for (int head = 0; head < heads; ++head)
        for (int token = 0; token < lengths[row]; token += kUnitTokens)
          expected.push_back({{static_cast<int>(row), head}, token / kUnitTokens});
    for (int cta = 0; cta < max_ctas; ++cta)
      for (int warp = 0; warp < kDecodeWarps; ++warp)
        for (const DecodePiece& piece : plan.pieces(cta, warp))
          for (int unit = piece.begin; unit < piece.end; ++unit) found.push_back({{piece.row, piece.head}, unit});
    CHECK(found == expected);
  });
}

void shares_differ_by_one_unit() {
  over_random_plans([](const std::vector<int>&, int, int max_ctas, const Plan& plan) {
    const std::int64_t units = plan.division.units;
    for (int cta = 0; cta < max_ctas; ++cta) {
      std::int64_t share = 0;
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const int count = plan.start(cta, warp).count;
        share += count;
        if (cta >= plan.division.ctas) CHECK(count == 0);
        if (cta >= plan.division.ctas) continue;
        const std::int64_t whole = plan.division.begin(cta + 1) - plan.division.begin(cta);
        CHECK(count >= whole / kDecodeWarps && count <= (whole + kDecodeWarps - 1) / kDecodeWarps);
      }
      if (cta >= plan.division.ctas) continue;
      CHECK(share >= units / plan.division.ctas && share <= (units - 1) / plan.division.ctas + 1);
    }
    // No CTA is idle while another's warps have two units.
    CHECK(plan.division.ctas == max_ctas || units <= std::int64_t{plan.division.ctas} * kDecodeWarps);
  });
}

// A CTA has one slot for what it ends and one for what it begins, and knows who has the other parts of
// those; a warp knows whether it has all of its CTA's part.
void pieces_that_cross_ctas_have_their_own_slots_and_are_counted() {
  over_random_plans([](const std::vector<int>&, int, int max_ctas, const Plan& plan) {
    std::map<std::pair<int, int>, std::vector<std::pair<int, DecodePiece>>> parts;  // of each (row, head)
    for (int cta = 0; cta < max_ctas; ++cta) {
      std::vector<DecodePiece> merged;
      std::vector<std::vector<int>> takers;  // of each of those
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        int unfinished[2] = {};
        for (const DecodePiece& piece : plan.pieces(cta, warp)) {
          if (!piece.is_whole()) CHECK(++unfinished[piece.slot()] == 1);
          if (!merged.empty() && piece.row == merged.back().row && piece.head == merged.back().head) {
            CHECK(merged.back().end == piece.begin);
            merged.back().end = piece.end;
            takers.back().push_back(warp);
          } else {
            merged.push_back(piece);
            takers.push_back({warp});
          }
        }
      }
      int unfinished[2] = {};
      bool has_all[kDecodeWarps][2] = {};
      for (std::size_t i = 0; i < merged.size(); ++i) {
        const DecodePiece& piece = merged[i];
        if (piece.is_whole()) continue;
        CHECK(++unfinished[piece.slot()] == 1);
        parts[{piece.row, piece.head}].push_back({cta, piece});
        if (takers[i].size() == 1) has_all[takers[i].front()][piece.slot()] = true;
      }
      for (int warp = 0; warp < kDecodeWarps; ++warp)
        for (int slot = 0; slot < 2; ++slot) CHECK(plan.start(cta, warp).has_all(slot) == has_all[warp][slot]);
    }
    for (const auto& [key, found] : parts)
      for (std::size_t i = 0; i < found.size(); ++i) {
        const auto& [cta, piece] = found[i];
        CHECK(piece.slot() == (i == 0 ? 1 : 0));
        CHECK(cta == found.front().first + static_cast<int>(i));
        for (int warp = 0; warp < kDecodeWarps; ++warp) {
          const DecodeBorders borders = plan.start(cta, warp).borders;
          CHECK(borders.first(piece.slot()) == found.front().first);
          CHECK(borders.parts(piece.slot()) == static_cast<int>(found.size()));
        }
      }
  });
}

void large_batches_do_not_overflow() {
  const std::vector<int> lengths(8192, 1 << 20);
  const Plan plan(lengths, 8, 132);
  std::int64_t next = 0;
  for (int cta = 0; cta < 132; ++cta)
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const DecodeStart start = plan.start(cta, warp);
      const std::int64_t at = (std::int64_t{start.row.first} * 8) + std::int64_t{start.head} * 65536 + start.unit;
      CHECK(at == next);
      CHECK(plan.division.cta_of(at) == cta);
      next += start.count;
    }
  CHECK(next == plan.division.units);
}

}  // namespace

int main() {
  return disagg::test::run({
      {"each unit belongs to one warp, in order", each_unit_belongs_to_one_warp_in_order},
      {"shares differ by one unit", shares_differ_by_one_unit},
      {"pieces that cross CTAs have their own slots and are counted",
       pieces_that_cross_ctas_have_their_own_slots_and_are_counted},
      {"large batches do not overflow", large_batches_do_not_overflow},
  });
}
