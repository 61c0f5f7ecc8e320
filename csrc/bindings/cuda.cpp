// disagg._cuda: the CUDA kernels, over torch tensors. Typed by disagg/_cuda.pyi.
//
// Shapes, strides and types are checked here and are ValueErrors; what lies in the tensors (indices,
// pages) is on the device, so the kernels trust it. Nothing here waits, allocates or copies: every call
// only launches on the stream that it is given, and may be captured in a graph.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>

#include "bindings/cuda_tensor.h"
#include "cuda/activation.h"
#include "cuda/norm.h"
#include "cuda/quantize.h"
#include "cuda/rope.h"
#include "cuda/sample.h"
#include "cuda/tokens.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace disagg::bindings {
namespace {

// A vector `[n]` of the type of `like`, or nullptr.
const void* vector_data(const std::optional<Tensor>& t, std::int64_t n, const Tensor& like) {
  if (!t) return nullptr;
  require(t->ndim() == 1 && t->size(0) == n && t->packed_from(0) && t->same_dtype(like),
          "a vector has the wrong length, type or stride");
  return t->data();
}

template <class T>
T* column(const Tensor& t, std::uint8_t code, std::int64_t n, const char* message) {
  require(t.ndim() == 1 && t.size(0) == n && t.is(code, 32) && t.packed_from(0), message);
  return t.as<T>();
}
std::int32_t* int32s(const Tensor& t, std::int64_t n) {
  return column<std::int32_t>(t, dlpack::kInt, n, "indices must be int32, contiguous vectors, one a row");
}
const float* floats(const Tensor& t, std::int64_t n) {
  return column<const float>(t, dlpack::kFloat, n, "temperature, top_p and min_p must be float32 vectors, one a row");
}

void rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& out,
              float eps, std::uintptr_t stream) {
  require(x.ndim() == 2 && x.packed_from(1), "x must be a matrix with contiguous rows");
  const auto like_x = [&](const Tensor& t) {
    return t.ndim() == 2 && t.same_dtype(x) && t.packed_from(0) && t.size(0) == x.size(0) && t.size(1) == x.size(1);
  };
  require(like_x(out) && (!residual || like_x(*residual)), "out and residual must be contiguous and shaped as x");
  const cuda::RmsNormArgs args{.x = x.data(),
                               .x_stride = x.stride(0),
                               .residual = residual ? residual->data() : nullptr,
                               .weight = vector_data(weight, x.size(1), x),
                               .out = out.data(),
                               .n = x.size(1),
                               .eps = eps};
  check(cuda::rms_norm(dtype_of(x), args, x.size(0), stream_of(stream)));
}

void silu_and_mul(const Tensor& gate_up, const Tensor& out, bool interleaved, std::uintptr_t stream) {
  require(gate_up.ndim() == 2 && gate_up.packed_from(1) && out.ndim() == 2 && out.packed_from(0) &&
              out.same_dtype(gate_up) && out.size(0) == gate_up.size(0) && 2 * out.size(1) == gate_up.size(1),
          "gate_up must be [rows, 2 n] and out [rows, n], of one type, with contiguous rows");
  require(!interleaved || out.size(1) % 8 == 0, "gate and up are interleaved by eights");
  const cuda::SiluArgs args{.gate_up = gate_up.data(),
                            .stride = gate_up.stride(0),
                            .out = out.data(),
                            .n = out.size(1),
                            .interleaved = interleaved};
  check(cuda::silu_and_mul(dtype_of(out), args, out.size(0), stream_of(stream)));
}

// One layer of a pool `[page, kv_head, layer, 2, token, head_dim]`.
void quantize(const Tensor& x, const Tensor& values, const Tensor& scales, std::uintptr_t stream) {
  require(x.ndim() == 2 && x.packed_from(0), "x must be a contiguous matrix");
  require(values.ndim() == 2 && values.is(dlpack::kUint, 8) && values.packed_from(0) && values.size(0) == x.size(0) &&
              values.size(1) == x.size(1),
          "values must be contiguous bytes, shaped as x");
  require(scales.ndim() == 1 && scales.is(dlpack::kFloat, 32) && scales.packed_from(0) && scales.size(0) == x.size(0),
          "scales must be float32, one a row");
  const cuda::QuantizeArgs args{.x = x.data(), .values = values.data(), .scales = scales.as<float>(), .n = x.size(1)};
  check(cuda::quantize(dtype_of(x), args, x.size(0), stream_of(stream)));
}

