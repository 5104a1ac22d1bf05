// The torch ops fastseq_cpu::pointer_distribution, its gradient, and pointer_topk_rows: tensors to raw
// pointers and back, nothing else.
#include <optional>
#include <tuple>

#include "../common/torch_cpu.h"
#include "distribution.h"
#include "distribution_arguments.h"

namespace {

using namespace fastseq;
using namespace fastseq::pointer;
using crf::Type;

// The arguments as the kernels take them.
template <class R>
struct Inputs : MixtureArguments<R> {
  template <class... Arguments>
  explicit Inputs(const Arguments&... arguments) : MixtureArguments<R>(arguments...) {
    const int64_t *ids = this->ids(), words = this->V + this->num_oov;
    for (int64_t n = 0; n < this->B * this->S; ++n)
      check(ids[n] < words, "source_ids: got " + std::to_string(ids[n]) +
                                ", wanted ids below V + num_oov = " + std::to_string(words));
  }

  Mixture<R> mixture() const {
    const Tensor &z = this->logits, &a = this->attention;
    return {{z.const_data_ptr(), type_of(z, "logits"), this->B, this->T, this->V, z.stride(0), z.stride(1)},
            this->attention_data(),
            a.stride(0),
            a.stride(1),
            this->gate_data(),
            this->ids(),
            this->S,
            this->num_oov};
  }
};

Tensor pointer_distribution(const Tensor& logits, const Tensor& attention, const Tensor& gate,
                            const Tensor& source_ids, int64_t num_oov) {
  return with_arithmetic(logits, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(logits, attention, gate, source_ids, num_oov);
    Tensor out = empty(gate, {in.B, in.T, in.V + num_oov}, in.kType);
    FASTSEQ_SELECT(pointer_distribution<R>)(in.mixture(), data<R>(out), torch_threads);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> pointer_distribution_grad(const Tensor& grad, const Tensor& logits,
                                                             const Tensor& attention, const Tensor& gate,
                                                             const Tensor& source_ids, int64_t num_oov) {
  return with_arithmetic(logits, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using R = decltype(zero);
    const Inputs<R> in(logits, attention, gate, source_ids, num_oov);
    const Tensor g = in.output_grad(grad);
    Tensor to_logits = empty(logits, {in.B, in.T, in.V}, logits.scalar_type()),
           to_attention = empty(gate, {in.B, in.T, in.S}, in.kType),
           to_gate = empty(gate, {in.B, in.T}, in.kType);
    FASTSEQ_SELECT(pointer_distribution_grad<R>)
    (in.mixture(), static_cast<const R*>(g.const_data_ptr()), g.stride(0), g.stride(1),
     {to_logits.mutable_data_ptr(), data<R>(to_attention), data<R>(to_gate)}, torch_threads);
    return {to_logits, to_attention, to_gate};
  });
}

std::tuple<Tensor, Tensor> pointer_topk_rows(const Tensor& logits, const std::optional<Tensor>& bias,
                                             const Tensor& attention, const Tensor& gate,
                                             const Tensor& source_ids, int64_t begin, int64_t k) {
  return with_arithmetic(gate, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using R = decltype(zero);
    constexpr ScalarType type = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;
    check(logits.dim() == 2 && attention.dim() == 3 && gate.dim() == 2 && source_ids.dim() == 2 &&
              (!bias || (bias->dim() == 1 && bias->scalar_type() == type)) &&
              attention.scalar_type() == type && source_ids.scalar_type() == ScalarType::Long,
          "logits, bias, attention, gate, source_ids: wanted (N,V), (V,), (B,T,S), (B,T), (B,S)");
    const int64_t N = logits.size(0), V = logits.size(1), B = gate.size(0), T = gate.size(1),
                  S = source_ids.size(1);
    check(attention.size(0) == B && attention.size(1) == T && attention.size(2) == S &&
              source_ids.size(0) == B && (!bias || bias->size(0) == V) && begin + N <= B * T,
          "attention, gate, source_ids, bias: wanted (B,T,S), (B,T), (B,S), (V,)");
    check(k >= 1 && k <= V, "k: got " + std::to_string(k) + ", wanted 1 to V = " + std::to_string(V));
    const Tensor z = torch::stable::contiguous(logits), a = torch::stable::contiguous(attention),
                 g = torch::stable::contiguous(gate), ids = torch::stable::contiguous(source_ids);
    const Tensor offset = bias ? torch::stable::contiguous(*bias) : gate;
    Tensor values = empty(gate, {N, k}, type), words = empty(gate, {N, k}, ScalarType::Long);
    const Candidates<R> candidates{z.const_data_ptr(),
                                   type_of(z, "logits"),
                                   bias ? static_cast<const R*>(offset.const_data_ptr()) : nullptr,
                                   static_cast<const R*>(a.const_data_ptr()),
                                   static_cast<const R*>(g.const_data_ptr()),
                                   static_cast<const int64_t*>(ids.const_data_ptr()),
                                   begin,
                                   N,
                                   B,
                                   T,
                                   S,
                                   V};
    FASTSEQ_SELECT(pointer_topk<R>)(candidates, k, data<R>(values), data<int64_t>(words), torch_threads);
    return {values, words};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def(POINTER_DISTRIBUTION);
  m.def(POINTER_DISTRIBUTION_GRAD);
  m.def(
      "pointer_topk_rows(Tensor logits, Tensor? bias, Tensor attention, Tensor gate, Tensor source_ids, "
      "int begin, int k) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_cpu, CPU, m) {
  m.impl("pointer_distribution", TORCH_BOX(&pointer_distribution));
  m.impl("pointer_distribution_grad", TORCH_BOX(&pointer_distribution_grad));
  m.impl("pointer_topk_rows", TORCH_BOX(&pointer_topk_rows));
}
