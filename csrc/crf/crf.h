// The CRF family on raw pointers: what registration, kernels and tests share. Mathematics:
// fastseq/ops/crf/__init__.py.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/parallel.h"

namespace fastseq::crf {

enum class Type { f64, f32, bf16, f16 };

constexpr int64_t bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// A batch of emissions as it lies in memory: element (b, t, k) is data[b*stride_b + t*stride_t + k] (strides
// in elements).
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

// nll.cpp: nll (B,), and with a gradient all of *gradient; R = float runs the scaled kernels, then the marked
// rows exactly.
template <class R>
void nll(const Model<R>& model, Tags tags, const R* weights, double scale, R* nll,
         const Gradients<R>* gradient, const ParallelFor& parallel_for);

}  // namespace fastseq::crf
