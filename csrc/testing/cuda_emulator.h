// CUDA on the CPU: with FASTSEQ_EMULATE, common/cuda.h includes this instead of the CUDA headers, and the
// very kernels that nvcc compiles are compiled by g++ and run. It is for tests, not for speed: no GPU is
// needed to see whether a kernel is right.
//
// The threads of a block are fibers of one OS thread, which change at every barrier, warp operation and
// atomic. The blocks of a grid run one after another. Which thread or block goes next is drawn from a seed
// (FASTSEQ_EMULATOR_SEED in the environment, or settings().seed) by a policy (settings().schedule); equal
// seeds give equal runs, so a test runs a kernel under several.
//
// It finds, in any build:
//   - barriers, warp operations and named barriers that not all threads reach, with the place where each
//     waits; threads of a block at different __syncthreads, or at one after others have exited; lanes of one
//     mask at different operations, lanes that are not in their own mask, masks that differ, shuffles from a
//     lane outside;
//   - a missing __syncthreads or __syncwarp, as wrong numbers under some seed: a warp may run far ahead of
//     the others, and a lane ahead of the other lanes;
//   - dynamic shared memory that is read before it is written (it holds NaN) or written outside its bounds
//     (64 bytes before and behind it are checked when the block is done);
//   - launches of no threads, of too many, or with more shared memory than there is.
// With -fsanitize=address,undefined it finds every access outside any memory, too. With -fsanitize=thread,
// data races, also those that give the right numbers here: among the threads of a block only __syncthreads,
// bar_sync, __syncwarp and __threadfence order memory, shuffles and votes do not. Blocks are unordered, but
// the sanitizer sees that only of two that come to run on different OS threads: they take turns on two.
//
// It cannot run inline PTX, tensor cores (mma, wgmma), cp.async, TMA, clusters, cooperative groups, textures
// or __activemask; nor blocks that wait for one another, nor a thread that spins until another has done
// something, unless it spins on an atomic. A lost update (+= for atomicAdd) shows only under the thread
// sanitizer, since threads change at none of its reads and writes. Static __shared__ variables are neither
// set to NaN nor guarded, since nothing knows where they are: better use FASTSEQ_DYNAMIC_SHARED. It says
// nothing of speed beyond counters().
//
// Errors are std::runtime_error out of the launch; the next launch works. To unwind them, an exception passes
// through the kernels' functions, which hence must not be noexcept. Each OS thread has an emulator of its
// own.
//
// Cost: about 30 ns for each thread at each barrier or warp operation; under the thread sanitizer 1 to 2 us,
// and 2 ms to make each thread of the largest block once.
#pragma once
#include <math.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "testing/cuda_emulator_launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static
#define __shared__ static thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// The C library declares these for itself, and does not have them.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)

// ---- launches --------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace fastseq::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied as bytes");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel has 4 KiB for its parameters");
  const auto call = std::make_tuple(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto thunk = [](const void* of) {
    const auto& [function, values] = *static_cast<const std::remove_reference_t<decltype(call)>*>(of);
    std::apply(function, values);
  };
  emulator::run({name, grid, block, shared_bytes, {}, 0, thunk, &call, nullptr, nullptr, nullptr});
}

}  // namespace fastseq::cuda

#define FASTSEQ_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::fastseq::cuda::launch(#kernel, kernel, grid, block, dynamic_shared_bytes,  \
                          stream __VA_OPT__(, ) __VA_ARGS__)
#define FASTSEQ_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(::fastseq::emulator::Block::mine().dynamic_shared())

// ---- barriers and warp operations ------------------------------------------------------------------------

constexpr int warpSize = 32;

namespace fastseq::emulator {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, const Location& where) {
  return from_bits<T>(Block::mine().warp_op(WarpOp::shuffle, what, mask, to_bits(value), source, where));
}

inline unsigned ballot(const char* what, unsigned mask, bool holds, const Location& where) {
  return static_cast<unsigned>(Block::mine().warp_op(WarpOp::ballot, what, mask, holds, 0, where));
}

}  // namespace fastseq::emulator

