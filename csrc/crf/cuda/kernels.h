// The kernels as the registration calls them, for (S, R) = (double, double), (float, float), (bf16, float)
// and (f16, float); one .cu file each instantiates them.
#pragma once
#include "batch.cuh"

namespace fastseq::crf::cuda {

// Where nll_grad writes.
template <class S, class R>
struct Gradients {
  Gradient<S> x;
  R *total, *transitions, *start, *end;
};

// The sizes that the kernels can do.
constexpr int kMaxTags = 1024;  // a block's shared memory holds a segment of so many

// Bytes of workspace that nll needs; `gradient`: with a gradient.
template <class S, class R>
int64_t nll_workspace(const Batch<S, R>& batch, bool gradient);

// nll (B,), and, unless `gradients` is null, all that it points to. At most 4 launches; 2 without gradients.
template <class S, class R>
void nll(const Batch<S, R>& batch, R* nll, const Gradients<S, R>* gradients, char* workspace,
         cudaStream_t stream);

// Elements of R that viterbi needs for its checkpoints.
template <class S, class R>
int64_t viterbi_workspace(const Batch<S, R>& batch);

// paths (B,T), -100 where off, and scores (B,), both written whole; K <= kMaxTags. One launch.
template <class S, class R>
void viterbi(const Batch<S, R>& batch, int64_t* paths, R* scores, R* workspace, cudaStream_t stream);

}  // namespace fastseq::crf::cuda
