// Likelihood, entropy and samples in the float64 log domain: for float64, and where the scaled kernels lost
// precision.
//
// A task owns a row (exact_nll with gradients: a fixed slot of rows), so no result depends on the threads. A
// step is log alpha_t(j) = x_t(j) + log sum_i exp(log alpha_{t-1}(i) + A_ij), read twice: for the maximum,
// and for the sum. Cost of an edge: 2 additions and a maximum, then 2 additions and one exp of about 30
// operations, over the K*K doubles of A, which stay in a cache. With gradients: twice that, and a
// multiply-add into K*K sums of the slot. A row keeps log alpha, 8*L*K bytes; the backward pass needs one
// step at a time. Inner loops run over contiguous memory (A, or its transpose) with an accumulator for each
// element, so that the compiler may vectorise without reordering a sum.
//
// Infinities need no special case in the loops: -inf falls out as a weight of 0, and NaN or +inf make log Z
// NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "../common/half.h"
#include "crf.h"

namespace fastseq::crf {
namespace {

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
struct Scratch {
  int64_t K, steps = 0;
  std::unique_ptr<double[]> alpha, vectors;

  explicit Scratch(int64_t K) : K(K), vectors(new double[6 * K]) {}
  double* vector(int i) { return vectors.get() + i * K; }
  void reserve(int64_t L) {
    if (L <= steps) return;
    alpha.reset(new double[L * K]);
    steps = L;
  }
};

// shift[j] = max_i v[i] + M[i,j], j < columns, or 0 where that is -inf: what may be subtracted from all terms
// of column j.
void column_shift(const double* M, const double* v, int64_t K, int64_t columns, double* shift) {
  std::fill_n(shift, columns, -kInf);
  for (int64_t i = 0; i < K; ++i) {
    const double* row = M + i * columns;
    const double vi = v[i];
    for (int64_t j = 0; j < columns; ++j) shift[j] = std::max(shift[j], vi + row[j]);
  }
  for (int64_t j = 0; j < columns; ++j) shift[j] = shift[j] == -kInf ? 0.0 : shift[j];
}

// out[j] = log sum_i exp(v[i] + M[i,j]), j < columns.
void log_product(const double* M, const double* v, int64_t K, int64_t columns, double* shift, double* out) {
  column_shift(M, v, K, columns, shift);
  std::fill_n(out, columns, 0.0);
  for (int64_t i = 0; i < K; ++i) {
    const double* row = M + i * columns;
    const double vi = v[i];
    for (int64_t j = 0; j < columns; ++j) out[j] += exp_fast(vi + row[j] - shift[j]);
  }
  for (int64_t j = 0; j < columns; ++j) out[j] = shift[j] + std::log(out[j]);
}

// Fills scratch.alpha with row b's log alpha and returns log Z. The row must not be empty.
template <class R>
double forward(const Model<R>& model, const Parameters& p, int64_t b, Scratch& scratch) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  scratch.reserve(L);
  double *alpha = scratch.alpha.get(), *x = scratch.vector(0), *shift = scratch.vector(1);
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

// ---- exact_nll
// -------------------------------------------------------------------------------------------------------

// The score of row b's tags. The row must not be empty.
template <class R>
double gold_score(const Model<R>& model, const Parameters& p, Tags tags, int64_t b, Scratch& scratch) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  double* x = scratch.vector(0);
  double score = p.start[tags.at(b, position[0])] + p.end[tags.at(b, position[L - 1])];
  for (int64_t l = 0; l < L; ++l) {
    const int64_t tag = tags.at(b, position[l]);
    load_row(model.x, b, position[l], x);
    score += x[tag];
    if (l > 0) score += p.transitions[tags.at(b, position[l - 1]) * K + tag];
  }
  return score;
}

// The part of the parameters' gradient that a slot of rows adds up: transitions transposed (to x from),
// start, end.
struct Slot {
  double *transposed, *start, *end;
  Slot(double* sums, int64_t K) : transposed(sums), start(sums + K * K), end(start + K) {}
  static int64_t size(int64_t K) { return K * K + 2 * K; }
};

template <class R>
struct Writer {
  const Model<R>& model;
  const Gradients<R>& grad;
  int64_t b;

