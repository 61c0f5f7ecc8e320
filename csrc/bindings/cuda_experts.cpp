// The mixture of experts of disagg._cuda: checks what cuda/experts.h requires, by ValueErrors.
#include "cuda/experts.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "bindings/cuda_tensor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace disagg::bindings {
namespace {

bool is_int32(const Tensor& t, std::int64_t n) {
  return t.ndim() == 1 && t.size(0) == n && t.is(dlpack::kInt, 32) && t.packed_from(0);
}
bool is_table(const Tensor& t, std::int64_t rows, std::int64_t columns, std::uint8_t code) {
  return t.ndim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is(code, 32) && t.packed_from(0);
}
bool is_matrix(const Tensor& t, std::int64_t rows, std::int64_t columns, const Tensor& like) {
  return t.ndim() == 2 && t.size(0) == rows && t.size(1) == columns && t.same_dtype(like) && t.packed_from(0);
}

cuda::Segment* segments_of(const Tensor& t) {
  require(t.ndim() == 2 && t.size(0) >= 1 && t.size(1) == 4 && t.is(dlpack::kInt, 32) && t.packed_from(0) &&
              reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0,
          "segments must be int32 [n, 4], 16-byte aligned");
  return t.as<cuda::Segment>();
}

void route(const Tensor& logits, const std::optional<Tensor>& token_pages, bool normalize, const Tensor& experts,
           const Tensor& weights, const Tensor& places, const Tensor& tokens, const Tensor& ends,
           const Tensor& segments, std::uintptr_t stream) {
  require(logits.ndim() == 2 && logits.packed_from(1), "logits must be [tokens, experts] with contiguous rows");
  const std::int64_t n = logits.size(0), num_experts = logits.size(1);
  const std::int64_t choices = experts.ndim() == 2 ? experts.size(1) : 0;
  require(num_experts <= cuda::kMaxExperts && choices >= 1 && choices <= cuda::kMaxChoices && choices <= num_experts,
          "there may be at most 512 experts, and a token may choose 1 to 32 of them");
  const std::int64_t pairs = n * choices;
  require(pairs <= std::numeric_limits<std::int32_t>::max(), "there are too many tokens");
  require(is_table(experts, n, choices, dlpack::kInt) && is_table(places, n, choices, dlpack::kInt) &&
              is_table(weights, n, choices, dlpack::kFloat),
          "experts and places must be int32, weights float32, [tokens, choices], contiguous");
  require(is_int32(tokens, pairs) && is_int32(ends, num_experts), "tokens must be int32 [pairs], ends int32 [experts]");
  require(!token_pages || is_int32(*token_pages, n), "token_pages must be int32, one a token");
  require(segments.ndim() == 2 && segments.size(0) > cuda::max_segments(pairs, num_experts),
          "segments must have room for every segment and one more");
  const cuda::RouteArgs args{.logits = logits.data(),
                             .stride = logits.stride(0),
                             .token_pages = token_pages ? token_pages->as<const std::int32_t>() : nullptr,
                             .num_experts = static_cast<std::int32_t>(num_experts),
                             .choices = static_cast<std::int32_t>(choices),
                             .normalize = normalize,
                             .experts = experts.as<std::int32_t>(),
                             .weights = weights.as<float>(),
                             .places = places.as<std::int32_t>(),
                             .tokens = tokens.as<std::int32_t>(),
                             .ends = ends.as<std::int32_t>(),
                             .segments = segments_of(segments)};
  check(cuda::route(dtype_of(logits), args, n, stream_of(stream)));
}

cuda::ExpertsArgs experts_args(const Tensor& x, const std::optional<Tensor>& tokens, const Tensor& weight,
                               const Tensor& segments, const Tensor& out, int parts) {
  require(x.ndim() == 2 && x.packed_from(0), "x must be a contiguous matrix");
  require(weight.ndim() == 3 && weight.packed_from(0) && weight.same_dtype(x) && weight.size(2) == x.size(1) &&
              weight.size(1) % parts == 0,
          "weight must be a contiguous [experts, outputs, inputs] of x's type");
  const std::int64_t outputs = weight.size(1) / parts;
  require(out.ndim() == 2 && is_matrix(out, out.size(0), outputs, x), "out must be a contiguous [pairs, outputs]");
  require(tokens ? is_int32(*tokens, out.size(0)) : x.size(0) == out.size(0), "there must be one row of out a pair");
  require(weight.size(1) <= std::numeric_limits<std::int32_t>::max() / 1024 &&
              weight.size(2) <= std::numeric_limits<std::int32_t>::max() / 1024,
          "the weights are too large");
  return {.x = x.data(),
          .tokens = tokens ? tokens->as<const std::int32_t>() : nullptr,
          .weight = weight.data(),
          .out = out.data(),
          .inputs = static_cast<std::int32_t>(weight.size(2)),
          .outputs = static_cast<std::int32_t>(outputs),
          .segments = segments_of(segments)};
}

void experts_gate_up(const Tensor& x, const Tensor& tokens, const Tensor& weight, const Tensor& segments,
                     const Tensor& out, std::uintptr_t stream) {
  const auto args = experts_args(x, tokens, weight, segments, out, 2);
  if (out.size(0) > 0) check(cuda::experts_gate_up(dtype_of(x), args, stream_of(stream)));
}

void experts_down(const Tensor& x, const Tensor& weight, const Tensor& segments, const Tensor& out,
                  std::uintptr_t stream) {
  const auto args = experts_args(x, std::nullopt, weight, segments, out, 1);
  if (out.size(0) > 0) check(cuda::experts_down(dtype_of(x), args, stream_of(stream)));
}

void combine(const Tensor& y, const Tensor& weights, const Tensor& places, const Tensor& out, std::uintptr_t stream) {
  require(out.ndim() == 2 && out.packed_from(0) && places.ndim() == 2, "out and places must be matrices");
  const std::int64_t n = out.size(0), choices = places.size(1);
  require(is_table(places, n, choices, dlpack::kInt) && is_table(weights, n, choices, dlpack::kFloat),
          "places must be int32, weights float32, [tokens, choices], contiguous");
  require(is_matrix(y, n * choices, out.size(1), out), "y must be a contiguous [pairs, n] of out's type");
  const cuda::CombineArgs args{.y = y.data(),
                               .weights = weights.as<const float>(),
                               .places = places.as<const std::int32_t>(),
                               .choices = static_cast<std::int32_t>(choices),
                               .out = out.data(),
                               .n = out.size(1)};
  check(cuda::combine(dtype_of(out), args, n, stream_of(stream)));
}

}  // namespace

void bind_experts(nb::module_& m) {
  m.def("max_segments", &cuda::max_segments, "pairs"_a, "experts"_a);
  m.def("route", &route, "logits"_a, "token_pages"_a.none(), "normalize"_a, "experts"_a, "weights"_a, "places"_a,
        "tokens"_a, "ends"_a, "segments"_a, "stream"_a);
  m.def(
      "experts_are_fast",
      [](const Tensor& x, std::int64_t width, std::int64_t inner) {
        return cuda::experts_are_fast(dtype_of(x), width, inner) && cuda::experts_are_fast(dtype_of(x), inner, width);
      },
      "x"_a, "width"_a, "inner"_a);
  m.def("experts_gate_up", &experts_gate_up, "x"_a, "tokens"_a, "weight"_a, "segments"_a, "out"_a, "stream"_a);
  m.def("experts_down", &experts_down, "x"_a, "weight"_a, "segments"_a, "out"_a, "stream"_a);
  m.def("combine", &combine, "y"_a, "weights"_a, "places"_a, "out"_a, "stream"_a);
}

}  // namespace disagg::bindings
