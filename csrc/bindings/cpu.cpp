// disagg._cpu: the CPU kernels, over torch tensors. Typed by disagg/_cpu.pyi.
//
// Shapes, strides and types are checked here, once, and are ValueErrors; the kernels trust them.
// The GIL is dropped around what takes long enough to be worth it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "bindings/tensor.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace disagg::bindings {
namespace {

using Tensor = TensorOn<dlpack::kCpu, dlpack::kCudaHost>;
using Level = std::optional<cpu::Isa>;

cpu::Isa isa_of(Level level) {
  static const cpu::Isa best = cpu::best_isa();
  if (!level) return best;
  require(cpu::supports(*level), "this processor does not run that level");
  return *level;
}

cpu::DType dtype_of(const Tensor& t) {
  if (t.is(dlpack::kFloat, 32)) return cpu::DType::kFloat32;
  require(t.is(dlpack::kBfloat, 16), "tensors must be float32 or bfloat16");
  return cpu::DType::kBFloat16;
}

void require_int32(const Tensor& t) {
  require(t.ndim() == 1 && t.is(dlpack::kInt, 32) && t.packed_from(0), "indices must be int32, contiguous vectors");
}

std::span<const std::int32_t> int32_span(const Tensor& t) {
  require_int32(t);
  return {t.as<const std::int32_t>(), static_cast<std::size_t>(t.size(0))};
}

// A vector `[n]` of the type of `like`, or nullptr.
const void* vector_data(const std::optional<Tensor>& t, std::int64_t n, const Tensor& like) {
  if (!t) return nullptr;
  require(t->ndim() == 1 && t->size(0) == n && t->packed_from(0) && t->same_dtype(like),
          "a vector has the wrong length, type or stride");
  return t->data();
}

// Drops the GIL where `elements` are worth it: to take it again may have to wait for another thread.
template <class Work>
void without_gil(bool drop, Work&& work) {
  if (!drop) return work();
  nb::gil_scoped_release release;
  work();
}

// ---- linear ----

// A matrix `[n, k]`, or the same packed: `[n / 32, words of a row, 32, elements of a word]`.
struct Weight {
  explicit Weight(const Tensor& t) : data(t.data()), is_packed(t.ndim() == 4) {
    require(t.packed_from(0) && (is_packed || t.ndim() == 2), "a weight must be a contiguous [n, k], or packed");
    const std::int64_t per_word = cpu::items_per_word(dtype_of(t));
    n = is_packed ? t.size(0) * cpu::kPanel : t.size(0);
    k = is_packed ? t.size(1) * per_word : t.size(1);
    k_words = k / per_word;
    require(!is_packed || (t.size(2) == cpu::kPanel && t.size(3) == per_word), "a packed weight has a wrong shape");
    require(k % per_word == 0, "bfloat16 weights must have an even number of columns");
  }
  void* data;
  bool is_packed;
  std::int64_t n, k, k_words;
};

void pack_linear(const Tensor& weight, int threads, Level level) {
  const Weight matrix(weight);
  require(!matrix.is_packed && matrix.n % cpu::kPanel == 0, "weight must be [n, k] with n a multiple of 32");
  const cpu::Kernels& kernels = cpu::kernels_for(isa_of(level), dtype_of(weight));
  nb::gil_scoped_release release;
  cpu::pack_linear(kernels, matrix.data, cpu::num_panels(matrix.n), matrix.k_words, threads);
}

void unpack_rows(const Tensor& weight, const Tensor& ids, const Tensor& out, int threads) {
  const Weight matrix(weight);
  require(matrix.is_packed && out.ndim() == 2 && out.packed_from(0) && out.same_dtype(weight) &&
              out.size(1) == matrix.k,
          "weight must be packed and out a contiguous [ids, k] of its type");
  require(ids.ndim() == 1 && ids.is(dlpack::kInt, 64) && ids.packed_from(0) && ids.size(0) == out.size(0),
          "ids must be an int64 vector, one a row of out");
  const auto* rows = ids.as<const std::int64_t>();
  for (std::int64_t i = 0; i < ids.size(0); ++i)
    require(rows[i] >= 0 && rows[i] < matrix.n, "an id is past the end of the weight");
  cpu::unpack_rows(static_cast<const std::uint32_t*>(matrix.data), matrix.k_words, rows, ids.size(0),
                   out.as<std::uint32_t>(), threads);
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out,
            int threads, Level level) {
  require(x.ndim() == 2 && out.ndim() == 2 && x.packed_from(1) && out.packed_from(1) && x.same_dtype(out),
          "x and out must be matrices of one type with contiguous rows");
  const cpu::DType dtype = dtype_of(x);
  const Weight matrix(weight);
  require(x.size(0) <= 1 || x.stride(0) % cpu::items_per_word(dtype) == 0, "bfloat16 rows must have an even stride");
  require(weight.same_dtype(x) && x.size(1) == matrix.k && out.size(0) == x.size(0) && out.size(1) == matrix.n,
          "x must be [rows, k] and out [rows, n], of the weight's type");
  const cpu::LinearArgs args{.x = x.data(),
                             .x_stride = x.stride(0),
                             .packed = matrix.is_packed ? weight.as<const std::uint32_t>() : nullptr,
                             .bias = vector_data(bias, matrix.n, x),
                             .out = out.data(),
                             .out_stride = out.stride(0),
                             .rows = x.size(0),
                             .n = matrix.n,
                             .k_words = matrix.k_words};
  const cpu::Kernels& kernels = cpu::kernels_for(isa_of(level), dtype);
  nb::gil_scoped_release release;
  cpu::linear(kernels, args, matrix.data, threads);
}

// ---- rows ----

void rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& out,
              float eps, int threads, Level level) {
  require(x.ndim() == 2 && x.packed_from(1), "x must be a matrix with contiguous rows");
  const auto like_x = [&](const Tensor& t) {
    return t.ndim() == 2 && t.same_dtype(x) && t.packed_from(0) && t.size(0) == x.size(0) && t.size(1) == x.size(1);
  };
  require(like_x(out) && (!residual || like_x(*residual)), "out and residual must be contiguous and shaped as x");
  const cpu::RmsNormArgs args{.x = x.data(),
                              .x_stride = x.stride(0),
                              .residual = residual ? residual->data() : nullptr,
                              .weight = vector_data(weight, x.size(1), x),
                              .out = out.data(),
                              .n = x.size(1),
                              .eps = eps};
  const cpu::Kernels& kernels = cpu::kernels_for(isa_of(level), dtype_of(x));
  without_gil(cpu::worth_threads(x.size(0) * x.size(1)),
              [&] { cpu::rms_norm(kernels, args, x.size(0), threads); });
}

