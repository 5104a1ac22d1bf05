// Which rows a search can answer: NaN or +inf in what a row uses makes its scores NaN.
#pragma once
#include <cstdint>
#include <limits>

#include "kernels.h"

namespace fastseq::FASTSEQ_ISA {

using namespace fastseq::crf;

// Not NaN, not +inf. No early end: the loop vectorises, and almost always runs to its end anyway.
template <class R>
bool all_usable(const R* values, int64_t n) {
  bool usable = true;
  for (int64_t i = 0; i < n; ++i) usable &= values[i] < std::numeric_limits<R>::infinity();
  return usable;
}

// The longest row that the parameters let have an answer: the transitions touch those of two or more
// positions.
template <class R>
int64_t longest_usable(const Model<R>& model) {
  const int64_t K = model.x.K;
  if (!all_usable(model.start, K) || !all_usable(model.end, K)) return 0;
  return all_usable(model.transitions, K * K) ? std::numeric_limits<int64_t>::max() : 1;
}

}  // namespace fastseq::FASTSEQ_ISA
