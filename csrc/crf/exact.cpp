// Likelihood and its gradient in the float64 log domain (log_domain.h): for float64, and for the rows that
// the scaled kernels marked. With gradients an edge costs twice the forward pass and a little: its exps are
// taken again on the way back, which keeps one step at a time, and each is a multiply-add into K*K sums of
// the slot.
#include "log_domain.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// The score of row b's tags. The row must not be empty.
template <class R>
double gold_score(const Model<R>& model, const Parameters& p, Tags tags, int64_t b, Workspace& work) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  double* x = work.vector(0);
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
  void constant(double value, Workspace& work) const {
    const int32_t *next = model.rows.of(b), *last = next + model.rows.length(b);
    for (int64_t t = 0; t < model.x.T; ++t) {
      const bool on = next != last && *next == t;
      std::fill_n(work.vector(0), model.x.K, on ? value : 0.0);
      (*this)(t, work.vector(0));
      next += on;
    }
  }
};

// beta of the step before: log sum_j exp(A_ij + c[j]), c = x + beta of this step. The terms of that sum,
// times factor(i) = weight * alpha(i) exp(shift(i)) / Z, are the pairwise marginals: they are added to the
// slot on the way.
void backward_step(const Parameters& p, const double* c, const double* alpha, double log_z, double weight,
                   int64_t K, Workspace& work, double* pairs, double* beta) {
  double *shift = work.vector(1), *factor = work.vector(2);
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
              Workspace& work, Slot slot, const Writer<R>& write) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  double *c = work.vector(0), *marginal = work.vector(3), *beta = work.vector(4);
  std::copy_n(p.end.data(), K, beta);
  for (int64_t l = L - 1; l >= 0; --l) {
    const double* alpha = work.alpha.get() + l * K;
    for (int64_t k = 0; k < K; ++k) marginal[k] = weight * exp_fast(alpha[k] + beta[k] - log_z);
    const int64_t tag = tags.data ? tags.at(b, position[l]) : -1;
    if (tag >= 0) marginal[tag] -= weight;
    write(position[l], marginal);
    for (int64_t k = 0; l == L - 1 && k < K; ++k) slot.end[k] += marginal[k];
    for (int64_t k = 0; l == 0 && k < K; ++k) slot.start[k] += marginal[k];
    if (l == 0) break;
    load_row(model.x, b, position[l], c);
    for (int64_t k = 0; k < K; ++k) c[k] += beta[k];
    backward_step(p, c, alpha - K, log_z, weight, K, work, slot.transposed, beta);
    if (tag >= 0) slot.transposed[tag * K + tags.at(b, position[l - 1])] -= weight;
  }
}

// One row: its nll and, with a slot, its gradient.
template <class R>
R nll_row(const Model<R>& model, const Parameters& p, Tags tags, int64_t b, double weight, Workspace& work,
          const Gradients<R>* grad, double* sums) {
  const bool empty = model.rows.length(b) == 0;
  const double log_z = empty ? 0.0 : forward(model, p, b, work);
  if (grad) {
    const Writer<R> write{model, *grad, b};
    const bool usual = !empty && std::isfinite(log_z) && weight != 0;
    const bool invalid = std::isnan(log_z) && weight != 0;
    write.constant(invalid ? kNaN : 0.0, work);
    if (usual) backward(model, p, tags, b, log_z, weight, work, Slot(sums, model.x.K), write);
    if (invalid) std::fill_n(sums, Slot::size(model.x.K), kNaN);
  }
  if (empty || !tags.data) return static_cast<R>(log_z);
  if (log_z == -kInf) return static_cast<R>(kInf);
  return static_cast<R>(log_z - gold_score(model, p, tags, b, work));
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
    Workspace work(K);
    double* slot = grad ? slots.data() + task * Slot::size(K) : nullptr;
    for (int64_t i = n * task / tasks; i < n * (task + 1) / tasks; ++i) {
      const int64_t b = which[i];
      const double weight = scale * (weights ? static_cast<double>(weights[b]) : 1.0);
      nll[b] = nll_row(model, p, tags, b, weight, work, grad, slot);
    }
  });
  add_slots(slots, K, sums);
}

template void exact_nll(const Model<float>&, Tags, const std::vector<int64_t>&, const float*, double, float*,
                        const Gradients<float>*, double*, const ParallelFor&);
template void exact_nll(const Model<double>&, Tags, const std::vector<int64_t>&, const double*, double,
                        double*, const Gradients<double>*, double*, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
