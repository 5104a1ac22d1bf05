// The kernels of distribution.cuh as the registration calls them, for (S, R) = (double, double), (float,
// float), (bf16, float) and (f16, float). Mathematics and conventions:
// fastseq/ops/pointer/distribution/__init__.py.
#pragma once
#include "../../common/cuda.h"

namespace fastseq::pointer::cuda {

using namespace fastseq::cuda;

// Rows (b, t) of a tensor: element i of one is data[b*stride_b + t*stride_t + i].
template <class E>
struct Rows {
  const E* data = nullptr;
  int64_t stride_b = 0, stride_t = 0;
  __device__ const E* at(int b, int t) const { return data + b * stride_b + t * stride_t; }
};

// S is the type of the logits, R that of all else.
template <class S, class R>
struct Mixture {
  int B, T, V, positions, num_oov;
  Rows<S> logits;             // V elements
  Rows<R> attention;          // an element a position
  const R* gate;              // (B,T)
  const int64_t* source_ids;  // (B,positions)
};

// Where the source words are left, sorted: for each b the ids, ascending and those that are absent last, the
// positions they stand at, and whether one of them is beyond V + num_oov.
struct SourceOrder {
  int64_t* ids;      // (B,positions)
  int* positions;    // (B,positions)
  uint8_t* invalid;  // (B,)
};

// final (B,T,V+num_oov). 2 launches, 1 where there are no source positions.
template <class S, class R>
void distribution(const Mixture<S, R>& mixture, const SourceOrder& order, R* final, cudaStream_t stream);

// Contiguous, each written whole: (B,T,V), (B,T,positions), (B,T). 1 launch.
template <class S, class R>
struct MixtureGradients {
  S* logits;
  R *attention, *gate;
};
template <class S, class R>
void distribution_grad(const Mixture<S, R>& mixture, const Rows<R>& grad, const MixtureGradients<S, R>& to,
                       cudaStream_t stream);

}  // namespace fastseq::pointer::cuda
