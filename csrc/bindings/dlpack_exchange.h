// DLPack's C exchange API (version 1): how a framework lends a tensor without running Python.
//
// A type that offers it has a capsule "dlpack_exchange_api" as its `__dlpack_c_exchange_api__`.
// `__dlpack__` costs 2.3 us a tensor in torch 2.11, this 0.03; a decode step passes a thousand.
// Only what we call is named. Source: dlpack.h of DLPack 1.3.
#pragma once

#include <cstdint>

namespace disagg::bindings::dlpack {

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

// Strides are in elements. Shape and strides live as long as the tensor they were taken from.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  void (*unused[3])();
  // Nonzero with a Python exception set when it fails; nullptr where a framework has no such call.
  int (*tensor_from_object)(void* object, Tensor* out);
};

inline constexpr std::int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;
inline constexpr std::uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kE4m3 = 10;

}  // namespace disagg::bindings::dlpack
