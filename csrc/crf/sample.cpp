// Exact samples: a forward pass, then tag after tag from the last to the first by the inverse of its
// distribution.
#include "log_domain.h"

namespace fastseq::FASTSEQ_ISA {
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
void sample_path(const Model<R>& model, const Parameters& p, int64_t b, const R* uniforms, Workspace& work,
                 int64_t* path) {
  const int64_t K = model.x.K;
  const int32_t* position = model.rows.of(b);
  const double* onward = p.end.data();
  for (int64_t l = model.rows.length(b) - 1; l >= 0; --l) {
    const int64_t t = position[l];
    path[t] = draw(work.alpha.get() + l * K, onward, K, uniforms[t], work.vector(0));
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
    Workspace work(model.x.K);
    const bool possible = model.rows.length(b) > 0 && std::isfinite(forward(model, p, b, work));
    for (int64_t n = 0; n < N; ++n) {
      const int64_t at = (n * B + b) * T;
      std::fill_n(out + at, T, -100);
      if (possible) sample_path(model, p, b, uniforms + at, work, out + at);
    }
  });
}

template void sample(const Model<float>&, const float*, int64_t, int64_t*, const ParallelFor&);
template void sample(const Model<double>&, const double*, int64_t, int64_t*, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
