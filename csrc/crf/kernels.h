// The kernels that are built once per instruction set, as the rest of the library calls them:
// FASTSEQ_SELECT(scaled_nll).
#pragma once
#include "../common/cpu_features.h"
#include "crf.h"

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                                 \
  namespace isa {                                                                                            \
  /* nll of every row that has a position on, in the scaled domain; marks[b] = 1 where it must be done */    \
  /* exactly. With a gradient: writes the rows that are not marked, and adds their parameter gradients */    \
  /* to `sums` (K*K + K + K). */                                                                             \
  void scaled_nll(const crf::Model<float>& model, crf::Tags tags, const float* weights, double scale,        \
                  float* nll, const crf::Gradients<float>* gradient, uint8_t* marks, double* sums,           \
                  const ParallelFor& parallel);                                                              \
  /* nll[b] for each b in `which`, in the float64 log domain, one exp per edge. With a gradient: adds */     \
  /* scale*weights[b] times row b's gradient of the parameters to `sums`, and writes the rows `which`. */    \
  template <class R>                                                                                         \
  void exact_nll(const crf::Model<R>& model, crf::Tags tags, const std::vector<int64_t>& which,              \
                 const R* weights, double scale, R* nll, const crf::Gradients<R>* gradient, double* sums,    \
                 const ParallelFor& parallel);                                                               \
  /* paths (B,T), -100 where off, and scores (B,), both written whole. */                                    \
  void viterbi(const crf::Model<float>& model, int64_t* paths, float* scores, const ParallelFor& parallel);  \
  /* The same for any R, in plain loops. */                                                                  \
  template <class R>                                                                                         \
  void viterbi_exact(const crf::Model<R>& model, int64_t* paths, R* scores, const ParallelFor& parallel);    \
  /* paths (B,n,T), scores (B,n); -100 where off and for paths that do not exist, whose score is -inf. */    \
  template <class R>                                                                                         \
  void nbest(const crf::Model<R>& model, int64_t n, int64_t* paths, R* scores, const ParallelFor& parallel); \
  template <class R>                                                                                         \
  void entropy(const crf::Model<R>& model, R* out, const ParallelFor& parallel);                             \
  /* uniforms (N,B,T) in [0,1), out (N,B,T), both contiguous; positions that are off get -100. */            \
  template <class R>                                                                                         \
  void sample(const crf::Model<R>& model, const R* uniforms, int64_t N, int64_t* out,                        \
              const ParallelFor& parallel);                                                                  \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