cuda::KvPool pool_layer(const Tensor& pool, std::int64_t layer) {
  require(pool.ndim() == 6 && pool.size(3) == 2 && pool.packed_from(4),
          "pool must be [page, kv_head, layer, 2, token, head_dim] with contiguous tokens");
  require(layer >= 0 && layer < pool.size(2), "the pool has no such layer");
  const bool is_e4m3 = pool.is(dlpack::kE4m3, 8);
  return {.base = pool.as<char>() + layer * pool.stride(2) * (is_e4m3 ? 1 : cuda::item_bytes(dtype_of(pool))),
          .page_stride = pool.stride(0),
          .head_stride = pool.stride(1),
          .value_offset = pool.stride(3),
          .page_size = pool.size(4),
          .head_dim = pool.size(5),
          .is_e4m3 = is_e4m3};
}

void rope_and_store(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& pool, std::int64_t layer, const Tensor& token_pages,
                    const Tensor& token_offsets, const std::optional<Tensor>& q_norm,
                    const std::optional<Tensor>& k_norm, float eps, std::uintptr_t stream) {
  const cuda::KvPool view = pool_layer(pool, layer);
  const std::int64_t tokens = q.ndim() == 3 ? q.size(0) : -1;
  const auto heads = [&](const Tensor& t) {
    return t.ndim() == 3 && t.same_dtype(view.is_e4m3 ? q : pool) && t.packed_from(1) && t.size(0) == tokens && t.size(2) == view.head_dim;
  };
  require(heads(q) && heads(k) && heads(v) && k.size(1) == pool.size(1) && v.size(1) == pool.size(1),
          "q, k and v must be [tokens, heads, head_dim] of one type, which is the pool's or that float8_e4m3fn, with "
          "contiguous heads");
  require(view.head_dim <= cuda::kMaxHeadDim, "head_dim must be at most 1024");
  require(cos_sin.ndim() == 2 && cos_sin.is(dlpack::kFloat, 32) && cos_sin.packed_from(0) &&
              cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= view.head_dim,
          "cos_sin must be float32 [positions, rotary_dim]");
  require(positions.ndim() == 1 && positions.packed_from(0) && positions.size(0) == tokens &&
              (positions.is(dlpack::kInt, 32) || positions.is(dlpack::kInt, 64)),
          "positions must be an int32 or int64 vector, one a token");
  const cuda::RopeArgs args{.q = q.data(),
                            .k = k.data(),
                            .v = v.data(),
                            .q_stride = q.stride(0),
                            .k_stride = k.stride(0),
                            .v_stride = v.stride(0),
                            .num_heads = static_cast<std::int32_t>(q.size(1)),
                            .num_kv_heads = static_cast<std::int32_t>(k.size(1)),
                            .rotary_dim = static_cast<std::int32_t>(cos_sin.size(1)),
                            .cos_sin = cos_sin.as<const float>(),
                            .positions = positions.data(),
                            .wide_positions = positions.is(dlpack::kInt, 64),
                            .token_pages = int32s(token_pages, tokens),
                            .token_offsets = int32s(token_offsets, tokens),
                            .q_norm = vector_data(q_norm, view.head_dim, q),
                            .k_norm = vector_data(k_norm, view.head_dim, q),
                            .eps = eps,
                            .pool = view};
  check(cuda::rope_and_store(dtype_of(q), args, tokens, stream_of(stream)));
}

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
            const Tensor& min_p, const Tensor& keys, const Tensor& slots, const Tensor& out,
            const Tensor& last_tokens, std::uintptr_t stream) {
  require(logits.ndim() == 2 && logits.packed_from(1), "logits must be [rows, vocab] with contiguous rows");
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  require(vocab >= 1 && vocab <= cuda::max_vocab(dtype_of(logits)), "the vocabulary does not fit the sampler");
  require(keys.ndim() == 2 && keys.size(0) == rows && keys.size(1) == 2 && keys.is(dlpack::kInt, 32) &&
              keys.packed_from(0),
          "keys must be a contiguous int32 [rows, 2]");
  require(last_tokens.ndim() == 1, "last_tokens must be a vector, one a slot");
  const cuda::SampleArgs args{.logits = logits.data(),
                              .stride = logits.stride(0),
                              .vocab = static_cast<std::int32_t>(vocab),
                              .temperature = floats(temperature, rows),
                              .top_k = int32s(top_k, rows),
                              .top_p = floats(top_p, rows),
                              .min_p = floats(min_p, rows),
                              .keys = keys.as<const std::uint32_t>(),
                              .slots = int32s(slots, rows),
                              .out = int32s(out, rows),
                              .last_tokens = int32s(last_tokens, last_tokens.size(0))};
  check(cuda::sample(dtype_of(logits), args, rows, stream_of(stream)));
}