void silu_and_mul(const Tensor& gate_up, const Tensor& out, int threads, Level level) {
  require(gate_up.ndim() == 2 && gate_up.packed_from(1) && out.ndim() == 2 && out.packed_from(0) &&
              out.same_dtype(gate_up) && out.size(0) == gate_up.size(0) && 2 * out.size(1) == gate_up.size(1),
          "gate_up must be [rows, 2 n] and out [rows, n], of one type, with contiguous rows");
  const std::int64_t rows = out.size(0);
  const cpu::SiluArgs args{
      .gate_up = gate_up.data(), .stride = gate_up.stride(0), .out = out.data(), .n = out.size(1)};
  const cpu::Kernels& kernels = cpu::kernels_for(isa_of(level), dtype_of(out));
  without_gil(cpu::worth_threads(rows * out.size(1)), [&] { cpu::silu_and_mul(kernels, args, rows, threads); });
}

// One layer of a pool `[page, kv_head, layer, 2, token, head_dim]`.
cpu::KvPool pool_layer(const Tensor& pool, std::int64_t layer) {
  require(pool.ndim() == 6 && pool.size(3) == 2 && pool.packed_from(4),
          "pool must be [page, kv_head, layer, 2, token, head_dim] with contiguous tokens");
  require(layer >= 0 && layer < pool.size(2), "the pool has no such layer");
  const cpu::DType dtype = dtype_of(pool);
  return {.base = pool.as<char>() + layer * pool.stride(2) * cpu::item_bytes(dtype),
          .page_stride = pool.stride(0),
          .head_stride = pool.stride(1),
          .value_offset = pool.stride(3),
          .page_size = pool.size(4),
          .head_dim = pool.size(5)};
}

