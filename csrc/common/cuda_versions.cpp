// Plain C functions of the CUDA library, for `fastseq info`: of which CUDA its runtime is, and the driver
// here.
#include <cuda_runtime.h>

// As CUDA writes versions: 13000 is 13.0.
extern "C" __attribute__((visibility("default"))) int fastseq_cuda_runtime_version() {
  return CUDART_VERSION;
}

// The latest CUDA that the NVIDIA driver can run, or 0 where there is no driver. Starts nothing on a GPU.
extern "C" __attribute__((visibility("default"))) int fastseq_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
