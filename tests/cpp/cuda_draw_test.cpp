// What the sampler's kernel computes with, on the host.
#include "cuda/draw.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

using namespace disagg::cuda;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> floats_in_order() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 10.0f);
  std::vector<float> values = {-kInfinity, -3e38f, -1.0f, -1e-40f, 0.0f, 1e-40f, 1.0f, 3e38f, kInfinity};
  for (int i = 0; i < 500; ++i) values.push_back(normal(random));
  std::sort(values.begin(), values.end());
  return values;
}

// Of draws.py: `log_exponential` of host_sampler.py hashes token 5 with the key 0x0123456789ABCDEF.
void test_the_hash_is_that_of_the_host_sampler() {
  CHECK(noise_bits(5 * kTokenFactor + 0x89ABCDEFu, 0x01234567u) == 0x5cc8ee16u);
  CHECK(noise_bits(151935 * kTokenFactor + 0xFFFFFFFFu, 0xFFFFFFFFu) == 0x1486291eu);
  CHECK(std::abs(log_exponential(0x5cc8ee16u) - 0.2550722f) < 1e-6f);
  CHECK(std::abs(log_exponential(0) - -22.1807098f) < 1e-5f);
  CHECK(log_exponential(0x7FFFFFFFu) == kInfinity);  // u rounds to 1: never drawn
}

// What the kernel leaves out by the upper bits alone could not have won; little else is let through.
void test_the_top_of_the_hash_is_below_the_limit_of_all_higher_bits() {
  std::mt19937 random(9);
  for (int i = 0; i < 100000; ++i) {
    const std::uint32_t start = random(), key = random(), bits = noise_bits(start, key), top = noise_top(start, key);
    CHECK(top < top_limit(bits));
    if (bits < 0x7FFF0000u) CHECK(top < top_limit(bits + random() % (0x7FFFFFFFu - bits)));
    if (bits >= 0x10000u) CHECK(top >= top_limit(bits - 0x10000u));
  }
  CHECK(top_limit(0) == 0x20000u);
  CHECK(top_limit(0x7FFEFFFFu) == 0xFFFE0000u);
  CHECK(top_limit(0x7FFF0000u) == ~0u);
  CHECK(top_limit(~0u) == ~0u);
}

void test_keys_are_in_the_order_of_floats() {
  const std::vector<float> values = floats_in_order();
  for (std::size_t i = 0; i < values.size(); ++i) {
    CHECK(unordered(ordered(values[i])) == values[i]);
    if (i > 0) CHECK((ordered(values[i - 1]) < ordered(values[i])) == (values[i - 1] < values[i]));
  }
  CHECK(ordered(-kInfinity) == kOrderedMinusInfinity);
  CHECK(ordered(kInfinity) == kOrderedInfinity);
}

// Comparing with a pivot is comparing keys, also where a key is no number.
void test_pivots_divide_floats_as_keys_do() {
  const std::vector<float> values = floats_in_order();
  std::mt19937 random(8);
  for (int i = 0; i < 2000; ++i) {
    const std::uint32_t key = random();
    CHECK(!std::isnan(pivot(key)));  // whose maximum with another would be that other
    for (const float x : values) {
      if (x == kInfinity && key > kOrderedInfinity) continue;  // the highest pivot is infinity
      CHECK((x >= pivot(key)) == (ordered(x) >= key));
    }
  }
  for (const float x : values) CHECK(x >= pivot(0));
}

// The search of the kernel, of bfloat16: the k-th largest, two bits a round.
void test_two_bits_a_round_find_the_kth_largest() {
  constexpr int kShift = 16;
  std::mt19937 random(9);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> values(257);
  for (float& x : values) x = from_bits(bits_of(normal(random)) & 0xFFFF0000u);
  values[3] = values[4] = -kInfinity;
  std::vector<float> sorted = values;
  std::sort(sorted.rbegin(), sorted.rend());
  for (std::size_t k = 1; k <= values.size(); ++k) {
    std::uint32_t prefix = 0;
    for (int shift = 30; shift >= kShift; shift -= 2) {
      std::uint32_t step = 0;
      for (std::uint32_t p = 1; p <= 3; ++p) {
        const float from = pivot(prefix | p << shift);
        const auto count = std::count_if(values.begin(), values.end(), [&](float x) { return x >= from; });
        if (count >= static_cast<std::ptrdiff_t>(k)) step = p;
      }
      prefix |= step << shift;
    }
    CHECK(value_of(prefix, kShift) == sorted[k - 1]);
  }
}

void test_the_lowest_kept_logit_is_where_the_scaled_one_reaches_the_floor() {
  for (const float temperature : {1e-5f, 0.6f, 1.0f, 50.0f, 1e30f}) {
    const Scale scale{17.25f, temperature};
    for (const float floor : {0.0f, -0.1f, -3.0f, -1e4f, -kInfinity}) {
      const float lowest = lowest_kept(scale, floor);
      CHECK(scale(lowest) >= floor);
      if (lowest > -kInfinity) CHECK(!(scale(std::nextafter(lowest, -kInfinity)) >= floor));
    }
  }
}

}  // namespace

int main() {
  test_the_hash_is_that_of_the_host_sampler();
  test_the_top_of_the_hash_is_below_the_limit_of_all_higher_bits();
  test_keys_are_in_the_order_of_floats();
  test_pivots_divide_floats_as_keys_do();
  test_two_bits_a_round_find_the_kth_largest();
  test_the_lowest_kept_logit_is_where_the_scaled_one_reaches_the_floor();
  return 0;
}