  void operator()(int64_t t, const double* values) const {
    store_row(model.x.type, grad.emissions, b * grad.stride_b + t * grad.stride_t, model.x.K, values);
  }
  // Row b of the gradient where it is not a matter of marginals: `value` where on, 0 where off.
  void constant(double value, Scratch& scratch) const {
    const int32_t *next = model.rows.of(b), *last = next + model.rows.length(b);
    for (int64_t t = 0; t < model.x.T; ++t) {
      const bool on = next != last && *next == t;
      std::fill_n(scratch.vector(0), model.x.K, on ? value : 0.0);
      (*this)(t, scratch.vector(0));
      next += on;
    }
  }
};

// beta of the step before: log sum_j exp(A_ij + c[j]), c = x + beta of this step. The terms of that sum,
// times factor(i) = weight * alpha(i) exp(shift(i)) / Z, are the pairwise marginals: they are added to the
// slot on the way.
void backward_step(const Parameters& p, const double* c, const double* alpha, double log_z, double weight,
                   int64_t K, Scratch& scratch, double* pairs, double* beta) {
  double *shift = scratch.vector(1), *factor = scratch.vector(2);
  column_shift(p.transposed.data(), c, K, K, shift);
  // At most 1, as alpha(i) beta(i) <= Z. Where shift stands for -inf all terms are 0, and the factor must be
  // finite.
  for (int64_t i = 0; i < K; ++i) factor[i] = weight * exp_fast(std::min(alpha[i] + shift[i] - log_z, 1.0));
  std::fill_n(beta, K, 0.0);
  for (int64_t j = 0; j < K; ++j) {
    const double* column = p.transposed.data() + j * K;
    double* pair = pairs + j * K;
    const double cj = c[j];
    for (int64_t i = 0; i < K; ++i) {
      const double term = exp_fast(cj + column[i] - shift[i]);
      beta[i] += term;
      pair[i] += factor[i] * term;
    }
  }
  for (int64_t i = 0; i < K; ++i) beta[i] = shift[i] + std::log(beta[i]);
}

// Row b's gradient, weight * (expected - observed), from the log alpha that `forward` left and a finite log
// Z.
template <class R>
void backward(const Model<R>& model, const Parameters& p, Tags tags, int64_t b, double log_z, double weight,
              Scratch& scratch, Slot slot, const Writer<R>& write) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  double *c = scratch.vector(0), *marginal = scratch.vector(3), *beta = scratch.vector(4);
  std::copy_n(p.end.data(), K, beta);
  for (int64_t l = L - 1; l >= 0; --l) {
    const double* alpha = scratch.alpha.get() + l * K;
    for (int64_t k = 0; k < K; ++k) marginal[k] = weight * exp_fast(alpha[k] + beta[k] - log_z);
    const int64_t tag = tags.data ? tags.at(b, position[l]) : -1;
    if (tag >= 0) marginal[tag] -= weight;
    write(position[l], marginal);
    for (int64_t k = 0; l == L - 1 && k < K; ++k) slot.end[k] += marginal[k];
    for (int64_t k = 0; l == 0 && k < K; ++k) slot.start[k] += marginal[k];
    if (l == 0) break;
    load_row(model.x, b, position[l], c);
    for (int64_t k = 0; k < K; ++k) c[k] += beta[k];
    backward_step(p, c, alpha - K, log_z, weight, K, scratch, slot.transposed, beta);
    if (tag >= 0) slot.transposed[tag * K + tags.at(b, position[l - 1])] -= weight;
  }
}

