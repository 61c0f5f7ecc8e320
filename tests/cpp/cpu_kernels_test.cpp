// The CPU kernels on tight buffers, so that the address sanitizer sees every byte that they touch.
// What they compute is compared with float64 in tests/unit/layers and tests/unit/attention; here each
// level must agree with the baseline, and any number of threads with one.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/attention.h"
#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/rows.h"

using namespace disagg::cpu;
using disagg::test::Random;

namespace {

const Isa kLevels[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

// Elements of either type, each in an allocation of its own without slack.
class Buffer {
 public:
  Buffer(DType dtype, std::int64_t count)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(count * item_bytes(dtype))) {}
  static Buffer random(Random& source, DType dtype, std::int64_t count) {
    Buffer buffer(dtype, count);
    for (std::int64_t i = 0; i < count; ++i)
      buffer.set(i, (static_cast<float>(source.below(2001)) - 1000.0f) / 500.0f);
    return buffer;
  }

  void* data() { return bytes_.data(); }
  void set(std::int64_t i, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const auto half = static_cast<std::uint16_t>(bits >> 16);
    if (dtype_ == DType::kFloat32) std::memcpy(&bytes_[static_cast<std::size_t>(i) * 4], &bits, 4);
    if (dtype_ == DType::kBFloat16) std::memcpy(&bytes_[static_cast<std::size_t>(i) * 2], &half, 2);
  }
  float get(std::int64_t i) const {
    std::uint32_t bits = 0;
    if (dtype_ == DType::kFloat32) std::memcpy(&bits, &bytes_[static_cast<std::size_t>(i) * 4], 4);
    if (dtype_ == DType::kBFloat16)
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes_[static_cast<std::size_t>(i) * 2], 2);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes_.size()) / item_bytes(dtype_); }
  bool operator==(const Buffer&) const = default;

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

void check_near(const Buffer& got, const Buffer& want, float scale) {
  for (std::int64_t i = 0; i < got.size(); ++i)
    CHECK(std::abs(got.get(i) - want.get(i)) <= 0.02f * (scale + std::abs(want.get(i))));
}

// Runs `compute(level, threads)` for each level and compares the results.
template <class Compute>
void compare_levels(float scale, Compute&& compute) {
  const Buffer want = compute(Isa::kBaseline, 1);
  for (const Isa isa : kLevels) {
    if (!supports(isa)) continue;
    const Buffer one = compute(isa, 1);
    check_near(one, want, scale);
    CHECK(compute(isa, 3) == one);
  }
}

void linear_agrees(Random& random, DType dtype) {
  const std::int64_t rows = 1 + static_cast<std::int64_t>(random.below(30));
  const std::int64_t n = 1 + static_cast<std::int64_t>(random.below(100));
  const std::int64_t k = 2 * (1 + static_cast<std::int64_t>(random.below(200)));
  Buffer x = Buffer::random(random, dtype, rows * k), weight = Buffer::random(random, dtype, n * k);
  Buffer bias = Buffer::random(random, dtype, n);
  compare_levels(std::sqrt(static_cast<float>(k)), [&](Isa isa, int threads) {
    Buffer out(dtype, rows * n);
    const LinearArgs args{.x = x.data(),
                          .x_stride = k,
                          .packed = nullptr,
                          .bias = bias.data(),
                          .out = out.data(),
                          .out_stride = n,
                          .rows = rows,
                          .n = n,
                          .k_words = k / items_per_word(dtype)};
    linear(kernels_for(isa, dtype), args, weight.data(), threads);
    if (n % kPanel == 0) {
      Buffer packed = weight, same(dtype, rows * n);
      LinearArgs again = args;
      pack_linear(kernels_for(isa, dtype), packed.data(), num_panels(n), args.k_words, threads);
      again.packed = static_cast<const std::uint32_t*>(packed.data());
      again.out = same.data();
      linear(kernels_for(isa, dtype), again, nullptr, threads);
      CHECK(same == out);
    }
    return out;
  });
}

void rows_agree(Random& random, DType dtype) {
  const std::int64_t rows = 1 + static_cast<std::int64_t>(random.below(300));
  const std::int64_t n = 1 + static_cast<std::int64_t>(random.below(300));
  Buffer x = Buffer::random(random, dtype, rows * 2 * n), weight = Buffer::random(random, dtype, n);
  const Buffer residual = Buffer::random(random, dtype, rows * n);
  compare_levels(1.0f, [&](Isa isa, int threads) {
    Buffer out(dtype, rows * n), total = residual;
    const RmsNormArgs args{x.data(), 2 * n, total.data(), weight.data(), out.data(), n, 1e-5f};
    rms_norm(kernels_for(isa, dtype), args, rows, threads);
    return out;
  });
  compare_levels(1.0f, [&](Isa isa, int threads) {
    Buffer out(dtype, rows * n);
    silu_and_mul(kernels_for(isa, dtype), {x.data(), 2 * n, out.data(), n}, rows, threads);
    return out;
  });
}

void attention_agrees(Random& random, DType dtype) {
  const std::int64_t kv_heads = 1 + static_cast<std::int64_t>(random.below(3));
  const std::int64_t group = 1 + static_cast<std::int64_t>(random.below(5));
  const std::int64_t dim = 8 * (1 + static_cast<std::int64_t>(random.below(12)));
  const std::int64_t page_size = 1 + static_cast<std::int64_t>(random.below(20));
  std::vector<std::int32_t> qo_indptr{0}, kv_lens, page_indptr{0}, page_indices;
  const std::uint64_t count = 1 + random.below(4);
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto kv_len = static_cast<std::int32_t>(1 + random.below(600));
    const auto fresh = static_cast<std::int32_t>(1 + random.below(2) * random.below(static_cast<std::uint64_t>(kv_len)));
    kv_lens.push_back(kv_len);
    qo_indptr.push_back(qo_indptr.back() + fresh);
    const auto pages = static_cast<std::int32_t>((kv_len + page_size - 1) / page_size);
    page_indptr.push_back(page_indptr.back() + pages);
    for (std::int32_t page = 0; page < pages; ++page)
      page_indices.insert(page_indices.begin(), static_cast<std::int32_t>(page_indices.size()));
  }
  const std::int64_t head_elements = 2 * page_size * dim, page_elements = kv_heads * head_elements;
  const std::int64_t tokens = qo_indptr.back(), width = kv_heads * group * dim;
  Buffer pool = Buffer::random(random, dtype, page_indptr.back() * page_elements);
  Buffer q = Buffer::random(random, dtype, tokens * width);
  compare_levels(1.0f, [&](Isa isa, int threads) {
    Buffer out(dtype, tokens * width);
    PagedAttention attention({kv_heads * group, kv_heads, dim, page_size}, threads, isa);
    CHECK(attention.plan(qo_indptr, kv_lens, page_indptr, page_indices) == nullptr);
    attention.run(dtype, {.q = q.data(),
                          .q_stride = width,
                          .out = out.data(),
                          .out_stride = width,
                          .pool = {.base = pool.data(),
                                   .page_stride = page_elements,
                                   .head_stride = head_elements,
                                   .value_offset = page_size * dim,
                                   .page_size = page_size,
                                   .head_dim = dim},
                          .group = group,
                          .scale = 1.0f / std::sqrt(static_cast<float>(dim))});
    return out;
  });
}

}  // namespace

int main() {
  Random random(1);
  for (int round = 0; round < 15; ++round) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      linear_agrees(random, dtype);
      rows_agree(random, dtype);
      attention_agrees(random, dtype);
    }
  }
}
