// The vocabulary's part of the negative log-likelihood: what the row part (nll_rows.h) hands to the tiles
// (nll_tiles.cpp) and gets back. The tiles know nothing of copying: to them the loss is a weighted
// cross-entropy.
#pragma once
#include <functional>
#include <vector>

#include "../common/cpu_features.h"
#include "nll.h"

namespace fastseq::pointer {

// A target's logit is read in the first pass, and its gradient replaced in the second.
struct TargetWord {
  int64_t word, row;
};

// A source word's logits in rows first .. first + count, read in the first pass; in the second, what to add
// there to the gradient.
template <class R>
struct SourceWord {
  int64_t word, first, count;
  R* values;
};

template <class R>
struct Tiles {
  int64_t N = 0, H, V;  // N rows, all of which need the vocabulary
  const void* hidden;
  Type hidden_type;
  std::vector<int64_t> hidden_at,
      flat;  // row n of hidden begins at element hidden_at[n]; it is number flat[n] of all
  const void* weight;
  Type weight_type;
  const R* bias;
  std::vector<TargetWord> targets;     // ascending words
  std::vector<SourceWord<R>> sources;  // likewise
  bool sum_logits;                     // over the words that are not forbidden, those with a bias of -inf

  // The first pass: lse = largest + log(sum).
  std::vector<R> largest, target_logit;
  std::vector<double> sum, logit_sum;

  // The second: d total / d logit = exp(logit - largest) * scale - shift, but at_target at the target.
  bool gradient;
  std::vector<R> scale, shift, at_target;
  void *grad_hidden, *grad_weight;
  R* grad_bias;
};

}  // namespace fastseq::pointer

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                     \
  namespace isa {                                                                                \
  /* The first pass; `between`, which turns its results into what the second needs; and that. */ \
  template <class R>                                                                             \
  void run_tiles(pointer::Tiles<R>& tiles, const std::function<void()>& between,                 \
                 const ParallelFor& parallel_for);                                               \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