void gather_tokens(const Tensor& token_ids, const Tensor& slots, const Tensor& last_tokens, std::uintptr_t stream) {
  require(token_ids.ndim() == 1 && last_tokens.ndim() == 1, "token_ids and last_tokens must be vectors");
  const std::int64_t tokens = token_ids.size(0);
  check(cuda::gather_tokens(int32s(token_ids, tokens), int32s(slots, tokens),
                            int32s(last_tokens, last_tokens.size(0)), tokens, stream_of(stream)));
}

void embedding(const Tensor& token_ids, const Tensor& weight, const Tensor& out, std::uintptr_t stream) {
  require(weight.ndim() == 2 && weight.packed_from(0) && out.ndim() == 2 && out.packed_from(0) &&
              out.same_dtype(weight) && out.size(1) == weight.size(1),
          "weight must be [vocab, n] and out [tokens, n], of one type, both contiguous");
  const cuda::EmbeddingArgs args{.token_ids = int32s(token_ids, out.size(0)),
                                 .weight = weight.data(),
                                 .out = out.data(),
                                 .vocab = weight.size(0),
                                 .row_bytes = weight.size(1) * cuda::item_bytes(dtype_of(weight))};
  check(cuda::embedding(args, out.size(0), stream_of(stream)));
}

}  // namespace

void bind_attention(nb::module_& m);  // cuda_attention.cpp
void bind_peer(nb::module_& m);       // cuda_peer.cpp
void bind_linear(nb::module_& m);     // cuda_linear.cpp
void bind_experts(nb::module_& m);    // cuda_experts.cpp

}  // namespace disagg::bindings

NB_MODULE(_cuda, m) {
  namespace b = disagg::bindings;
  m.doc() = "CUDA kernels for Hopper: row operators, sampling and attention over the paged KV pool.";

  m.def("rms_norm", &b::rms_norm, "x"_a, "residual"_a.none(), "weight"_a, "out"_a, "eps"_a, "stream"_a);
  m.def("silu_and_mul", &b::silu_and_mul, "gate_up"_a, "out"_a, "interleaved"_a, "stream"_a);
  m.def("quantize", &b::quantize, "x"_a, "values"_a, "scales"_a, "stream"_a);
  m.def("rope_and_store", &b::rope_and_store, "q"_a, "k"_a, "v"_a, "positions"_a, "cos_sin"_a, "pool"_a, "layer"_a,
        "token_pages"_a, "token_offsets"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "stream"_a);
  m.def("sample", &b::sample, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "keys"_a, "slots"_a,
        "out"_a, "last_tokens"_a, "stream"_a);
  m.def("gather_tokens", &b::gather_tokens, "token_ids"_a, "slots"_a, "last_tokens"_a, "stream"_a);
  m.def("embedding", &b::embedding, "token_ids"_a, "weight"_a, "out"_a, "stream"_a);
  b::bind_attention(m);
  b::bind_peer(m);
  b::bind_linear(m);
  b::bind_experts(m);
}