// One row: its nll and, with a slot, its gradient.
template <class R>
R nll_row(const Model<R>& model, const Parameters& p, Tags tags, int64_t b, double weight, Scratch& scratch,
          const Gradients<R>* grad, double* sums) {
  const bool empty = model.rows.length(b) == 0;
  const double log_z = empty ? 0.0 : forward(model, p, b, scratch);
  if (grad) {
    const Writer<R> write{model, *grad, b};
    const bool usual = !empty && std::isfinite(log_z);
    write.constant(std::isnan(log_z) ? kNaN : 0.0, scratch);
    if (usual) backward(model, p, tags, b, log_z, weight, scratch, Slot(sums, model.x.K), write);
    if (std::isnan(log_z)) std::fill_n(sums, Slot::size(model.x.K), kNaN);
  }
  if (empty || !tags.data) return static_cast<R>(log_z);
  if (log_z == -kInf) return static_cast<R>(kInf);
  return static_cast<R>(log_z - gold_score(model, p, tags, b, scratch));
}

// sums += the slots, in their order, transitions transposed back.
void add_slots(const std::vector<double>& slots, int64_t K, double* sums) {
  for (size_t at = 0; at < slots.size(); at += Slot::size(K)) {
    const double* slot = slots.data() + at;
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) sums[i * K + j] += slot[j * K + i];
    }
    for (int64_t k = K * K; k < Slot::size(K); ++k) sums[k] += slot[k];
  }
}

// How many slots share the rows of a gradient: a function of the sizes alone, with at most 64 MB of sums.
int64_t slot_count(int64_t n, int64_t K) {
  const int64_t affordable = std::max<int64_t>(1, (int64_t{64} << 20) / (8 * K * K));
  return std::min({n, affordable, int64_t{16}});
}

}  // namespace

template <class R>
void exact_nll(const Model<R>& model, Tags tags, const std::vector<int64_t>& which, const R* weights,
               double scale, R* nll, const Gradients<R>* grad, double* sums,
               const ParallelFor& parallel_for) {
  const int64_t K = model.x.K, n = static_cast<int64_t>(which.size());
  if (n == 0) return;
  const Parameters p(model);
  const int64_t tasks = grad ? slot_count(n, K) : n;
  std::vector<double> slots(grad ? tasks * Slot::size(K) : 0);
  run_tasks(parallel_for, tasks, [&](int64_t task) {
    Scratch scratch(K);
    double* slot = grad ? slots.data() + task * Slot::size(K) : nullptr;
    for (int64_t i = n * task / tasks; i < n * (task + 1) / tasks; ++i) {
      const int64_t b = which[i];
      const double weight = scale * (weights ? static_cast<double>(weights[b]) : 1.0);
      nll[b] = nll_row(model, p, tags, b, weight, scratch, grad, slot);
    }
  });
  add_slots(slots, K, sums);
}

// ---- entropy (Hernando, Crespi, Cybenko 2005)
// ------------------------------------------------------------------------

namespace {

// One step for the tags j < columns: out[j] = log sum_i exp(alpha[i] + M[i,j]), and H[j], the entropy of the
// paths that lead to j, from that of the paths that lead to each i. Nothing is subtracted, so nothing
// cancels: sum_i p(i|j) (H(i) - log p(i|j)) = sum_i e_i (H(i) - log e_i) / s + log s, with e_i <= 1 and s =
// sum_i e_i >= 1.
void entropy_step(const double* M, const double* alpha, const double* before, int64_t K, int64_t columns,
                  double* shift, double* out, double* H) {
  column_shift(M, alpha, K, columns, shift);
  std::fill_n(out, columns, 0.0);
  std::fill_n(H, columns, 0.0);
  for (int64_t i = 0; i < K; ++i) {
    const double* row = M + i * columns;
    const double alpha_i = alpha[i], before_i = before[i];
    for (int64_t j = 0; j < columns; ++j) {
      const double log_e = alpha_i + row[j] - shift[j], e = exp_fast(log_e);
      out[j] += e;
      H[j] += e * (before_i - std::max(log_e, -1e3));  // 0 log 0 = 0: e is 0 long before -1000
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    const double log_sum = std::log(out[j]);
    H[j] = out[j] == 0 ? 0.0 : H[j] / out[j] + log_sum;
    out[j] = shift[j] + log_sum;
  }
}

// The entropy of row b; 0 if it is empty or nothing is possible in it.
template <class R>
double entropy_row(const Model<R>& model, const Parameters& p, int64_t b, Scratch& scratch) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  double *x = scratch.vector(0), *shift = scratch.vector(1), *alpha = scratch.vector(2),
         *H = scratch.vector(3);
  double *next_alpha = scratch.vector(4), *next_H = scratch.vector(5);
  std::copy_n(p.start.data(), K, alpha);
  std::fill_n(H, K, 0.0);
  for (int64_t l = 0; l < L; ++l) {
    if (l > 0) {
      entropy_step(p.transitions.data(), alpha, H, K, K, shift, next_alpha, next_H);
      std::swap(alpha, next_alpha);
      std::swap(H, next_H);
    }
    load_row(model.x, b, position[l], x);
    for (int64_t j = 0; j < K; ++j) alpha[j] += x[j];
  }
  if (L > 0) entropy_step(p.end.data(), alpha, H, K, 1, shift, next_alpha, next_H);
  return L > 0 ? next_H[0] : 0.0;
}

}  // namespace

