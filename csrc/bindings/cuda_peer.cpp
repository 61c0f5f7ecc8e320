// PeerCopier of disagg._cuda: maps pools of other processes and copies into them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "bindings/cuda_tensor.h"
#include "cuda/peer_copy.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace disagg::bindings {
namespace {

using Offsets = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct DestroyStream {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream>;
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, DestroyEvent>;

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

// One thread uses it, and in this thread the device stays the current one.
class PeerCopier {
 public:
  PeerCopier(int device, int blocks) : device_(device), blocks_(blocks) {
    require(blocks > 0, "blocks must be at least 1");
    check(cudaSetDevice(device_));
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    // First in line for an SM that the engine's kernels give up, else copies wait for the end of a step.
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
    stream_.reset(stream);
  }

  ~PeerCopier() { cudaStreamSynchronize(stream_.get()); }

  nb::tuple handle(std::uintptr_t address) const {
    check(cudaSetDevice(device_));
    cuda::Exported exported;
    check(cuda::export_memory(pointer(address), exported));
    return nb::make_tuple(nb::bytes(exported.handle.reserved, sizeof exported.handle), exported.offset);
  }

  std::uintptr_t open(const nb::bytes& handle, std::size_t num_bytes) const {
    cudaIpcMemHandle_t theirs;
    require(handle.size() == sizeof theirs, "a handle of CUDA IPC has 64 bytes");
    std::memcpy(&theirs, handle.data(), sizeof theirs);
    const nb::gil_scoped_release without_gil;
    check(cudaSetDevice(device_));
    void* base = nullptr;
    std::size_t size = 0;
    check(cuda::map_memory(theirs, base, size));
    if (size < num_bytes) {
      check(cudaIpcCloseMemHandle(base));
      throw std::runtime_error("the memory is smaller than the pool");
    }
    return reinterpret_cast<std::uintptr_t>(base);
  }

  void close(std::uintptr_t base) const {
    const nb::gil_scoped_release without_gil;
    check(cudaSetDevice(device_));
    check(cudaIpcCloseMemHandle(pointer(base)));
  }

  void wait() const {
    const nb::gil_scoped_release without_gil;
    check(cudaStreamSynchronize(stream_.get()));
  }

  std::int64_t copy(std::uintptr_t source, std::uintptr_t target, const Offsets& source_offsets,
                    const Offsets& target_offsets, const Offsets& lengths) {
    const std::size_t n = lengths.size();
    const auto fits = [](const Offsets& values, std::int64_t least) {
      return std::all_of(values.data(), values.data() + values.size(),
                         [least](std::int64_t value) { return value >= least && value % 16 == 0; });
    };
    require(source % 16 == 0 && target % 16 == 0 && source_offsets.size() == n && target_offsets.size() == n &&
                fits(source_offsets, 0) && fits(target_offsets, 0) && fits(lengths, 16),
            "runs must be columns of one length, in multiples of 16 bytes");
    check(cudaSetDevice(device_));
    Event done = take_event();
    check(cuda::copy_runs(
        pointer(source), pointer(target),
        {{source_offsets.data(), n}, {target_offsets.data(), n}, {lengths.data(), n}},
        static_cast<unsigned>(blocks_), stream_.get()));
    check(cudaEventRecord(done.get(), stream_.get()));
    open_.emplace(next_, std::move(done));
    return next_++;
  }

  bool is_done(std::int64_t copy) {
    const auto found = open_.find(copy);
    require(found != open_.end(), "no such copy is under way");
    const cudaError_t state = cudaEventQuery(found->second.get());
    if (state == cudaErrorNotReady) return false;
    Event event = std::move(found->second);
    open_.erase(found);
    check(state);
    spare_ = std::move(event);
    return true;
  }

 private:
  Event take_event() {
    if (spare_) return std::move(spare_);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return Event(event);
  }

  int device_, blocks_;
  Stream stream_;
  std::unordered_map<std::int64_t, Event> open_;
  Event spare_;
  std::int64_t next_ = 0;
};

}  // namespace

void bind_peer(nb::module_& m) {
  nb::class_<PeerCopier>(m, "PeerCopier")
      .def(nb::init<int, int>(), "device"_a, "blocks"_a)
      .def("handle", &PeerCopier::handle, "address"_a)
      .def("open", &PeerCopier::open, "handle"_a, "num_bytes"_a)
      .def("close", &PeerCopier::close, "base"_a)
      .def("copy", &PeerCopier::copy, "source"_a, "target"_a, "source_offsets"_a.noconvert(),
           "target_offsets"_a.noconvert(), "lengths"_a.noconvert())
      .def("is_done", &PeerCopier::is_done, "copy"_a)
      .def("wait", &PeerCopier::wait);
}

}  // namespace disagg::bindings
