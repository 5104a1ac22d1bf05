// Viterbi in the type of the results, a row a task: for float64, and as the plain statement of what viterbi.h
// does in float32. Rounding and ties are explained there.
//
// The forward pass keeps scores only, L*K of them: K*K additions and maxima a step, over contiguous memory.
// The way back finds the tag that won again, K operations a step.
#include <algorithm>
#include <limits>
#include <vector>

#include "../common/half.h"
#include "usable.h"

namespace fastseq::FASTSEQ_ISA {

namespace {

// to[j] = max_i from[i] + transitions[i,j]. A NaN takes no part: such rows are found by their input.
template <class R>
void max_plus(const R* from, const R* transitions, int64_t K, R* to) {
  std::fill_n(to, K, -std::numeric_limits<R>::infinity());
  for (int64_t i = 0; i < K; ++i) {
    const R* row = transitions + i * K;
    const R s = from[i];
    for (int64_t j = 0; j < K; ++j) to[j] = s + row[j] > to[j] ? s + row[j] : to[j];
  }
}

// The first i that has the maximum of (from[i] + edge[i*stride]) + x; 0 where all are -inf.
template <class R>
int64_t first_best(const R* from, const R* edge, int64_t stride, R x, int64_t K) {
  int64_t best = 0;
  R top = -std::numeric_limits<R>::infinity();
  for (int64_t i = 0; i < K; ++i) {
    const R candidate = (from[i] + edge[i * stride]) + x;
    if (candidate > top) {
      top = candidate;
      best = i;
    }
  }
  return best;
}

// Row b, which is not empty; `path` holds -100. Returns the score.
template <class R>
R decode_row(const Model<R>& model, int64_t b, int64_t* path) {
  const int64_t K = model.x.K, L = model.rows.length(b);
  const int32_t* position = model.rows.of(b);
  std::vector<R> scores(L * K), x(L * K);
  for (int64_t l = 0; l < L; ++l) {
    R *s = scores.data() + l * K, *e = x.data() + l * K;
    load_row(model.x, b, position[l], e);
    if (l == 0) {
      std::copy_n(model.start, K, s);
    } else {
      max_plus(s - K, model.transitions, K, s);
    }
    for (int64_t k = 0; k < K; ++k) s[k] += e[k];
  }
  const R* s = scores.data() + (L - 1) * K;
  int64_t tag = first_best(s, model.end, 1, R{0}, K);
  const R score = s[tag] + model.end[tag];
  path[position[L - 1]] = tag;
  for (int64_t l = L - 1; l > 0; --l) {
    tag = first_best(scores.data() + (l - 1) * K, model.transitions + tag, K, x[l * K + tag], K);
    path[position[l - 1]] = tag;
  }
  return all_usable(x.data(), L * K) ? score : std::numeric_limits<R>::quiet_NaN();
}

}  // namespace

template <class R>
void viterbi_exact(const Model<R>& model, int64_t* paths, R* scores, const ParallelFor& parallel_for) {
  const int64_t T = model.x.T, longest = longest_usable(model);
  run_tasks(parallel_for, model.x.B, [&](int64_t b) {
    const int64_t L = model.rows.length(b);
    std::fill_n(paths + b * T, T, -100);
    scores[b] = L == 0 ? R{0} : decode_row(model, b, paths + b * T);
    if (L > longest) scores[b] = std::numeric_limits<R>::quiet_NaN();
  });
}

template void viterbi_exact(const Model<float>&, int64_t*, float*, const ParallelFor&);
template void viterbi_exact(const Model<double>&, int64_t*, double*, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
