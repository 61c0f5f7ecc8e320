#include "cuda/linear_division.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "check.h"

using namespace disagg::cuda;
using disagg::test::Random;

namespace {

constexpr int kSms = 132;
// Qwen3-0.6B's and Llama-3.1-8B's, a vocabulary, and odd ones.
constexpr std::pair<int, int> kShapes[] = {{4096, 1024},  {1024, 2048},  {6144, 1024},   {1024, 3072},
                                           {6144, 4096},  {4096, 4096},  {28672, 4096},  {4096, 14336},
                                           {151936, 1024}, {64, 64},     {192, 320},     {8384, 1600}};

// Every unit of a plan once, a tile's parts in the order in which the kernel relies on them.
void check_division(const LinearPlan& plan, int n, int k) {
  const int units = linear_units(n, k, plan), depth = k / kLinearDepth;
  CHECK(units * plan.multicast >= linear_tiles(n, plan.groups) * depth);
  int at = 0, most = 0, least = units;
  for (int slice = 0; slice < plan.slices; ++slice) {
    LinearWalk walk(units, depth, slice, plan.slices);
    CHECK(walk.begin == at && walk.end > walk.begin);
    at = walk.end;
    most = std::max(most, walk.end - walk.begin);
    least = std::min(least, walk.end - walk.begin);
    int tiles = 0, below = walk.end;
    for (; !walk.is_over(); walk.next_tile(), ++tiles) {
      CHECK(walk.first < walk.last && walk.last <= depth);
      CHECK(walk.tile() * depth + walk.last == below);
      below -= walk.last - walk.first;
      // Only the first tile that it takes may want an end by another slice, which is a later one.
      CHECK(walk.last == depth || tiles == 0);
      if (walk.last < depth) CHECK(slice + 1 < plan.slices);
    }
    CHECK(below == walk.begin);
    if (plan.splits > 1) CHECK(tiles == 1);
  }
  CHECK(at == units && most - least <= 1);
  if (plan.splits == 1) return;
  for (int slice = 0; slice < plan.slices; ++slice)  // a cluster's slices have its tile, nothing else
    CHECK(LinearWalk(units, depth, slice, plan.slices).tile() == slice / plan.splits);
}

void plans_give_every_sm_as_much() {
  for (const auto& [n, k] : kShapes) {
    for (int rows = 0; rows <= kLinearMaxRows; ++rows) {
      CHECK(check_linear(rows, n, k, false) == nullptr);
      for (const int sms : {kSms, 114, 8}) {
        const LinearPlan plan = plan_linear(rows, n, k, sms);
        CHECK(check_linear_plan(plan, rows, n, k) == nullptr);
        // A slice may wait for one before it, so all must run at once.
        CHECK(linear_workspace_bytes(plan, rows, n, k) == 0 || plan.ctas() <= sms);
        check_division(plan, n, k);
      }
    }
  }
}

void other_plans_divide_as_well() {
  Random random(3);
  int tried = 0;
  while (tried < 3000) {
    const int n = 64 * (1 + static_cast<int>(random.below(40))), k = 64 * (1 + static_cast<int>(random.below(40)));
    const int rows = static_cast<int>(random.below(257));
    LinearPlan plan{kLinearTokens[random.below(std::size(kLinearTokens))],
                    1 + static_cast<int>(random.below(2)),
                    1 << random.below(3),
                    1 << random.below(4),
                    1 + static_cast<int>(random.below(200)),
                    2,
                    2,
                    static_cast<int>(random.below(2))};
    if (plan.splits > 1) plan.slices = linear_units(n, k, plan) / (k / kLinearDepth) * plan.splits;
    if (check_linear_plan(plan, rows, n, k) != nullptr) continue;
    check_division(plan, n, k);
    ++tried;
  }
}

// PTX's canonical layout of a K-major operand with 128-byte swizzle: rows of 128 bytes in groups of eight,
// groups a stride apart, and bits 4 to 6 of an address xored with bits 7 to 9.
void descriptors_say_where_tma_writes() {
  Random random(1);
  for (int i = 0; i < 10000; ++i) {
    const auto base = static_cast<std::uint32_t>(random.below(227)) * 1024;
    const auto row = static_cast<std::uint32_t>(random.below(256)), step = static_cast<std::uint32_t>(random.below(4));
    const auto byte = static_cast<std::uint32_t>(random.below(32));  // of 16 elements of k
    const std::uint64_t descriptor = tile_descriptor(base) + 2 * step;
    CHECK(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0);
    const std::uint64_t begin = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    std::uint64_t address = begin + row % 8 * 128 + row / 8 * stride + byte;
    address ^= (address >> 7 & 7) << 4;
    CHECK(address == base + swizzled(row, step * 32 + byte));
  }
}

void stages_and_partials_do_not_overlap() {
  for (const auto& [n, k] : kShapes) {
    for (const int rows : {1, 64, 65, 129, 256}) {
      const LinearPlan plan = plan_linear(rows, n, k, kSms);
      const LinearShared shared = LinearShared::of(plan, kLinearSharedLimit);
      const int rings = plan.w_stages * shared.w_bytes + plan.x_stages * shared.x_bytes;
      CHECK(shared.w_bytes % 1024 == 0 && shared.x_bytes % 1024 == 0 && shared.partials_at % 1024 == 0);
      CHECK(shared.barriers_at >= rings && shared.barriers_at % 8 == 0 && shared.bytes <= kLinearSharedLimit);
      if (plan.splits > 1 && shared.partials_apart) CHECK(shared.partials_at >= rings);
    }
  }
}

}  // namespace

int main() {
  return disagg::test::run({{"plans give every SM as much", plans_give_every_sm_as_much},
                            {"other plans divide as well", other_plans_divide_as_well},
                            {"descriptors say where TMA writes", descriptors_say_where_tma_writes},
                            {"stages and partials do not overlap", stages_and_partials_do_not_overlap}});
}
