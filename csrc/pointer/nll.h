// The pointer-generator's and CopyNet's negative log-likelihood on raw pointers: what registration, kernels
// and tests share. Mathematics: fastseq/ops/pointer/nll/__init__.py.
#pragma once
#include "../common/half.h"
#include "../common/parallel.h"

namespace fastseq::pointer {

using crf::Type;

// R is double or float: the type of everything but hidden, and weight where hidden is of a half type.
template <class R>
struct Nll {
  int64_t B, T, S, V, H;
  const void* hidden;  // (b, t, h) at b * hidden_b + t * hidden_t + h
  Type hidden_type;
  int64_t hidden_b, hidden_t;
  const void* weight;  // (V,H), dense
  Type weight_type;
  const R* bias;  // (V,), or null
  const R* copy;  // (b, t, s) at b * copy_b + t * copy_t + s: probabilities, or scores where gate is null
  int64_t copy_b, copy_t;
  const R* gate;  // null: CopyNet
  int64_t gate_b, gate_t;
  const int64_t* source;
  int64_t source_b, source_s;
  const int64_t* target;  // nothing below 0 but ignore_index
  int64_t target_b, target_t;
  int64_t ignore_index;
  double smoothing, z_loss;
};

// Written whole, all dense. `weights`: null, or (B,T); the gradients are those of `total`, their weighted
// sum.
template <class R>
struct NllGradients {
  const R* weights;
  R* total;
  void* hidden;  // (B,T,H), of hidden's type
  void* weight;  // (V,H), of weight's type
  R* bias;       // (V,), where there is a bias
  R* copy;       // (B,T,S)
  R* gate;       // (B,T), where there is a gate
};

template <class R>
void nll(const Nll<R>& problem, R* values, const ParallelFor& parallel_for);
template <class R>
void nll_grad(const Nll<R>& problem, const NllGradients<R>& gradients, const ParallelFor& parallel_for);

}  // namespace fastseq::pointer