// Every token's slot lies in the pool and its position in the table.
void require_slots(const cpu::RopeArgs& args, std::int64_t tokens, std::int64_t num_pages, std::int64_t positions) {
  for (std::int64_t i = 0; i < tokens; ++i) {
    const std::int64_t position = args.wide_positions ? static_cast<const std::int64_t*>(args.positions)[i]
                                                      : static_cast<const std::int32_t*>(args.positions)[i];
    require(args.token_pages[i] >= 0 && args.token_pages[i] < num_pages && args.token_offsets[i] >= 0 &&
                args.token_offsets[i] < args.pool.page_size && position >= 0 && position < positions,
            "a token's page, offset or position is out of range");
  }
}

void rope_and_store(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& pool, std::int64_t layer, const Tensor& token_pages,
                    const Tensor& token_offsets, const std::optional<Tensor>& q_norm,
                    const std::optional<Tensor>& k_norm, float eps, int threads, Level level) {
  const cpu::KvPool view = pool_layer(pool, layer);
  const std::int64_t tokens = q.ndim() == 3 ? q.size(0) : -1;
  const auto heads = [&](const Tensor& t) {
    return t.ndim() == 3 && t.same_dtype(pool) && t.packed_from(1) && t.size(0) == tokens && t.size(2) == view.head_dim;
  };
  require(heads(q) && heads(k) && heads(v) && k.size(1) == pool.size(1) && v.size(1) == pool.size(1),
          "q, k and v must be [tokens, heads, head_dim] of the pool's type, with contiguous heads");
  require(cos_sin.ndim() == 2 && cos_sin.is(dlpack::kFloat, 32) && cos_sin.packed_from(0) &&
              cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= view.head_dim,
          "cos_sin must be float32 [positions, rotary_dim]");
  require(positions.ndim() == 1 && positions.packed_from(0) && positions.size(0) == tokens &&
              (positions.is(dlpack::kInt, 32) || positions.is(dlpack::kInt, 64)),
          "positions must be an int32 or int64 vector, one a token");
  const auto pages = int32_span(token_pages), offsets = int32_span(token_offsets);
  require(std::ssize(pages) == tokens && std::ssize(offsets) == tokens, "one page and one offset a token");
  const cpu::RopeArgs args{.q = q.data(),
                           .k = k.data(),
                           .v = v.data(),
                           .q_stride = q.stride(0),
                           .k_stride = k.stride(0),
                           .v_stride = v.stride(0),
                           .num_heads = q.size(1),
                           .num_kv_heads = k.size(1),
                           .rotary_dim = cos_sin.size(1),
                           .cos_sin = cos_sin.as<const float>(),
                           .positions = positions.data(),
                           .wide_positions = positions.is(dlpack::kInt, 64),
                           .token_pages = pages.data(),
                           .token_offsets = offsets.data(),
                           .q_norm = vector_data(q_norm, view.head_dim, q),
                           .k_norm = vector_data(k_norm, view.head_dim, q),
                           .eps = eps,
                           .pool = view};
  require_slots(args, tokens, pool.size(0), cos_sin.size(0));
  const cpu::Kernels& kernels = cpu::kernels_for(isa_of(level), dtype_of(q));
  without_gil(cpu::worth_threads(tokens * q.size(1) * view.head_dim),
              [&] { cpu::rope_and_store(kernels, args, tokens, threads); });
}

// ---- attention ----

class PagedAttention {
 public:
  PagedAttention(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t page_size,
                 int threads, Level level)
      : attention_(checked({num_heads, num_kv_heads, head_dim, page_size}), threads, isa_of(level)) {}

