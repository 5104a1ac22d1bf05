// What the CRF kernels read and write, as raw pointers of device memory. The mathematics and all conventions
// are in fastseq/ops/crf/__init__.py; how the kernels share the work is in sweep.cuh.
//
// S is the type of the emissions: double, float, bf16 or f16. R is that of parameters and results: double for
// double, else float.
#pragma once
#include "../../common/cuda.h"

namespace fastseq::crf::cuda {

using namespace fastseq::cuda;

constexpr int kTagOff = -100;  // in `tags`: there is no such position

// Element (b, t) of a tensor is data[b*stride_b + t*stride_t].
template <class E>
struct Plane {
  const E* data = nullptr;
  int64_t stride_b = 0, stride_t = 0;
  __device__ const E* at(int b, int t) const { return data + b * stride_b + t * stride_t; }
};

// The state of a position, as a kernel that has looked at it knows it: a tag, or one of these.
constexpr int kOff = -1;       // not on
constexpr int kUntagged = -2;  // on, and there are no tags
constexpr int kBadTag = -3;    // on, with a tag outside [0, K): it makes the row NaN, and is never an index

template <class S, class R>
struct Batch {
  int B, T, K;
  Plane<S> x;                          // (B,T), each K elements, dense
  Plane<int64_t> tags;                 // (B,T), or no data: nll is then log Z
  Plane<bool> mask;                    // (B,T), or no data: all on
  const R *transitions, *start, *end;  // (K,K) from x to, (K,), (K,)
  const R* weights;                    // (B,), or null: all 1
  double scale;                        // of every weight

  __device__ double weight(int b) const { return scale * (weights ? double(load<R>(weights + b)) : 1.0); }

  __device__ int state(int b, int t) const {
    if (t >= T || (mask.data && !load_int(mask.at(b, t)))) return kOff;
    if (!tags.data) return kUntagged;
    const int64_t y = load_int(tags.at(b, t));
    return y == kTagOff ? kOff : y < 0 || y >= K ? kBadTag : int(y);
  }
};

// Where nll_grad writes; x == nullptr: only values are wanted.
template <class S>
struct Gradient {
  S* x = nullptr;  // every element is written: 0 where off
  int64_t stride_b = 0, stride_t = 0;
  __device__ S* at(int b, int t) const { return x + b * stride_b + t * stride_t; }
};

// The parameters' gradient from one owner of rows, summed by reduce.cuh: transitions (K,K), start (K), end
// (K).
__host__ __device__ inline int64_t partial_size(int K) { return int64_t(K) * K + 2 * K; }

}  // namespace fastseq::crf::cuda
