// Products of few rows of disagg._cuda: checks what cuda/linear.h requires, by ValueErrors.
#include "cuda/linear.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>

#include "bindings/cuda_tensor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace disagg::bindings {
namespace {

bool is_matrix(const Tensor& t, std::int64_t rows, std::int64_t columns) {
  return t.ndim() == 2 && t.is(dlpack::kBfloat, 16) && t.packed_from(1) && t.size(0) == rows && t.size(1) == columns &&
         (rows <= 1 || t.stride(0) % 8 == 0) && reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0;
}

bool is_squares(const Tensor& t, std::int64_t width) {
  return t.ndim() == 2 && t.is(dlpack::kFloat, 32) && t.packed_from(0) && t.size(0) == width / cuda::kLinearTile &&
         t.size(1) == cuda::kLinearMaxRows;
}

// Of a single row the stride may be anything.
std::int64_t row_stride(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

void require_none(const char* problem) { require(problem == nullptr, problem); }

cuda::LinearPlan plan_linear(int rows, int n, int k, bool gated, int num_sms) {
  require(rows >= 0 && num_sms >= 8, "rows must not be negative, and num_sms at least 8");
  require_none(cuda::check_linear(rows, n, k, gated));
  return cuda::plan_linear(rows, n, k, num_sms);
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, const Tensor& out, bool gated,
            const std::optional<Tensor>& squares, float eps, const std::optional<Tensor>& squares_out,
            const std::optional<Tensor>& norm, const std::optional<Tensor>& normed, const cuda::LinearPlan& plan,
            const Tensor& workspace, std::uintptr_t stream) {
  require(x.ndim() == 2 && weight.ndim() == 2, "x must be [rows, k] and weight [n, k]");
  const std::int64_t rows = x.size(0), n = weight.size(0), k = x.size(1);
  require(rows <= cuda::kLinearMaxRows && n <= 1 << 24 && k <= 1 << 20, "the product is too large");
  require_none(cuda::check_linear(static_cast<int>(rows), static_cast<int>(n), static_cast<int>(k), gated));
  require_none(cuda::check_linear_plan(plan, static_cast<int>(rows), static_cast<int>(n), static_cast<int>(k)));
  require(is_matrix(x, rows, k), "x must be bfloat16 [rows, k] with contiguous, 16-byte aligned rows");
  require(is_matrix(weight, n, k) && weight.packed_from(0), "weight must be a contiguous, aligned bfloat16 [n, k]");
  const std::int64_t width = gated ? n / 2 : n;
  require(is_matrix(out, rows, width), "out must be bfloat16 [rows, n or half of it] with aligned rows");
  require(!residual || (!gated && is_matrix(*residual, rows, width)), "residual must be as out, which is not gated");
  const auto is_vector = [n](const Tensor& t) {
    return t.ndim() == 1 && t.is(dlpack::kBfloat, 16) && t.packed_from(0) && t.size(0) == n;
  };
  require(!bias || is_vector(*bias), "bias must be a bfloat16 vector [n]");
  require(!squares || is_squares(*squares, k), "squares must be a contiguous float32 [k / 64, 256]");
  require(squares_out.has_value() == norm.has_value() && squares_out.has_value() == normed.has_value(),
          "squares_out, norm and normed go together");
  require(!squares_out || (is_squares(*squares_out, n) && is_vector(*norm) && is_matrix(*normed, rows, n)),
          "squares_out must be float32 [n / 64, 256], norm bfloat16 [n] and normed bfloat16 [rows, n]");
  require(!squares_out || (residual && plan.splits > 1), "squares_out wants a residual and a plan with splits");
  const std::size_t bytes = cuda::linear_workspace_bytes(plan, static_cast<int>(rows), static_cast<int>(n), static_cast<int>(k));
  require(workspace.ndim() == 1 && workspace.packed_from(0) && workspace.is(1, 8) &&
              static_cast<std::size_t>(workspace.size(0)) >= bytes &&
              (bytes == 0 || reinterpret_cast<std::uintptr_t>(workspace.data()) % 16 == 0),
          "workspace must be a uint8 vector of at least linear_workspace_bytes(), 16-byte aligned");
  const cuda::LinearArgs args{.x = x.data(),
                              .x_stride = row_stride(x),
                              .w = weight.data(),
                              .out = out.data(),
                              .out_stride = row_stride(out),
                              .bias = bias ? bias->data() : nullptr,
                              .residual = residual ? residual->data() : nullptr,
                              .residual_stride = residual ? row_stride(*residual) : 0,
                              .squares = squares ? squares->as<const float>() : nullptr,
                              .eps = eps,
                              .squares_out = squares_out ? squares_out->as<float>() : nullptr,
                              .norm = norm ? norm->data() : nullptr,
                              .normed = normed ? normed->data() : nullptr,
                              .normed_stride = normed ? row_stride(*normed) : 0,
                              .gated = gated,
                              .rows = static_cast<int>(rows),
                              .n = static_cast<int>(n),
                              .k = static_cast<int>(k),
                              .workspace = workspace.data()};
  check(cuda::linear(args, plan, stream_of(stream)));
}

}  // namespace

void bind_linear(nb::module_& m) {
  using Plan = cuda::LinearPlan;
  nb::class_<Plan>(m, "LinearPlan")
      .def(
          "__init__",
          [](Plan* plan, int tokens, int groups, int multicast, int splits, int slices, int w_stages, int x_stages,
             int sends) {
            new (plan) Plan{tokens, groups, multicast, splits, slices, w_stages, x_stages, sends};
          },
          "tokens"_a, "groups"_a, "multicast"_a, "splits"_a, "slices"_a, "w_stages"_a, "x_stages"_a,
          "sends"_a)
      .def_ro("tokens", &Plan::tokens)
      .def_ro("groups", &Plan::groups)
      .def_ro("multicast", &Plan::multicast)
      .def_ro("splits", &Plan::splits)
      .def_ro("slices", &Plan::slices)
      .def_ro("w_stages", &Plan::w_stages)
      .def_ro("x_stages", &Plan::x_stages)
      .def_ro("sends", &Plan::sends);
  m.def("plan_linear", &plan_linear, "rows"_a, "n"_a, "k"_a, "gated"_a, "num_sms"_a);
  m.def("linear_workspace_bytes", &cuda::linear_workspace_bytes, "plan"_a, "rows"_a, "n"_a, "k"_a);
  m.def("linear", &linear, "x"_a, "weight"_a, "bias"_a.none(), "residual"_a.none(), "out"_a, "gated"_a,
        "squares"_a.none(), "eps"_a, "squares_out"_a.none(), "norm"_a.none(), "normed"_a.none(), "plan"_a,
        "workspace"_a, "stream"_a);
}

}  // namespace disagg::bindings
