// A tensor argument of a bound function, lent by torch for the length of the call.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/dlpack_exchange.h"

namespace disagg::bindings {

// A tensor in the memory of one of `Devices`; others are TypeErrors. A module names its own type.
// Owns nothing. Shape and strides are in elements, and belong to the Python object.
template <std::int32_t... Devices>
class TensorOn {
 public:
  TensorOn() = default;
  explicit TensorOn(const dlpack::Tensor& view) : view_(view) {}

  static bool takes(std::int32_t device) { return ((device == Devices) || ...); }

  int ndim() const { return view_.ndim; }
  std::int64_t size(int axis) const { return view_.shape[axis]; }
  std::int64_t stride(int axis) const { return view_.strides[axis]; }
  void* data() const { return static_cast<char*>(view_.data) + view_.byte_offset; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  bool is(std::uint8_t code, int bits) const {
    return view_.dtype.code == code && view_.dtype.bits == bits && view_.dtype.lanes == 1;
  }
  bool same_dtype(const TensorOn& other) const {
    return view_.dtype.code == other.view_.dtype.code && view_.dtype.bits == other.view_.dtype.bits;
  }
  // Whether axes from `first` on lie without gaps.
  bool packed_from(int first) const {
    std::int64_t expected = 1;
    for (int axis = ndim() - 1; axis >= first; expected *= size(axis), --axis)
      if (size(axis) != 1 && stride(axis) != expected) return false;
    return true;
  }

 private:
  dlpack::Tensor view_{};
};

// Throws ValueError: a shape, stride or type that a kernel cannot take is our own bug, but it must
// not become a write to foreign memory.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

namespace detail {

// The exchange API of the last type seen, which is torch.Tensor's but in tests. Guarded by the GIL.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const dlpack::ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  if (api == nullptr || api->version.major != 1 || api->tensor_from_object == nullptr) return nullptr;
  Py_INCREF(type);
  Py_XDECREF(last_type);
  last_type = type;
  return last_api = api;
}

}  // namespace detail
}  // namespace disagg::bindings

namespace nanobind::detail {

template <std::int32_t... Devices>
struct type_caster<disagg::bindings::TensorOn<Devices...>> {
  using Tensor = disagg::bindings::TensorOn<Devices...>;
  NB_TYPE_CASTER(Tensor, const_name("torch.Tensor"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    namespace bindings = disagg::bindings;
    const bindings::dlpack::ExchangeApi* api = bindings::detail::exchange_api(Py_TYPE(source.ptr()));
    if (api == nullptr) return false;
    bindings::dlpack::Tensor view;
    if (api->tensor_from_object(source.ptr(), &view) != 0) {
      PyErr_Clear();
      return false;
    }
    if (!Tensor::takes(view.device.type)) return false;
    value = Tensor(view);
    return true;
  }
};

}  // namespace nanobind::detail
