// nll and its gradient: the scaled kernels where they can be trusted, the exact ones elsewhere, and the sums
// of both.
#include <type_traits>

#include "kernels.h"

namespace fastseq::crf {

template <class R>
void nll(const Model<R>& model, Tags tags, const R* weights, double scale, R* out,
         const Gradients<R>* gradient, const ParallelFor& parallel_for) {
  const int64_t B = model.x.B, K = model.x.K;
  std::vector<double> sums(gradient ? K * K + 2 * K : 0);
  std::vector<int64_t> exact;
  if constexpr (std::is_same_v<R, float>) {
    std::vector<uint8_t> marks(B);
    FASTSEQ_SELECT(scaled_nll)
    (model, tags, weights, scale, out, gradient, marks.data(), sums.data(), parallel_for);
    for (int64_t b = 0; b < B; ++b)
      if (marks[b] || !model.rows.length(b)) exact.push_back(b);
  } else {
    for (int64_t b = 0; b < B; ++b) exact.push_back(b);
  }
  if (!exact.empty()) FASTSEQ_SELECT(exact_nll<R>)
  (model, tags, exact, weights, scale, out, gradient, gradient ? sums.data() : nullptr, parallel_for);
  if (gradient == nullptr) return;
  for (int64_t i = 0; i < K * K; ++i) gradient->transitions[i] = R(sums[i]);
  for (int64_t k = 0; k < K; ++k) gradient->start[k] = R(sums[K * K + k]);
  for (int64_t k = 0; k < K; ++k) gradient->end[k] = R(sums[K * K + K + k]);
}

template void nll<float>(const Model<float>&, Tags, const float*, double, float*, const Gradients<float>*,
                         const ParallelFor&);
template void nll<double>(const Model<double>&, Tags, const double*, double, double*,
                          const Gradients<double>*, const ParallelFor&);

}  // namespace fastseq::crf