  void plan(const Tensor& qo_indptr, const Tensor& kv_lens, const Tensor& page_indptr, const Tensor& page_indices) {
    const char* problem = attention_.plan(int32_span(qo_indptr), int32_span(kv_lens), int32_span(page_indptr),
                                          int32_span(page_indices));
    require(problem == nullptr, problem);
  }

  void run(const Tensor& q, const Tensor& pool, std::int64_t layer, const Tensor& out) {
    const cpu::KvPool view = pool_layer(pool, layer);
    const cpu::PagedAttention::Shape& shape = attention_.shape();
    const auto heads = [&](const Tensor& t) {
      return t.ndim() == 3 && t.same_dtype(pool) && t.packed_from(1) && t.size(0) == attention_.num_tokens() &&
             t.size(1) == shape.num_heads && t.size(2) == shape.head_dim;
    };
    require(heads(q) && heads(out), "q and out must be [planned tokens, heads, head_dim] of the pool's type");
    require(pool.size(1) == shape.num_kv_heads && view.page_size == shape.page_size && view.head_dim == shape.head_dim,
            "the pool has another shape than the plan");
    require(attention_.max_page() < pool.size(0), "a page id is past the end of the pool");
    const cpu::AttentionArgs args{.q = q.data(),
                                  .q_stride = q.stride(0),
                                  .out = out.data(),
                                  .out_stride = out.stride(0),
                                  .pool = view,
                                  .group = shape.group(),
                                  .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
    nb::gil_scoped_release release;
    attention_.run(dtype_of(q), args);
  }

 private:
  static cpu::PagedAttention::Shape checked(cpu::PagedAttention::Shape shape) {
    const char* problem = cpu::PagedAttention::check(shape);
    require(problem == nullptr, problem);
    return shape;
  }

  cpu::PagedAttention attention_;
};

std::vector<cpu::Isa> levels() {
  std::vector<cpu::Isa> found;
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512})
    if (cpu::supports(isa)) found.push_back(isa);
  return found;
}

}  // namespace
}  // namespace disagg::bindings

NB_MODULE(_cpu, m) {
  namespace b = disagg::bindings;
  namespace cpu = disagg::cpu;
  m.doc() = "CPU kernels: matrix products, row operators and attention over the paged KV pool.";

  nb::enum_<cpu::Isa>(m, "Level", "Instructions that a kernel is compiled for.")
      .value("BASELINE", cpu::Isa::kBaseline)
      .value("AVX2", cpu::Isa::kAvx2)
      .value("AVX512", cpu::Isa::kAvx512);
  m.def("levels", &b::levels, "Levels that this processor runs, the best last.");
  m.def("available_cpus", &cpu::available_cpus, "Processors that this process may run on.");
  m.attr("PANEL") = cpu::kPanel;

  const auto level = nb::arg("level") = nb::none();
  m.def("pack_linear", &b::pack_linear, "weight"_a, "threads"_a, level);
  m.def("unpack_rows", &b::unpack_rows, "weight"_a, "ids"_a, "out"_a, "threads"_a);
  m.def("linear", &b::linear, "x"_a, "weight"_a, "bias"_a.none(), "out"_a, "threads"_a, level);
  m.def("rms_norm", &b::rms_norm, "x"_a, "residual"_a.none(), "weight"_a, "out"_a, "eps"_a, "threads"_a, level);
  m.def("silu_and_mul", &b::silu_and_mul, "gate_up"_a, "out"_a, "threads"_a, level);
  m.def("rope_and_store", &b::rope_and_store, "q"_a, "k"_a, "v"_a, "positions"_a, "cos_sin"_a, "pool"_a, "layer"_a,
        "token_pages"_a, "token_offsets"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "threads"_a, level);

  nb::class_<b::PagedAttention>(m, "PagedAttention")
      .def(nb::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, b::Level>(), "num_heads"_a,
           "num_kv_heads"_a, "head_dim"_a, "page_size"_a, "threads"_a, level)
      .def("plan", &b::PagedAttention::plan, "qo_indptr"_a, "kv_lens"_a, "page_indptr"_a, "page_indices"_a)
      .def("run", &b::PagedAttention::run, "q"_a, "pool"_a, "layer"_a, "out"_a);
}