// `at` is where the call is, which the errors name.
inline void __syncthreads(std::source_location at = std::source_location::current()) {
  fastseq::emulator::Block::mine().barrier("__syncthreads", false, at);
}
inline int __syncthreads_count(int predicate, std::source_location at = std::source_location::current()) {
  return fastseq::emulator::Block::mine().barrier("__syncthreads_count", predicate != 0, at);
}
inline int __syncthreads_or(int predicate, std::source_location at = std::source_location::current()) {
  return fastseq::emulator::Block::mine().barrier("__syncthreads_or", predicate != 0, at) != 0;
}
inline int __syncthreads_and(int predicate, std::source_location at = std::source_location::current()) {
  return fastseq::emulator::Block::mine().barrier("__syncthreads_and", predicate == 0, at) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF,
                       std::source_location at = std::source_location::current()) {
  fastseq::emulator::Block::mine().warp_op(fastseq::emulator::WarpOp::sync, "__syncwarp", mask, 0, 0, at);
}

// A lane beyond its segment of `width` lanes, to either side, reads itself; __shfl_sync wraps round.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location at = std::source_location::current()) {
  const int first = fastseq::emulator::lane() & ~(width - 1);
  return fastseq::emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 std::source_location at = std::source_location::current()) {
  const int lane = fastseq::emulator::lane(), source = lane - static_cast<int>(by);
  return fastseq::emulator::shuffle("__shfl_up_sync", mask, value,
                                    source < (lane & ~(width - 1)) ? lane : source, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   std::source_location at = std::source_location::current()) {
  const int lane = fastseq::emulator::lane(), source = lane + static_cast<int>(by);
  return fastseq::emulator::shuffle("__shfl_down_sync", mask, value,
                                    source > (lane | (width - 1)) ? lane : source, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32,
                  std::source_location at = std::source_location::current()) {
  const int lane = fastseq::emulator::lane(), source = lane ^ with;
  return fastseq::emulator::shuffle("__shfl_xor_sync", mask, value,
                                    source > (lane | (width - 1)) ? lane : source, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location at = std::source_location::current()) {
  return fastseq::emulator::ballot("__ballot_sync", mask, predicate != 0, at);
}
inline int __any_sync(unsigned mask, int predicate,
                      std::source_location at = std::source_location::current()) {
  return fastseq::emulator::ballot("__any_sync", mask, predicate != 0, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      std::source_location at = std::source_location::current()) {
  return fastseq::emulator::ballot("__all_sync", mask, predicate == 0, at) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, std::source_location at = std::source_location::current()) {
  using namespace fastseq::emulator;
  return static_cast<unsigned>(
      Block::mine().warp_op(WarpOp::match, "__match_any_sync", mask, to_bits(value), 0, at));
}

namespace fastseq::cuda {

inline void bar_sync(int id, int count, std::source_location at = std::source_location::current()) {
  emulator::Block::mine().named_barrier(id, count, at);
}

}  // namespace fastseq::cuda

inline void __threadfence() { fastseq::emulator::Block::mine().fence(false); }
inline void __threadfence_block() { fastseq::emulator::Block::mine().fence(true); }

// ---- atomics: they order nothing -------------------------------------------------------------------------

namespace fastseq::emulator {

// *at becomes change(*at); returns what it was.
template <class T, class Change>
T atomically(T* at, Change change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Block::mine().pause();
  std::atomic_ref<T> value(*at);
  T old = value.load(std::memory_order_relaxed);
  while (!value.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace fastseq::emulator

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> by) {
  return fastseq::emulator::atomically(at, [=](T old) { return old + by; });
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> with) {
  static_assert(std::is_integral_v<T>);
  return fastseq::emulator::atomically(at, [=](T old) { return with < old ? with : old; });
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> with) {
  static_assert(std::is_integral_v<T>);
  return fastseq::emulator::atomically(at, [=](T old) { return with > old ? with : old; });
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> with) {
  static_assert(std::is_integral_v<T>);
  return fastseq::emulator::atomically(at, [=](T old) { return old | with; });
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> with) {
  static_assert(std::is_integral_v<T>);
  return fastseq::emulator::atomically(at, [=](T old) { return old == expected ? with : old; });
}

// ---- bits and numbers ------------------------------------------------------------------------------------

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
  return reversed;
}
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;

template <class T>
T __ldg(const T* at) {
  return *at;
}
