// The last two kernels of the decoder's gradient (see decoder_sweep.cuh).
//
// positions: the gradients of memory and features at kTile positions of a source, and their share of those of
// v and w_coverage: sums over all steps, which do not wait for one another here. A thread has a column; what
// belongs to a step and a position is the same for all of them, and comes by way of shared memory. A tile
// with no position on costs nothing but its zeros.
//
//     blockIdx.x: sequence      blockIdx.y: tile
//
// Cost, for n positions that are on: T n A tanh, and 8 T n A + 2 T n M FLOPs; a tile reads the queries of all
// steps and the gradients of their contexts, T (A + M) elements, from L2 for all tiles but the first.
//
// reduce: the sums of the shares, in float64. A block has 32 outputs side by side, and every 16th share of
// each in a thread; the order of each sum depends on the sizes alone.
#pragma once
#include "decoder_block.cuh"

namespace fastseq::pointer::cuda {
namespace decoding {

constexpr int kTile = 8;                      // positions of a block
constexpr int kTileThreads = 256;             // its threads
constexpr int kSteps = kTileThreads / kTile;  // that are in shared memory at a time

template <class R>
struct Tile {
  const DecoderInputs<R>& in;
  const DecoderSizes& n;
  const DecoderScratch<R>& scratch;
  R *one, *other;  // (kSteps, kTile)
  int b, first;
  unsigned on;  // a bit a position

  // Shared memory: numbers of steps and positions.
  static constexpr int kBytes = 2 * kSteps * kTile * int(sizeof(R));

  __device__ bool is_on(int p) const { return on >> p & 1; }
  // Element 0 of position p in an array (B,S,size).
  __device__ int64_t at(int p, int size) const { return (int64_t(b) * n.S + first + p) * size; }
  __device__ int steps(int begin) const { return min(kSteps, n.T - begin); }

  __device__ void find() {
    on = 0;
    for (int p = 0; p < kTile; ++p)
      if (first + p < n.S && (!in.mask || load_int(in.mask + at(p, 1)))) on |= 1u << p;
  }

  // What (B,T,S) has at these positions in steps `begin` and on; 0 where off.
  __device__ void stage(R* to, const R* from, int begin) const {
    const int s = rank() / kTile, p = rank() % kTile;
    const bool exists = s < steps(begin) && is_on(p);
    to[rank()] = exists ? load<R>(from + (int64_t(b) * n.T + begin + s) * n.S + first + p) : R(0);
  }

  // Calls f(step, its place in shared memory) for all steps in which `has` is; the block goes along.
  template <class Stage, class F>
  __device__ void over_steps(bool has, const Stage& stage_all, const F& f) const {
    for (int begin = 0; begin < n.T && on; begin += kSteps) {
      __syncthreads();  // whoever still reads the steps before
      stage_all(begin);
      __syncthreads();
      for (int s = 0; has && s < steps(begin); ++s) f(int64_t(b) * n.T + begin + s, s * kTile);
    }
  }

  // The gradient of column k.
  __device__ void write(R* to, int size, int k, const R (&sums)[kTile]) const {
#pragma unroll
    for (int p = 0; p < kTile; ++p)
      if (first + p < n.S) store(to + at(p, size) + k, is_on(p) ? sums[p] : R(0));
  }

  __device__ void features(R* to, R* partial, int k) const {
    const bool has = k < n.A;
    R feature[kTile], sums[kTile] = {}, of_v = 0, of_coverage = 0;
#pragma unroll
    for (int p = 0; p < kTile; ++p)
      feature[p] = has && is_on(p) ? load<R>(in.features + at(p, n.A) + k) : R(0);
    const R v = has ? load<R>(in.v + k) : R(0), w = has && in.w_coverage ? load<R>(in.w_coverage + k) : R(0);
    const auto stage_all = [&](int begin) {
      stage(one, scratch.scores, begin);
      stage(other, scratch.coverage, begin);
    };
    over_steps(has, stage_all, [&](int64_t step, int place) {
      const R query = load<R>(scratch.query + step * n.A + k);
#pragma unroll
      for (int p = 0; p < kTile; ++p) {
        const R coverage = other[place + p], score = one[place + p];
        const R u = tanh_of(feature[p] + query + w * coverage), gradient = score * v * (R(1) - u * u);
        sums[p] += gradient;
        of_v += score * u;
        of_coverage += gradient * coverage;
      }
    });
    if (!has) return;
    write(to, n.A, k, sums);
    store(partial + k, of_v);
    store(partial + n.A + k, of_coverage);
  }

  __device__ void memory(R* to, const R* attention, int m) const {
    const bool has = m < n.M;
    R sums[kTile] = {};
    const auto stage_all = [&](int begin) { stage(one, attention, begin); };
    over_steps(has, stage_all, [&](int64_t step, int place) {
      const R context = load<R>(scratch.contexts + step * n.M + m);
#pragma unroll
      for (int p = 0; p < kTile; ++p) sums[p] += one[place + p] * context;
    });
    if (has) write(to, n.M, m, sums);
  }
};

constexpr int kOutputs = 32, kSlices = 16;

}  // namespace decoding

// Launched with a block of kTileThreads for each sequence (x) and tile (y).
template <class R>
__global__ void __launch_bounds__(decoding::kTileThreads, 2)
    decoder_positions_kernel(DecoderInputs<R> inputs, const R* attention, DecoderScratch<R> scratch,
                             R* memory, R* features) {
  using namespace decoding;
  FASTSEQ_DYNAMIC_SHARED(R, shared);
  const DecoderSizes& n = inputs.sizes;
  Tile<R> tile{inputs, n, scratch, shared, shared + kSteps * kTile, int(blockIdx.x), int(blockIdx.y) * kTile,
               0};
  tile.find();
  R* partial = scratch.partials + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * 2 * n.A;
  for (int begin = 0; begin < n.A; begin += kTileThreads) tile.features(features, partial, begin + rank());
  for (int begin = 0; begin < n.M; begin += kTileThreads) tile.memory(memory, attention, begin + rank());
}

// Launched with enough blocks of kOutputs * kSlices threads for 2A outputs. w_coverage may be null.
template <class R>
__global__ void __launch_bounds__(decoding::kOutputs* decoding::kSlices)
    decoder_reduce_kernel(int A, int64_t owners, const R* partials, R* v, R* w_coverage) {
  using namespace decoding;
  FASTSEQ_DYNAMIC_SHARED(double, sums);  // (kSlices, kOutputs)
  const int slice = rank() / kOutputs, k = int(blockIdx.x) * kOutputs + rank() % kOutputs;
  double sum = 0;
  for (int64_t o = slice; k < 2 * A && o < owners; o += kSlices)
    sum += load<double>(partials + o * 2 * A + k);
  sums[rank()] = sum;
  __syncthreads();
  if (slice != 0 || k >= 2 * A) return;
  for (int s = 1; s < kSlices; ++s) sum += sums[s * kOutputs + rank()];
  if (k < A)
    store(v + k, sum);
  else if (w_coverage)
    store(w_coverage + k - A, sum);
}

}  // namespace fastseq::pointer::cuda
