// What a CUDA op needs of torch beside tensors. How a registration uses it:
//
//   const DeviceGuard guard(emissions.get_device_index());             // first: allocations, too, follow it
//   const cudaStream_t stream = current_stream(emissions.get_device_index());
//   FASTSEQ_LAUNCH(kernel, grid, block, bytes, stream, ...);
//   check_launch("crf_nll");                                           // after each launch; does not wait
//
// All of it comes from libtorch_cpu by way of the stable ABI (2.13 for the stream's native handle), so that
// the library also loads beside a torch without CUDA. Under FASTSEQ_EMULATE the same code runs on CPU
// tensors.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "torch_tensor.h"

namespace fastseq {

#ifdef FASTSEQ_EMULATE

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(int32_t) { return {}; }

inline void check_launch(const char*) {}

#else

// An error of CUDA, which is no fault of the caller: its text must not start with "fastseq: ", that is a
// ValueError.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

// Makes `device` the current one until the end of the block: torch's, and that of this library's own copy of
// the CUDA runtime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) : torch_(device) {
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }

 private:
  torch::stable::accelerator::DeviceGuard torch_;
};

// torch's current stream of `device`: inside `with torch.cuda.stream(s)` it is s, in a graph capture the
// capturing one.
inline cudaStream_t current_stream(int32_t device) {
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
}

// Throws if the last launch of this thread was refused (too many threads, no code for this GPU). Errors that
// a kernel meets while it runs come up later, at torch's next synchronisation.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

#endif

// Calls f(S{}, R{}) with the element types of the argument `name`, and of parameters and results.
template <class F>
auto with_types(const Tensor& t, const char* name, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(cuda::bf16{}, float{});
    case ScalarType::Half:
      return f(cuda::f16{}, float{});
    default:
      throw std::runtime_error(std::string("fastseq: ") + name +
                               ": wanted float64, float32, bfloat16 or float16");
  }
}

}  // namespace fastseq
