// Attention with dot products on raw pointers: what registration, kernels and tests share. Mathematics:
// fastseq/ops/attention/dot_product/__init__.py.
#pragma once
#include "../common/cpu_features.h"
#include "../common/half.h"
#include "../common/parallel.h"

namespace fastseq::attention {

using crf::Type;

// Element (row, token, head, d) at row * row_stride + token * token_stride + head * head_stride + d.
struct Tokens {
  const void* data;
  int64_t row_stride, token_stride, head_stride;
};

// Element (n, h, i, j) at n * n_stride + ...; a stride is 0 where the bias does not vary.
struct Bias {
  const void* data;  // null: none
  Type type;
  int64_t n_stride, h_stride, i_stride, j_stride;
};

// R: float64 for float64, else float32. Dense: cu_* are null, sequence n is row n of N. Packed: sequence n is
// the tokens cu[n] .. cu[n + 1) of the only row.
struct Problem {
  Type type;  // of q, k, v, outputs, and gradients
  int64_t N, query_heads, key_heads, D;
  int64_t queries, keys;  // tokens in a row of q; of k and v
  Tokens q, k, v;
  Bias bias;
  const void* slopes;  // null: none
  Type slopes_type;
  int64_t slopes_n, slopes_h;
  const int32_t *cu_q, *cu_k;
  const int32_t* lengths;  // (N,) keys that exist, or null
  int64_t seed;
  double dropout;
  double scale, softcap;
  bool causal;
  int64_t left, right;  // of the window; negative: none

  int64_t rows() const { return cu_q ? 1 : N; }
};

// Written whole, dense.
struct Results {
  void* out;  // (rows, queries, query_heads, D)
  void* lse;  // (rows, query_heads, queries) of R
};

struct Backward {
  Tokens out, grad_out;                    // grad_out.data null: zeros
  const void *lse, *grad_lse;              // dense, of R; grad_lse null: zeros
  void *dq, *dk, *dv;                      // written whole, dense
  void* dbias;                             // likewise, of the bias' type; null: not wanted
  int64_t bias_n, bias_h, bias_i, bias_j;  // its sizes
};

}  // namespace fastseq::attention

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                                \
  namespace isa::attention {                                                                                \
  void forward(const fastseq::attention::Problem&, const fastseq::attention::Results&, const ParallelFor&); \
  void backward(const fastseq::attention::Problem&, const fastseq::attention::Backward&,                    \
                const ParallelFor&);                                                                        \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
