// The first kernel of the decoder's gradient: the gates and queries of all steps again, from the states that
// the forward pass has left. Steps do not wait for one another here: a block has 32 bytes of them side by
// side (8 of float, 4 of double), so that each weight that is read serves as many. 8 lanes have a row of the
// weights.
//
// Cost: 2 (4H (E + H) + 2H A) FLOPs a step; a block reads all of w_ih, w_hh and w_query once.
#pragma once
#include "decoder_block.cuh"

namespace fastseq::pointer::cuda {
namespace decoding {

template <class R>
struct Recompute {
  static constexpr int kSteps = 32 / int(sizeof(R));

  const DecoderInputs<R>& in;
  const DecoderSaved<R>& saved;
  const DecoderSizes& n;
  R* own;         // (max(E + H, 2H), kSteps): vectors, the steps of each element side by side
  int64_t first;  // of B*T steps

  static constexpr __host__ __device__ int64_t bytes(const DecoderSizes& n) {
    return int64_t((n.E > n.H ? n.E : n.H) + n.H) * kSteps * int64_t(sizeof(R));
  }
  __device__ int64_t steps() const { return int64_t(n.B) * n.T; }

  // Puts `size` elements of every step at `to`; pointer_of(step) says where they are.
  template <class PointerOf>
  __device__ void stage(R* to, int size, const PointerOf& pointer_of) const {
    for (int s = 0; s < kSteps; ++s) {
      const bool is_step = first + s < steps();
      const R* from = is_step ? pointer_of(first + s) : nullptr;
      for (int k = rank(); k < size; k += kThreads) to[k * kSteps + s] = is_step ? load<R>(from + k) : R(0);
    }
  }

  __device__ static void add_row(R (&sums)[kSteps], const R* row, const R* staged, int size) {
#pragma unroll 4
    for (int k = part(); k < size; k += kGroup) {
      const R weight = load<R>(row + k);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sums[s] += weight * staged[k * kSteps + s];
    }
  }

  // to[step][row] = value_of(sum) for the sums of all steps.
  template <class ValueOf>
  __device__ void write(R (&sums)[kSteps], R* to, int rows, int row, const ValueOf& value_of) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const R sum = over_group(sums[s]);
      if (part() == s && first + s < steps()) store(to + (first + s) * rows + row, value_of(sum));
    }
  }

  // i, f, g and o of each step: (B,T,4H).
  __device__ void gates(R* to) const {
    stage(own, n.E, [&](int64_t step) { return saved.x + step * n.E; });
    stage(own + n.E * kSteps, n.H, [&](int64_t step) {
      return step % n.T ? saved.hiddens + (step - 1) * n.H : in.hidden + step / n.T * n.H;
    });
    __syncthreads();
    for (int r = group(); r < 4 * n.H; r += kGroups) {
      R sums[kSteps] = {};
      add_row(sums, in.w_ih + int64_t(r) * n.E, own, n.E);
      add_row(sums, in.w_hh + int64_t(r) * n.H, own + n.E * kSteps, n.H);
      const R bias = load<R>(in.bias + r);
      const bool is_candidate = r / n.H == 2;
      write(sums, to, 4 * n.H, r,
            [&](R sum) { return is_candidate ? tanh_of(sum + bias) : sigmoid(sum + bias); });
    }
    __syncthreads();
  }

  __device__ void queries(R* to) const {
    stage(own, n.H, [&](int64_t step) { return saved.hiddens + step * n.H; });
    stage(own + n.H * kSteps, n.H, [&](int64_t step) { return saved.cells + step * n.H; });
    __syncthreads();
    for (int k = group(); k < n.A; k += kGroups) {
      R sums[kSteps] = {};
      add_row(sums, in.w_query + int64_t(k) * 2 * n.H, own, 2 * n.H);
      const R bias = load<R>(in.b_query + k);
      write(sums, to, n.A, k, [&](R sum) { return sum + bias; });
    }
  }
};

}  // namespace decoding

// A block for each Recompute<R>::kSteps of the B*T steps.
template <class R>
__global__ void __launch_bounds__(decoding::kThreads, decoding::kBlocks)
    decoder_recompute_kernel(DecoderInputs<R> inputs, DecoderSaved<R> saved, R* gates, R* queries) {
  FASTSEQ_DYNAMIC_SHARED(R, shared);
  const decoding::Recompute<R> block{inputs, saved, inputs.sizes, shared,
                                     int64_t(blockIdx.x) * decoding::Recompute<R>::kSteps};
  block.gates(gates);
  block.queries(queries);
}

}  // namespace fastseq::pointer::cuda
