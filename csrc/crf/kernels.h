// The kernels that are built once per instruction set, as the rest of the library calls them: FASTSEQ_SELECT(scaled_nll).
#pragma once
#include "../common/cpu_features.h"
#include "crf.h"

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                                         \
  namespace isa {                                                                                                    \
  /* nll of every row that has a position on, in the scaled domain; marks[b] = 1 where it must be done exactly. With \
     a gradient: writes the rows that are not marked, and adds their parameter gradients to `sums` (K*K + K + K). */ \
  void scaled_nll(const crf::Model<float>& model, crf::Tags tags, const float* weights, double scale, float* nll,    \
                  const crf::Gradients<float>* gradient, uint8_t* marks, double* sums, const ParallelFor& parallel); \
  /* paths (B,T) and scores (B,), both written whole. */                                                             \
  void viterbi(const crf::Model<float>& model, int64_t* paths, float* scores, const ParallelFor& parallel);          \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
