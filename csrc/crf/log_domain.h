// The float64 log domain, shared by likelihood, entropy and samples: for float64, and where the scaled
// kernels lost precision. Compiled once per instruction set.
//
// A task owns a row (exact_nll with gradients: a fixed slot of rows), so no result depends on the threads. A
// step is log alpha_t(j) = x_t(j) + log sum_i exp(log alpha_{t-1}(i) + A_ij), read twice: for the maximum,
// and for the sum. Cost of an edge: 2 additions and a maximum, then 2 additions and one exp of about 30
// operations, over the K*K doubles of A, which stay in a cache. A row keeps log alpha, 8*L*K bytes. Inner
// loops run over contiguous memory (A, or its transpose) with an accumulator for each element, so that the
// compiler may vectorise without reordering a sum.
//
// Infinities need no special case in the loops: -inf falls out as a weight of 0, and NaN or +inf make log Z
// NaN.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "../common/half.h"
#include "kernels.h"

namespace fastseq::FASTSEQ_ISA {

using namespace fastseq::crf;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// exp(x) for x <= 709 to about 1 ulp: x = n log 2 + r, and a Chebyshev polynomial in r (relative
// error 1.5e-17). NaN stays NaN. Below -1022.5 log 2, where exp(x) would be subnormal, n is -1023, and the
// bits of "2^n" are those of 0. No branch: but GCC makes one of the clamp, and then cannot vectorise the
// callers' loops, unless it has -fno-trapping-math.
inline double exp_fast(double x) {
  x = x < -709.0 ? -709.0 : x;
  constexpr double shift = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = x * 0x1.71547652b82fep+0 + shift;
  const double n = shifted - shift;
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double p = 0x1.af635e4f6b5eep-26;
  p = p * r + 0x1.28b43a93fe57ap-22;
  p = p * r + 0x1.71ddf5514be0cp-19;
  p = p * r + 0x1.a01991731e6fap-16;
  p = p * r + 0x1.a01a01b150ad2p-13;
  p = p * r + 0x1.6c16c1881156bp-10;
  p = p * r + 0x1.111111110f205p-7;
  p = p * r + 0x1.555555554f067p-5;
  p = p * r + 0x1.555555555555ap-3;
  p = p * r + 0x1.0000000000011p-1;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const double power = bits_as<double>((bits_as<uint64_t>(shifted) + 1023) << 52);  // 2^n
  return p * power;
}

// The parameters in double, and the transposed transitions: what all rows share.
struct Parameters {
  std::vector<double> transitions, transposed, start, end;

  template <class R>
  explicit Parameters(const Model<R>& model)
      : transitions(model.transitions, model.transitions + model.x.K * model.x.K),
        transposed(transitions.size()),
        start(model.start, model.start + model.x.K),
        end(model.end, model.end + model.x.K) {
    const int64_t K = model.x.K;
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) transposed[j * K + i] = transitions[i * K + j];
    }
  }
};

// A row's working memory, reused from row to row of a task: log alpha (L,K) and a few vectors of K.
struct Workspace {
  int64_t K, steps = 0;
  std::unique_ptr<double[]> alpha, vectors;

  explicit Workspace(int64_t K) : K(K), vectors(new double[6 * K]) {}
  double* vector(int i) { return vectors.get() + i * K; }
  void reserve(int64_t L) {
    if (L <= steps) return;
    alpha.reset(new double[L * K]);
    steps = L;
  }
};

// shift[j] = max_i v[i] + M[i,j], j < columns, or 0 where that is -inf: what may be subtracted from all terms
// of column j.
inline void column_shift(const double* M, const double* v, int64_t K, int64_t columns, double* shift) {
  std::fill_n(shift, columns, -kInf);
  for (int64_t i = 0; i < K; ++i) {
    const double* row = M + i * columns;
    const double vi = v[i];
    for (int64_t j = 0; j < columns; ++j) shift[j] = std::max(shift[j], vi + row[j]);
  }
  for (int64_t j = 0; j < columns; ++j) shift[j] = shift[j] == -kInf ? 0.0 : shift[j];
}

// out[j] = log sum_i exp(v[i] + M[i,j]), j < columns.
inline void log_product(const double* M, const double* v, int64_t K, int64_t columns, double* shift,
                        double* out) {
  column_shift(M, v, K, columns, shift);
  std::fill_n(out, columns, 0.0);
  for (int64_t i = 0; i < K; ++i) {
    const double* row = M + i * columns;
    const double vi = v[i];
    for (int64_t j = 0; j < columns; ++j) out[j] += exp_fast(vi + row[j] - shift[j]);
  }
  for (int64_t j = 0; j < columns; ++j) out[j] = shift[j] + std::log(out[j]);
}

// Fills work.alpha with row b's log alpha and returns log Z. The row must not be empty.
template <class R>
double forward(const Model<R>& model, const Parameters& p, int64_t b, Workspace& work) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  work.reserve(L);
  double *alpha = work.alpha.get(), *x = work.vector(0), *shift = work.vector(1);
  for (int64_t l = 0; l < L; ++l, alpha += K) {
    load_row(model.x, b, position[l], x);
    if (l == 0) {
      std::copy_n(p.start.data(), K, alpha);
    } else {
      log_product(p.transitions.data(), alpha - K, K, K, shift, alpha);
    }
    for (int64_t j = 0; j < K; ++j) alpha[j] += x[j];
  }
  double log_z;
  log_product(p.end.data(), alpha - K, K, 1, shift, &log_z);
  return log_z;
}

}  // namespace fastseq::FASTSEQ_ISA
