// The pointer-generator's decoder as its registration calls it, for R = float and double; one .cu file each
// instantiates it. The mathematics and all conventions are in fastseq/ops/pointer/decoder/__init__.py; how
// the kernels share the work is in decoder_forward.cuh and decoder_sweep.cuh.
//
// All arrays are dense, in the order of their dimensions.
#pragma once
#include "../../common/cuda.h"

namespace fastseq::pointer::cuda {

using namespace fastseq::cuda;

// The sizes that the kernels can do: a block holds the vectors of one sequence in shared memory. There is no
// limit for B and T. fastseq/ops/pointer/decoder/__init__.py has the same numbers.
constexpr int kMaxHidden = 512, kMaxEmbedding = 512, kMaxMemory = 1024, kMaxAttention = 1024;
constexpr int kMaxPositions = 1 << 18;  // a grid has so many pieces of a source, at most

struct DecoderSizes {
  int B, Bm, T, S, E, H, M, A;
  // The row of memory, features and mask that sequence b reads.
  __host__ __device__ int source(int b) const { return b / (B / Bm); }
};

template <class R>
struct DecoderInputs {
  DecoderSizes sizes;
  const R* inputs;                    // (B,T,E)
  const R *memory, *features;         // (Bm,S,M), (Bm,S,A)
  const bool* mask;                   // (Bm,S), or null: all on
  const R *hidden, *cell;             // (B,H)
  const R *context, *coverage;        // (B,M), (B,S)
  const R *w_context, *w_ih, *w_hh;   // (E,M), (4H,E), (4H,H)
  const R *bias, *w_query, *b_query;  // (4H,), (A,2H), (A,)
  const R *w_coverage, *v;            // (A,), or null; (A,)
};

template <class R>
struct DecoderOutputs {
  R *x, *hiddens, *cells;       // (B,T,E), (B,T,H), (B,T,H)
  R *contexts, *attention;      // (B,T,M), (B,T,S)
  R *coverage, *coverage_loss;  // (B,S), (B,T)
};

// What arrives at the outputs; null: zeros.
template <class R>
struct DecoderArriving {
  const R *x, *hiddens, *cells, *contexts, *attention, *coverage, *coverage_loss;
};

// Those of the outputs that the gradient reads.
template <class R>
struct DecoderSaved {
  const R *x, *hiddens, *cells, *attention;
};

template <class R>
struct DecoderGradients {
  R *inputs, *gates, *query;              // (B,T,E), (B,T,4H), (B,T,A)
  R *memory, *features;                   // (B,S,M), (B,S,A)
  R *hidden, *cell, *context, *coverage;  // (B,H), (B,H), (B,M), (B,S)
  R *w_coverage, *v;                      // (A,), or null; (A,)
};

// Memory that the gradient's kernels hand things over in.
template <class R>
struct DecoderScratch {
  R *query, *contexts;   // (B,T,A): queries; (B,T,M): gradients of contexts
  R *scores, *coverage;  // (B,T,S): gradients of scores; coverage before each step
  R* partials;           // decoder_owners rows of 2A: shares of v and w_coverage
};

// Positions of a source that a block of the gradient's third kernel has; and the rows of partials.
constexpr int kDecoderTile = 8;
__host__ __device__ inline int decoder_tiles(const DecoderSizes& n) {
  return (n.S + kDecoderTile - 1) / kDecoderTile;
}
inline int64_t decoder_owners(const DecoderSizes& n) { return int64_t(n.B) * decoder_tiles(n); }

// Bytes of global memory that each of the two calls needs where a block's shared memory does not hold its
// positions, else 0.
template <class R>
int64_t decoder_spare(const DecoderSizes& sizes);
template <class R>
int64_t decoder_grad_spare(const DecoderSizes& sizes);

// One launch, or none where B is 0.
template <class R>
void decoder(const DecoderInputs<R>& inputs, const DecoderOutputs<R>& outputs, char* spare,
             cudaStream_t stream);

// B == Bm. At most 4 launches.
template <class R>
void decoder_grad(const DecoderInputs<R>& inputs, const DecoderSaved<R>& saved,
                  const DecoderArriving<R>& arriving, const DecoderGradients<R>& gradients,
                  const DecoderScratch<R>& scratch, char* spare, cudaStream_t stream);

}  // namespace fastseq::pointer::cuda