template <class R>
void entropy(const Model<R>& model, R* out, const ParallelFor& parallel_for) {
  const Parameters p(model);
  run_tasks(parallel_for, model.x.B, [&](int64_t b) {
    Scratch scratch(model.x.K);
    out[b] = static_cast<R>(entropy_row(model, p, b, scratch));
  });
}

// ---- sample
// ----------------------------------------------------------------------------------------------------------

namespace {

// The smallest i whose cumulative weight exp(v[i] + M[i]) exceeds u times their sum. Some v[i] + M[i] must be
// finite.
int64_t draw(const double* v, const double* M, int64_t K, double u, double* cumulative) {
  double shift, total = 0;
  column_shift(M, v, K, 1, &shift);
  for (int64_t i = 0; i < K; ++i) cumulative[i] = exp_fast(v[i] + M[i] - shift);
  for (int64_t i = 0; i < K; ++i) cumulative[i] = total += cumulative[i];
  const double target = u * total;
  int64_t tag = 0;
  while (tag < K - 1 && cumulative[tag] <= target) ++tag;
  return tag;
}

// One path of row b, drawn from its last tag to its first.
template <class R>
void sample_path(const Model<R>& model, const Parameters& p, int64_t b, const R* uniforms, Scratch& scratch,
                 int64_t* path) {
  const int64_t K = model.x.K;
  const int32_t* position = model.rows.of(b);
  const double* onward = p.end.data();
  for (int64_t l = model.rows.length(b) - 1; l >= 0; --l) {
    const int64_t t = position[l];
    path[t] = draw(scratch.alpha.get() + l * K, onward, K, uniforms[t], scratch.vector(0));
    onward = p.transposed.data() + path[t] * K;
  }
}

}  // namespace

template <class R>
void sample(const Model<R>& model, const R* uniforms, int64_t N, int64_t* out,
            const ParallelFor& parallel_for) {
  const int64_t B = model.x.B, T = model.x.T;
  const Parameters p(model);
  run_tasks(parallel_for, B, [&](int64_t b) {
    Scratch scratch(model.x.K);
    const bool possible = model.rows.length(b) > 0 && std::isfinite(forward(model, p, b, scratch));
    for (int64_t n = 0; n < N; ++n) {
      const int64_t at = (n * B + b) * T;
      std::fill_n(out + at, T, -100);
      if (possible) sample_path(model, p, b, uniforms + at, scratch, out + at);
    }
  });
}

#define FASTSEQ_INSTANTIATE(R)                                                                      \
  template void exact_nll(const Model<R>&, Tags, const std::vector<int64_t>&, const R*, double, R*, \
                          const Gradients<R>*, double*, const ParallelFor&);                        \
  template void entropy(const Model<R>&, R*, const ParallelFor&);                                   \
  template void sample(const Model<R>&, const R*, int64_t, int64_t*, const ParallelFor&);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
#undef FASTSEQ_INSTANTIATE

}  // namespace fastseq::crf
