// The output distribution of a pointer-generator on raw pointers: what registration, kernels and tests share.
// Mathematics and conventions: fastseq/ops/pointer/distribution/__init__.py.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/cpu_features.h"
#include "../common/parallel.h"
#include "../crf/crf.h"

namespace fastseq::pointer {

// The different words of each source, ascending, and where they stand: word w of row b has the positions
// order[begin[w]] ... order[begin[w+1]-1], ascending; the words of b are first[b] ... first[b+1]-1. Positions
// whose id is negative are left out.
struct SourceWords {
  std::vector<int64_t> first, words;
  std::vector<int64_t> begin;
  std::vector<int32_t> order;

  // ids (B,S), contiguous. B sorts of S ids each: for all T rows of b.
  SourceWords(const int64_t* ids, int64_t B, int64_t S);

  int64_t count(int64_t b) const { return first[b + 1] - first[b]; }
};

// R is float or double: the type of attention, gate and results; float for logits of a half type.
template <class R>
struct Mixture {
  crf::Emissions logits;             // K is V
  const R* attention;                // row (b, t) at b*attention_b + t*attention_t, S elements
  int64_t attention_b, attention_t;  //
  const R* gate;                     // (B,T)
  const int64_t* source_ids;         // (B,S), all below V + num_oov
  int64_t S, num_oov;
};

// What the gradient op writes, each whole and contiguous: to the logits, in their type, (B,T,V), to attention
// (B,T,S) and gate (B,T).
template <class R>
struct MixtureGradients {
  void* logits;
  R *attention, *gate;
};

// Rows `begin` ... `begin + N - 1` of the B*T rows, for the search of the best words: their logits (N,V),
// less the bias.
template <class R>
struct Candidates {
  const void* logits;
  crf::Type type;
  const R *bias, *attention, *gate;  // (V,) or null; (B,T,S) and (B,T), contiguous
  const int64_t* source_ids;         // (B,S)
  int64_t begin, N, B, T, S, V;
};

}  // namespace fastseq::pointer

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                      \
  namespace isa {                                                                                 \
  /* final (B,T,V+num_oov), contiguous. */                                                        \
  template <class R>                                                                              \
  void pointer_distribution(const pointer::Mixture<R>& m, R* final, const ParallelFor& parallel); \
  /* grad: row (b, t) at b*grad_b + t*grad_t, V + num_oov elements. */                            \
  template <class R>                                                                              \
  void pointer_distribution_grad(const pointer::Mixture<R>& m, const R* grad, int64_t grad_b,     \
                                 int64_t grad_t, const pointer::MixtureGradients<R>& to,          \
                                 const ParallelFor& parallel);                                    \
  /* The k best words of N rows: values (N,k) and ids (N,k); 1 <= k <= V. */                      \
  template <class R>                                                                              \
  void pointer_topk(const pointer::Candidates<R>& c, int64_t k, R* values, int64_t* ids,          \
                    const ParallelFor& parallel);                                                 \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
