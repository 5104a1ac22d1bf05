// The torch ops fastseq_cpu::attention and attention_grad: tensors to raw pointers, and what only their
// numbers can show to be wrong.
#include <optional>
#include <tuple>
#include <vector>

#include "../common/torch_cpu.h"
#include "dot_product.h"

namespace {

using namespace fastseq;
using attention::Problem;
using Optional = std::optional<Tensor>;

std::string text(int64_t n) { return std::to_string(n); }

bool is_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == sizes.begin()[i];
  return same;
}

// The tensors, with the shapes and types of the contract; those that had to be made dense are kept.
class Arguments {
 public:
  Problem problem{};
  ScalarType type, result_type;
  std::vector<int64_t> bias_sizes;

  Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& slopes,
            const Optional& cu_q, const Optional& cu_k, const Optional& lengths, const Optional& seed,
            int64_t max_q, int64_t max_k, double scale, bool causal, int64_t left, int64_t right,
            double softcap, double dropout)
      : type(q.scalar_type()),
        result_type(type == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    Problem& p = problem;
    p.type = type_of(q, "q");
    check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: wanted 4 dimensions");
    p.queries = q.size(1), p.query_heads = q.size(2), p.D = q.size(3), p.keys = k.size(1);
    p.key_heads = k.size(2);
    check(k.size(0) == q.size(0) && k.size(3) == p.D && k.scalar_type() == type,
          "k: wanted (B,Sk,Hk,D) of q's B, D and dtype");
    check(is_shape(v, {k.size(0), p.keys, p.key_heads, p.D}) && v.scalar_type() == type,
          "v: wanted the shape and dtype of k");
    check(p.D >= 1, "q: wanted a head size of 1 or more");
    check(p.key_heads ? p.query_heads % p.key_heads == 0 : p.query_heads == 0,
          "k: wanted a number of heads that divides q's " + text(p.query_heads));
    p.N = q.size(0);
    check(bool(cu_q) == bool(cu_k), "cu_seqlens_q, cu_seqlens_k: wanted both or none");
    if (cu_q) {
      check(q.size(0) == 1, "q: wanted B = 1 for packed sequences, got " + text(q.size(0)));
      p.N = cu_q->dim() == 1 ? cu_q->size(0) - 1 : -1;
      p.cu_q = offsets(*cu_q, "cu_seqlens_q", p.queries, "max_q", max_q);
      p.cu_k = offsets(*cu_k, "cu_seqlens_k", p.keys, "max_k", max_k);
    } else {
      check(max_q >= p.queries && max_k >= p.keys, "max_q, max_k: wanted the lengths of q and k, or more");
    }
    if (lengths) set_lengths(*lengths);
    p.q = tokens(q), p.k = tokens(k), p.v = tokens(v);
    if (bias) set_bias(*bias, max_q, max_k);
    if (slopes) set_slopes(*slopes);
    check(dropout >= 0 && dropout < 1, "dropout: wanted 0 <= dropout < 1, got " + std::to_string(dropout));
    p.dropout = dropout;
    if (dropout > 0) {
      check(seed && seed->scalar_type() == ScalarType::Long && is_shape(*seed, {1}),
            "seed: wanted int64 (1,) where dropout > 0");
      p.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
    }
    p.scale = scale, p.softcap = softcap, p.causal = causal, p.left = left, p.right = right;
  }

  attention::Tokens tokens(const Tensor& t) {
    const Tensor& dense = keep(t, t.stride(3) == 1 || t.size(3) == 1);
    return {dense.const_data_ptr(), dense.stride(0), dense.stride(1), dense.stride(2)};
  }

  // Dense, of the type of lse.
  const void* rows(const Tensor& t, const char* name) {
    check(
        t.scalar_type() == result_type && is_shape(t, {problem.rows(), problem.query_heads, problem.queries}),
        std::string(name) + ": wanted (B,Hq,Sq) of the type of the results");
    return keep(t, t.is_contiguous()).const_data_ptr();
  }

  attention::Tokens outputs(const Tensor& t, const char* name) {
    check(t.scalar_type() == type &&
              is_shape(t, {problem.rows(), problem.queries, problem.query_heads, problem.D}),
          std::string(name) + ": wanted the shape and dtype of q");
    return tokens(t);
  }

 private:
  const Tensor& keep(const Tensor& t, bool as_it_is) {
    kept.push_back(as_it_is ? t : torch::stable::contiguous(t));
    return kept.back();
  }

  const int32_t* integers(const Tensor& t, const char* name, int64_t count) {
    check(t.scalar_type() == ScalarType::Int && count >= 0 && is_shape(t, {count}),
          std::string(name) + ": wanted int32 (" + text(count < 0 ? 1 : count) + ",)");
    return static_cast<const int32_t*>(keep(t, t.is_contiguous()).const_data_ptr());
  }

  const int32_t* offsets(const Tensor& t, const char* name, int64_t tokens, const char* most_name,
                         int64_t most) {
    check(problem.N >= 0, std::string(name) + ": wanted int32 (N+1,)");
    const int32_t* cu = integers(t, name, problem.N + 1);
    check(cu[0] >= 0 && cu[problem.N] <= tokens, std::string(name) + ": wanted offsets from 0 to " +
                                                     text(tokens) + ", got " + text(cu[0]) + " to " +
                                                     text(cu[problem.N]));
    for (int64_t n = 0; n < problem.N; ++n) {
      const int64_t length = int64_t(cu[n + 1]) - cu[n];
      check(length >= 0, std::string(name) + ": wanted offsets that never fall, got " + text(cu[n]) +
                             " before " + text(cu[n + 1]));
      check(length <= most, std::string(name) + ": got a sequence of " + text(length) + " tokens, wanted " +
                                most_name + " = " + text(most) + " at most");
    }
    return cu;
  }

  void set_lengths(const Tensor& t) {
    Problem& p = problem;
    p.lengths = integers(t, "key_lengths", p.N);
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t whole = p.cu_k ? p.cu_k[n + 1] - p.cu_k[n] : p.keys;
      check(p.lengths[n] >= 0 && p.lengths[n] <= whole, "key_lengths: got " + text(p.lengths[n]) +
                                                            " for sequence " + text(n) + ", wanted 0 to " +
                                                            text(whole));
    }
  }

  void set_bias(const Tensor& t, int64_t max_q, int64_t max_k) {
    const int64_t sizes[4] = {problem.N, problem.query_heads, max_q, max_k};
    check(t.dim() == 4, "bias: wanted 4 dimensions, got " + text(t.dim()));
    check(t.scalar_type() == type || t.scalar_type() == result_type,
          "bias: wanted the dtype of q, or that of the results");
    for (int64_t i = 0; i < 4; ++i) {
      check(t.size(i) == sizes[i] || t.size(i) == 1,
            "bias: got " + text(t.size(i)) + " in dimension " + text(i) + ", wanted 1 or " + text(sizes[i]));
      bias_sizes.push_back(t.size(i));
    }
    const Tensor& b = keep(t, t.stride(3) == 1 || t.stride(3) == 0 || t.size(3) == 1);
    const auto stride = [&](int64_t i) { return b.size(i) == 1 ? 0 : b.stride(i); };
    problem.bias = {b.const_data_ptr(), type_of(t, "bias"), stride(0), stride(1), stride(2), stride(3)};
  }

  void set_slopes(const Tensor& t) {
    check(is_shape(t, {problem.query_heads}) || is_shape(t, {problem.N, problem.query_heads}),
          "slopes: wanted (Hq,) or (N,Hq)");
    problem.slopes = t.const_data_ptr(), problem.slopes_type = type_of(t, "slopes");
    problem.slopes_n = t.dim() == 2 ? t.stride(0) : 0, problem.slopes_h = t.stride(t.dim() - 1);
  }

  std::vector<Tensor> kept;
};

