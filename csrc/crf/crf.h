// The CRF family on raw pointers: what registration, kernels and tests share. Mathematics: fastseq/ops/crf/__init__.py.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/parallel.h"

namespace fastseq::crf {

enum class Type { f64, f32, bf16, f16 };

// A batch of emissions as it lies in memory: element (b, t, k) is data[b*stride_b + t*stride_t + k] (strides in elements).
struct Emissions {
  const void* data;
  Type type;
  int64_t B, T, K, stride_b, stride_t;
};

// Which positions are on: row b is positions[offset[b] .. offset[b+1]), ascending.
struct Rows {
  std::vector<int64_t> offset;
  std::vector<int32_t> positions;
  int64_t length(int64_t b) const { return offset[b + 1] - offset[b]; }
  const int32_t* of(int64_t b) const { return positions.data() + offset[b]; }
};

// R is float or double: the type of the parameters and of the results.
template <class R>
struct Model {
  Emissions x;
  const Rows& rows;
  const R *transitions, *start, *end;  // (K,K) from x to, (K,), (K,)
};

// Where nll_grad writes. grad_emissions has the type of the emissions, its own strides, and is written whole.
template <class R>
struct Gradients {
  void* emissions;
  int64_t stride_b, stride_t;
  R *transitions, *start, *end;
};

// tags: element (b, t) is data[b*stride_b + t*stride_t]; null data means "no tags": nll is then log Z.
struct Tags {
  const int64_t* data = nullptr;
  int64_t stride_b = 0, stride_t = 0;
  int64_t at(int64_t b, int64_t t) const { return data[b * stride_b + t * stride_t]; }
};

// nll.cpp: nll (B,), and with a gradient all of *gradient; R = float runs the scaled kernels, then the marked rows exactly.
template <class R>
void nll(const Model<R>& model, Tags tags, const R* weights, double scale, R* nll, const Gradients<R>* gradient,
         const ParallelFor& parallel_for);

// exact.cpp: the float64 log domain, one exp per edge; for float64 and for the rows that the scaled kernels marked. ----

// nll[b] for each b in `which`; with gradients: adds scale*weights[b] times row b's gradient of the parameters into `sums`
// (K*K transitions, K start, K end; doubles) in the order of `which`, and writes its rows of grad->emissions.
template <class R>
void exact_nll(const Model<R>& model, Tags tags, const std::vector<int64_t>& which, const R* weights, double scale,
               R* nll, const Gradients<R>* grad, double* sums, const ParallelFor& parallel_for);
template <class R>
void entropy(const Model<R>& model, R* out, const ParallelFor& parallel_for);
// uniforms (N,B,T) in [0,1), out (N,B,T), both contiguous; positions that are off get -100.
template <class R>
void sample(const Model<R>& model, const R* uniforms, int64_t N, int64_t* out, const ParallelFor& parallel_for);
// paths (B,n,T), scores (B,n); -100 where off and for paths that do not exist, whose score is -inf.
template <class R>
void nbest(const Model<R>& model, int64_t n, int64_t* paths, R* scores, const ParallelFor& parallel_for);

}  // namespace fastseq::crf
