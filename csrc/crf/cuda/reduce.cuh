// The fourth kernel of nll (see sweep.cuh): the parameters' gradient, summed over those who own a share of
// it, and the total. The order of each sum depends on the sizes alone: the same bits in every run.
//
//     block g       the outputs 16g .. 16g+15 of transitions (K*K), start (K), end (K), one after the other
//     thread        one of these outputs, side by side in memory, of every 16th owner; then one thread an
//                   output adds up those 16 sums, in order
//     last block    the total: a thread has every 256th row
//
// Cost of an output: an addition in float64 for each owner; it reads 4 bytes an owner of float sums, and 8 a
// block of the exact kernel that had rows. Time: owners / 16 dependent additions, with loads ahead of them,
// and 16 more.
#pragma once
#include "batch.cuh"
#include "team.cuh"

namespace fastseq::crf::cuda {
namespace reduce {

constexpr int kOutputs = 16, kSlices = 16;
using Block = Team<kOutputs * kSlices>;

// The shares of the parameters' gradient: all of `owners`, and those of the exact kernel's blocks that had
// rows.
struct Shares {
  const float* partials;
  int owners;
  const double* exact_partials;
  const uint8_t* exact_used;
  int exact_blocks;

  // What one slice has of output n, out of `size`.
  __device__ double slice_sum(int64_t n, int slice, int64_t size) const {
    double sum = 0;
    for (int o = slice; o < owners; o += kSlices) sum += load<float>(partials + o * size + n);
    for (int o = slice; o < exact_blocks; o += kSlices)
      if (exact_used[o]) sum += load<double>(exact_partials + o * size + n);
    return sum;
  }
};

// All shares of output n, the thread's own, in the threads of slice 0; 0 in others.
__device__ inline double sum_of(int64_t n, int64_t size, const Shares& shares,
                                double (&sums)[kSlices][kOutputs]) {
  const int output = Block::rank() % kOutputs, slice = Block::rank() / kOutputs;
  sums[slice][output] = n < size ? shares.slice_sum(n, slice, size) : 0.0;
  Block::sync();
  double sum = 0;
  for (int s = 0; slice == 0 && s < kSlices; ++s) sum += sums[s][output];
  return sum;
}

// scale * sum_b weights_b nll_b, in every thread. A row without weight is left out, whatever its nll is.
template <class R>
__device__ double total_of(int B, const R* nll, const R* weights, double scale, double* scratch) {
  double sum = 0;
  for (int b = Block::rank(); b < B; b += Block::kThreads) {
    const double weight = weights ? load<double>(weights + b) : 1.0;
    if (weight * scale != 0) sum += weight * load<double>(nll + b);
  }
  return scale * Block::over_team(sum, scratch, Sum());
}

}  // namespace reduce

inline int reduce_grid(int K) { return int((partial_size(K) + reduce::kOutputs - 1) / reduce::kOutputs) + 1; }

// Launched with reduce_grid(K) blocks of reduce::Block::kBlock. partials: `owners` shares; exact_partials:
// those of the exact kernel's blocks that exact_used names. Both may be none, and B may be 0: sums are then
// 0.
template <class R>
__global__ void __launch_bounds__(reduce::Block::kBlock)
    reduce_kernel(int K, int B, const R* nll, const R* weights, double scale, const float* partials,
                  int owners, const double* exact_partials, const uint8_t* exact_used, int exact_blocks,
                  R* total, R* transitions, R* start, R* end) {
  __shared__ double sums[reduce::kSlices][reduce::kOutputs];
  if (blockIdx.x == gridDim.x - 1) {
    const double sum = reduce::total_of(B, nll, weights, scale, sums[0]);
    if (threadIdx.x == 0) store(total, sum);
    return;
  }
  const int64_t size = partial_size(K), pairs = size - 2 * K;
  const int64_t n = int64_t(blockIdx.x) * reduce::kOutputs + threadIdx.x % reduce::kOutputs;
  const reduce::Shares shares{partials, owners, exact_partials, exact_used, exact_blocks};
  const double sum = reduce::sum_of(n, size, shares, sums);
  if (threadIdx.x >= reduce::kOutputs || n >= size) return;
  store(n < pairs ? transitions + n : n < pairs + K ? start + (n - pairs) : end + (n - pairs - K), sum);
}

}  // namespace fastseq::crf::cuda
