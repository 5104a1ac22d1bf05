// The entropy of the distribution over paths, in one forward pass (Hernando, Crespi, Cybenko 2005).
#include "log_domain.h"

namespace fastseq::FASTSEQ_ISA {
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
double entropy_row(const Model<R>& model, const Parameters& p, int64_t b, Workspace& work) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  double *x = work.vector(0), *shift = work.vector(1), *alpha = work.vector(2), *H = work.vector(3);
  double *next_alpha = work.vector(4), *next_H = work.vector(5);
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
    Workspace work(model.x.K);
    out[b] = static_cast<R>(entropy_row(model, p, b, work));
  });
}

template void entropy(const Model<float>&, float*, const ParallelFor&);
template void entropy(const Model<double>&, double*, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
