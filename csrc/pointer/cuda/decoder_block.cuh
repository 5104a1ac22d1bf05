// What the decoder's kernels are made of: a block of threads that works on one sequence, its sums, and its
// products of a vector with a matrix that lies in global memory row by row.
//
//     by rows      8 lanes a row: each instruction of a warp reads 4 rows of 32 bytes or more, whole sectors
//     by columns   a thread a column, side by side in memory; where there are fewer columns than threads, the
//                  rows are dealt out to slices of the block, whose sums are added in order
//
// Both read each element once, 2 FLOPs an element, and need neither alignment nor a transposed copy. The
// order of each sum depends on the sizes alone.
#pragma once
#include "decoder.h"

namespace fastseq::pointer::cuda::decoding {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBlocks = 1;  // on a multiprocessor: for two, some would have to spill registers
constexpr int kGroup = 8, kGroups = kThreads / kGroup;  // lanes that share a row

__device__ inline int rank() { return int(threadIdx.x); }
__device__ inline int warp() { return rank() / 32; }
__device__ inline int lane() { return rank() % 32; }
__device__ inline int group() { return rank() / kGroup; }
__device__ inline int part() { return rank() % kGroup; }

__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
template <class R>
__device__ R sigmoid(R x) {
  return R(1) / (R(1) + exp_of(-x));
}

struct Sum {
  template <class R>
  __device__ R operator()(R a, R b) const {
    return a + b;
  }
};
struct Greatest {
  template <class R>
  __device__ R operator()(R a, R b) const {
    return a > b ? a : b;
  }
};

// ---- sums ------------------------------------------------------------------------------------------------

// Over the lanes of a group; each gets the sum.
template <class R>
__device__ R over_group(R value) {
  const unsigned lanes = ((1u << kGroup) - 1) << lane() / kGroup * kGroup;
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) value += __shfl_xor_sync(lanes, value, step);
  return value;
}

template <class R, class Op>
__device__ R over_warp(R value, const Op& op) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = op(value, __shfl_xor_sync(kFullMask, value, step));
  return value;
}

// Over the block; each thread gets the same. `scratch` has kWarps values, free again at the next barrier.
template <class R, class Op>
__device__ R over_block(R value, R* scratch, const Op& op) {
  value = over_warp(value, op);
  __syncthreads();  // whoever still reads the scratch of the call before
  if (lane() == 0) scratch[warp()] = value;
  __syncthreads();
  value = scratch[0];
  for (int w = 1; w < kWarps; ++w) value = op(value, scratch[w]);
  return value;
}

// ---- products --------------------------------------------------------------------------------------------

// sums[r] += this lane's part of row r times the vector, for N rows that lie `stride` apart.
template <int N, class R>
__device__ void add_rows(R (&sums)[N], const R* row, int64_t stride, const R* vector, int n) {
#pragma unroll 4
  for (int k = part(); k < n; k += kGroup) {
    const R x = vector[k];
#pragma unroll
    for (int r = 0; r < N; ++r) sums[r] += load<R>(row + r * stride + k) * x;
  }
}

// A row times the vector, in each lane of the group.
template <class R>
__device__ R times_row(const R* row, const R* vector, int n) {
  R sum[1] = {};
  add_rows(sum, row, 0, vector, n);
  return over_group(sum[0]);
}

// write(j, sum over r < rows of weights[r] * row_of(r)[j]) for each j < n. `scratch` has kThreads values; a
// barrier must come before it is used again.
template <class R, class RowOf, class Write>
__device__ void by_columns(int n, int rows, const R* weights, const RowOf& row_of, R* scratch,
                           const Write& write) {
  const int width = min((n + 31) / 32 * 32, kThreads), slices = kThreads / width;
  const int slice = rank() / width, column = rank() % width;
  for (int j = column; j - column < n; j += width) {
    R sum = 0;
    if (slice < slices && j < n) {
#pragma unroll 8
      for (int r = slice; r < rows; r += slices) sum += weights[r] * load<R>(row_of(r) + j);
    }
    if (slices > 1) {
      scratch[rank()] = sum;
      __syncthreads();
      for (int s = 1; slice == 0 && s < slices; ++s) sum += scratch[s * width + column];
    }
    if (slice == 0 && j < n) write(j, sum);
  }
}

// ---- the positions of a source ---------------------------------------------------------------------------

// The positions that are on, as a list, so that those that are off cost nothing and are never read. Of each
// there are two numbers besides, by its place in the list.
template <class R>
struct Positions {
  R *first, *second;
  int* list;  // one more element: how many there are

  __device__ Positions(char* at, int S)
      : first(reinterpret_cast<R*>(at)), second(first + S), list(reinterpret_cast<int*>(second + S)) {}

  static __host__ __device__ int64_t bytes(int S) {
    return (S * int64_t(2 * sizeof(R) + sizeof(int)) + sizeof(int) + 15) / 16 * 16;
  }

  // Fills the list, and returns how many there are.
  __device__ int find(const bool* mask, int S) const {
    if (warp() == 0) {
      int count = 0;
      for (int begin = 0; begin < S; begin += 32) {
        const int i = begin + lane();
        const bool on = i < S && (!mask || load_int(mask + i));
        const unsigned bits = __ballot_sync(kFullMask, on);
        if (on) list[count + __popc(bits & ((1u << lane()) - 1))] = i;
        count += __popc(bits);
      }
      if (lane() == 0) list[S] = count;
    }
    __syncthreads();
    return list[S];
  }
};

}  // namespace fastseq::pointer::cuda::decoding