#define ATTENTION_PARAMETERS                                                                                \
  const Tensor &q, const Tensor &k, const Tensor &v, const Optional &bias, const Optional &slopes,          \
      const Optional &cu_q, const Optional &cu_k, const Optional &lengths, const Optional &seed,            \
      int64_t max_q, int64_t max_k, double scale, bool causal, int64_t left, int64_t right, double softcap, \
      double dropout
#define ATTENTION_ARGUMENTS \
  q, k, v, bias, slopes, cu_q, cu_k, lengths, seed, max_q, max_k, scale, causal, left, right, softcap, dropout

std::tuple<Tensor, Tensor> attend(ATTENTION_PARAMETERS) {
  const Arguments in(ATTENTION_ARGUMENTS);
  const Problem& p = in.problem;
  Tensor out = empty(q, {p.rows(), p.queries, p.query_heads, p.D}, in.type);
  Tensor lse = empty(q, {p.rows(), p.query_heads, p.queries}, in.result_type);
  FASTSEQ_SELECT(attention::forward)(p, {out.mutable_data_ptr(), lse.mutable_data_ptr()}, torch_threads);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_grad(const Optional& grad_out, const Optional& grad_lse,
                                                       const Tensor& out, const Tensor& lse,
                                                       ATTENTION_PARAMETERS, bool bias_grad) {
  Arguments in(ATTENTION_ARGUMENTS);
  const Problem& p = in.problem;
  attention::Backward b{};
  b.out = in.outputs(out, "out"), b.lse = in.rows(lse, "lse");
  if (grad_out) b.grad_out = in.outputs(*grad_out, "grad_out");
  if (grad_lse) b.grad_lse = in.rows(*grad_lse, "grad_lse");
  Tensor dq = empty(q, {p.rows(), p.queries, p.query_heads, p.D}, in.type);
  Tensor dk = empty(q, {p.rows(), p.keys, p.key_heads, p.D}, in.type);
  Tensor dv = empty(q, {p.rows(), p.keys, p.key_heads, p.D}, in.type);
  const std::vector<int64_t>& sizes = in.bias_sizes;
  Tensor dbias = bias && bias_grad ? empty(q, {sizes[0], sizes[1], sizes[2], sizes[3]}, bias->scalar_type())
                                   : empty(q, {0}, bias ? bias->scalar_type() : in.result_type);
  b.dq = dq.mutable_data_ptr(), b.dk = dk.mutable_data_ptr(), b.dv = dv.mutable_data_ptr();
  if (bias && bias_grad && sizes[0] * sizes[1] * sizes[2] * sizes[3] > 0) {
    b.dbias = dbias.mutable_data_ptr();
    b.bias_n = sizes[0], b.bias_h = sizes[1], b.bias_i = sizes[2], b.bias_j = sizes[3];
  }
  FASTSEQ_SELECT(attention::backward)(p, b, torch_threads);
  return {dq, dk, dv, dbias};
}

}  // namespace

#define ATTENTION                                                                                         \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? cu_seqlens_q, Tensor? "            \
  "cu_seqlens_k, Tensor? key_lengths, Tensor? seed, int max_q, int max_k, float scale, bool causal, int " \
  "window_left, int window_right, float softcap, float dropout"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def("attention(" ATTENTION ") -> (Tensor, Tensor)");
  m.def("attention_grad(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " ATTENTION
        ", bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attend));
  m.impl("attention_grad", TORCH_BOX(&attend_grad));
}
