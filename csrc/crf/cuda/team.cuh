// A team: the threads that work on one sequence, and how they wait for and tell each other.
//
//     KM = 16, G = 1    16 threads: two teams a warp        thread j*G + g has tag j and every G-th
//     KM = 32, G = 1    a warp                              part of the K tags before (or after) it
//     KM = 64, G = 4    a block of 256 threads
//     KM = 128, G = 2   a block of 256 threads
//
// Inside a warp teams wait at __syncwarp of their own lanes only, so that teams of one block need not have
// sequences of one length.
#pragma once
#include "../../common/cuda.h"

namespace fastseq::crf::cuda {

using namespace fastseq::cuda;

template <int Threads>
struct Team {
  static constexpr int kThreads = Threads;
  static constexpr bool kInWarp = Threads <= 32;
  static constexpr int kPerBlock = kInWarp ? 128 / Threads : 1;  // teams
  static constexpr int kBlock = kPerBlock * Threads;             // threads
  static constexpr int kGroup = kInWarp ? Threads : 32;          // lanes that share one position in bulk work
  static constexpr int kGroups = Threads / kGroup;

  // Which team of the grid this is.
  static __device__ int index() { return int(blockIdx.x) * kPerBlock + int(threadIdx.x) / Threads; }
  static __device__ int in_block() { return int(threadIdx.x) / Threads; }
  static __device__ int rank() { return int(threadIdx.x) % Threads; }
  static __device__ int group() { return rank() / kGroup; }
  static __device__ int lane() { return rank() % kGroup; }

  // The lanes of this thread's group, for warp operations.
  static __device__ unsigned lanes() {
    return kGroup == 32 ? kFullMask
                        : ((1u << (kGroup % 32)) - 1) << (int(threadIdx.x) % 32 / kGroup * kGroup);
  }

  // No thread goes on before all of the team have come, and all have seen what each wrote before.
  static __device__ void sync() {
    if constexpr (kInWarp)
      __syncwarp(lanes());
    else
      __syncthreads();
  }

  // op over one value of each lane of a group, or of each thread of the team; every thread gets the result,
  // always combined in the same order. `scratch` has kGroups values and is free again at the next sync.
  // Of several values side by side, one does not wait for the shuffles of another.
  template <class V, int N, class Op>
  static __device__ void over_group(V (&v)[N], const Op& op) {
#pragma unroll
    for (int step = kGroup / 2; step > 0; step /= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] = op(v[n], __shfl_xor_sync(lanes(), v[n], step, kGroup));
  }
  template <class V, class Op>
  static __device__ V over_group(V v, const Op& op) {
    V values[1] = {v};
    over_group(values, op);
    return values[0];
  }
  template <class Op>
  static __device__ double over_team(double v, double* scratch, const Op& op) {
    v = over_group(v, op);
    if constexpr (!kInWarp) {
      sync();  // whoever still reads the scratch of the call before
      if (lane() == 0) scratch[group()] = v;
      sync();
      v = scratch[0];
      for (int g = 1; g < kGroups; ++g) v = op(v, scratch[g]);
    }
    return v;
  }
};

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Greatest {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

}  // namespace fastseq::crf::cuda
