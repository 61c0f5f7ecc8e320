// DecodeAttention of disagg._cuda: checks what cuda/decode_attention.h requires, by ValueErrors.
//
// Device tensors are checked by shape, stride, type and alignment; what is in them cannot be, for that
// would wait for the device.
#include "cuda/decode_attention.h"

#include <nanobind/nanobind.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "bindings/cuda_tensor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace disagg::bindings {
namespace {

using Attention = cuda::DecodeAttention;

constexpr std::uint8_t kUnsigned = 1;  // of DLPack

cuda::DType dtype_named(const nb::object& dtype) {
  const std::string name = nb::str(dtype).c_str();  // of a torch.dtype, or a string without the module
  const auto is = [&name](const std::string& wanted) { return name == wanted || name == "torch." + wanted; };
  if (is("float32")) return cuda::DType::kFloat32;
  if (is("bfloat16")) return cuda::DType::kBFloat16;
  if (is("float16")) return cuda::DType::kFloat16;
  throw std::invalid_argument("dtype must be bfloat16, float16 or float32, got " + name);
}

bool is_e4m3(const nb::object& kv_dtype, const nb::object& dtype) {
  const std::string name = nb::str(kv_dtype).c_str();
  if (name == "float8_e4m3fn" || name == "torch.float8_e4m3fn") return true;
  if (!kv_dtype.is_none() && dtype_named(kv_dtype) != dtype_named(dtype))
    throw std::invalid_argument("kv_dtype must be dtype or float8_e4m3fn, got " + name);
  return false;
}

bool has(const Tensor& t, cuda::DType dtype) {
  return (t.is(dlpack::kFloat, 32) || t.is(dlpack::kFloat, 16) || t.is(dlpack::kBfloat, 16)) && dtype_of(t) == dtype;
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0; }

bool is_int32(const Tensor& t) { return t.ndim() == 1 && t.is(dlpack::kInt, 32) && t.packed_from(0); }

class DecodeAttention {
 public:
  DecodeAttention(int num_heads, int num_kv_heads, int head_dim, int page_size, int max_rows, const nb::object& dtype,
                  int num_sms, const nb::object& kv_dtype)
      : attention_(checked({num_heads, num_kv_heads, head_dim, page_size, max_rows, dtype_named(dtype), num_sms,
                            is_e4m3(kv_dtype, dtype)})) {}

  bool is_fast() const { return attention_.shape().is_fast(); }
  std::size_t workspace_bytes() const { return attention_.workspace_bytes(); }

  void plan(const Tensor& kv_lens, const Tensor& page_indptr, const Tensor& workspace, std::uintptr_t stream) const {
    const int rows = num_rows(kv_lens, page_indptr);
    require_workspace(workspace);
    check(attention_.plan(kv_lens.as<const int>(), page_indptr.as<const int>(), rows, workspace.data(),
                          stream_of(stream)));
  }

  void run(const Tensor& q, const Tensor& pool, int layer, const Tensor& page_indices, const Tensor& kv_lens,
           const Tensor& page_indptr, const Tensor& out, const Tensor& workspace, std::uintptr_t stream) const {
    const Attention::Shape& shape = attention_.shape();
    const int rows = num_rows(kv_lens, page_indptr);
    require(is_heads(q, rows), "q must be [rows of kv_lens, num_heads, head_dim] of dtype, heads contiguous and rows "
                               "16-byte aligned");
    require(is_heads(out, rows), "out must be [rows of kv_lens, num_heads, head_dim] of dtype, heads contiguous and "
                                 "rows 16-byte aligned");
    const bool has_kv = shape.kv_is_e4m3 ? pool.is(dlpack::kE4m3, 8) : has(pool, shape.dtype);
    require(pool.ndim() == 6 && has_kv && pool.packed_from(0) && is_aligned(pool) &&
                pool.size(1) == shape.num_kv_heads && pool.size(3) == 2 && pool.size(4) == shape.page_size &&
                pool.size(5) == shape.head_dim,
            "pool must be a contiguous [page, num_kv_heads, layer, 2, page_size, head_dim] of kv_dtype");
    const std::int64_t runs = pool.size(0) * pool.size(1) * pool.size(2);
    require(runs > 0 && runs <= std::numeric_limits<int>::max(),
            "pool must have between 1 and 2**31 - 1 pages times heads times layers");
    require(layer >= 0 && layer < pool.size(2), "layer is past the end of the pool");
    require(is_int32(page_indices), "page_indices must be a contiguous int32 vector");
    require_workspace(workspace);
    const Attention::Run args{.q = q.data(),
                              .q_stride = q.stride(0),
                              .pool = pool.data(),
                              .num_pages = pool.size(0),
                              .num_layers = static_cast<int>(pool.size(2)),
                              .layer = layer,
                              .page_indices = page_indices.as<const int>(),
                              .kv_lens = kv_lens.as<const int>(),
                              .page_indptr = page_indptr.as<const int>(),
                              .out = out.data(),
                              .out_stride = out.stride(0),
                              .rows = rows,
                              .workspace = workspace.data()};
    check(attention_.run(args, stream_of(stream)));
  }

 private:
  static Attention::Shape checked(const Attention::Shape& shape) {
    const char* problem = Attention::check(shape);
    require(problem == nullptr, problem);
    return shape;
  }

  int num_rows(const Tensor& kv_lens, const Tensor& page_indptr) const {
    require(is_int32(kv_lens), "kv_lens must be a contiguous int32 vector");
    require(kv_lens.size(0) <= attention_.shape().max_rows, "kv_lens has more than max_rows rows");
    require(is_int32(page_indptr) && page_indptr.size(0) == kv_lens.size(0) + 1,
            "page_indptr must be a contiguous int32 vector, one longer than kv_lens");
    return static_cast<int>(kv_lens.size(0));
  }

  bool is_heads(const Tensor& t, int rows) const {
    const Attention::Shape& shape = attention_.shape();
    return t.ndim() == 3 && has(t, shape.dtype) && t.packed_from(1) && t.size(0) == rows &&
           t.size(1) == shape.num_heads && t.size(2) == shape.head_dim && is_aligned(t) &&
           (rows <= 1 || t.stride(0) % 8 == 0);
  }

  void require_workspace(const Tensor& workspace) const {
    const std::size_t bytes = workspace_bytes();
    require(workspace.ndim() == 1 && workspace.packed_from(0) && workspace.is(kUnsigned, 8) &&
                static_cast<std::size_t>(workspace.size(0)) >= bytes && (bytes == 0 || is_aligned(workspace)),
            "workspace must be a uint8 vector of at least workspace_bytes(), 16-byte aligned");
  }

  Attention attention_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<DecodeAttention>(m, "DecodeAttention")
      .def(nb::init<int, int, int, int, int, const nb::object&, int, const nb::object&>(), "num_heads"_a,
           "num_kv_heads"_a, "head_dim"_a, "page_size"_a, "max_rows"_a, "dtype"_a, "num_sms"_a,
           "kv_dtype"_a = nb::none())
      .def_prop_ro("is_fast", &DecodeAttention::is_fast)
      .def("workspace_bytes", &DecodeAttention::workspace_bytes)
      .def("plan", &DecodeAttention::plan, "kv_lens"_a, "page_indptr"_a, "workspace"_a, "stream"_a)
      .def("run", &DecodeAttention::run, "q"_a, "pool"_a, "layer"_a, "page_indices"_a, "kv_lens"_a, "page_indptr"_a,
           "out"_a, "workspace"_a, "stream"_a);
}

}  // namespace disagg::bindings
