// The attention decoder on raw pointers: what registration, kernels and tests share. Shapes and mathematics:
// fastseq/ops/pointer/decoder/__init__.py. All arrays are contiguous; R is float or double.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/cpu_features.h"
#include "../common/parallel.h"

namespace fastseq::pointer {

// Which source positions are on: of memory m, positions[offset[m]] ... positions[offset[m+1] - 1], ascending.
struct SourcePositions {
  std::vector<int64_t> offset;
  std::vector<int32_t> positions;
  int64_t count(int64_t m) const { return offset[m + 1] - offset[m]; }
  const int32_t* of(int64_t m) const { return positions.data() + offset[m]; }
};

template <class R>
struct Decoder {
  int64_t B, Bm, T, S, E, H, M, A;  // Bm memories; row b of B reads memory b / (B / Bm)
  const SourcePositions& on;
  const R *inputs, *memory, *features;          // (B,T,E), (Bm,S,M), (Bm,S,A)
  const R *hidden, *cell, *context, *coverage;  // (B,H), (B,H), (B,M), (B,S)
  const R *w_context, *w_ih, *w_hh, *bias;      // (E,M), (4H,E), (4H,H), (4H,)
  const R *w_query, *b_query, *w_coverage, *v;  // (A,2H), (A,), (A,) or null, (A,)
  int64_t memory_of(int64_t b) const { return b / (B / Bm); }
};

template <class R>
struct DecoderOutputs {
  R *x, *hiddens, *cells, *contexts, *attention;  // (B,T,E), (B,T,H), (B,T,H), (B,T,M), (B,T,S)
  R *coverage, *coverage_loss;                    // (B,S), (B,T)
};

// What backward reads besides the inputs. Gradients may be null: zeros.
template <class R>
struct DecoderSaved {
  const R *grad_x, *grad_hiddens, *grad_cells, *grad_contexts, *grad_attention, *grad_coverage, *grad_loss;
  const R *x, *hiddens, *cells, *contexts, *attention;
};

template <class R>
struct DecoderGradients {
  R *inputs, *gates, *query, *memory, *features;  // (B,T,E), (B,T,4H), (B,T,A), (B,S,M), (B,S,A)
  R *hidden, *cell, *context, *coverage;          // as the states
  R *w_coverage, *v;                              // (A,) or null, (A,)
};

}  // namespace fastseq::pointer

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                   \
  namespace isa {                                                                              \
  template <class R>                                                                           \
  void decoder_forward(const pointer::Decoder<R>& in, const pointer::DecoderOutputs<R>& out,   \
                       const ParallelFor& parallel);                                           \
  template <class R> /* needs B == Bm */                                                       \
  void decoder_backward(const pointer::Decoder<R>& in, const pointer::DecoderSaved<R>& saved,  \
                        const pointer::DecoderGradients<R>& out, const ParallelFor& parallel); \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
