// The one header that kernels include: CUDA's under nvcc, the emulator's (testing/cuda_emulator.h) under
// g++ with FASTSEQ_EMULATE. Then what all kernels share: launches, dynamic shared memory, elements of any
// type loaded and stored.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(FASTSEQ_EMULATE)
#include "common/half.h"
#include "testing/cuda_emulator.h"
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#error "a CUDA kernel: compile it with nvcc, or with FASTSEQ_EMULATE for the emulator"
#endif

#if !defined(FASTSEQ_EMULATE)

namespace fastseq::cuda {

// What a kernel may use without asking for more.
constexpr size_t kSharedBytes = 48 << 10;

// An error is left for cudaGetLastError.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  if (shared_bytes > kSharedBytes &&
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes)) != cudaSuccess)
    return;
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}

// Meets `count` threads (whole warps) at barrier `id`, 1 to 15; 0 is __syncthreads.
__device__ __forceinline__ void bar_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

}  // namespace fastseq::cuda

// Runs a kernel: FASTSEQ_LAUNCH((kernel<float, 32>), grid, block, bytes, stream, arguments...).
#define FASTSEQ_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::fastseq::cuda::launch(kernel, grid, block, dynamic_shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
// T* name: the block's dynamic shared memory, aligned to 16 bytes.
#define FASTSEQ_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fastseq_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fastseq_dynamic_shared)

#endif

namespace fastseq::cuda {

// ---- elements --------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// bfloat16 by bit operations: they are the same on every architecture, and few.
__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

__device__ __forceinline__ bf16 to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan =
      (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity, or wrap it to zero
  return {static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded)};
}

#if defined(FASTSEQ_EMULATE)
inline float to_float(f16 value) { return half_to_float(value.bits); }
inline f16 to_f16(float value) { return {float_to_half(value)}; }
inline void count_read(size_t bytes) { emulator::count_read(bytes); }
inline void count_write(size_t bytes) { emulator::count_write(bytes); }
#else
__device__ __forceinline__ float to_float(f16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ f16 to_f16(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
__device__ __forceinline__ void count_read(size_t) {}
__device__ __forceinline__ void count_write(size_t) {}
#endif

// The element of global memory at p, as R, float or double. The emulator counts what these move.
template <class R, class S>
__device__ __forceinline__ R load(const S* p) {
  count_read(sizeof(S));
  if constexpr (std::is_floating_point_v<S>)
    return static_cast<R>(*p);
  else
    return static_cast<R>(to_float(*p));
}

// Rounds to nearest even; a double becomes a 16-bit number by way of float.
template <class S, class R>
__device__ __forceinline__ void store(S* p, R value) {
  count_write(sizeof(S));
  if constexpr (std::is_same_v<S, bf16>)
    *p = to_bf16(static_cast<float>(value));
  else if constexpr (std::is_same_v<S, f16>)
    *p = to_f16(static_cast<float>(value));
  else
    *p = static_cast<S>(value);
}

// Integers and bools.
template <class I>
__device__ __forceinline__ I load_int(const I* p) {
  static_assert(std::is_integral_v<I>);
  count_read(sizeof(I));
  return *p;
}

template <class I>
__device__ __forceinline__ void store_int(I* p, std::type_identity_t<I> value) {
  static_assert(std::is_integral_v<I>);
  count_write(sizeof(I));
  *p = value;
}

// ---- lanes -----------------------------------------------------------------------------------------------

constexpr unsigned kFullMask = 0xFFFFFFFF;

}  // namespace fastseq::cuda
