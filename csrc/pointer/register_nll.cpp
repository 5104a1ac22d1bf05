// The torch ops fastseq_cpu::pointer_nll and pointer_nll_grad: tensors to raw pointers and back, nothing
// else.
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/torch_cpu.h"
#include "nll.h"

namespace {

using namespace fastseq;
using namespace fastseq::pointer;

Tensor rows_dense(const Tensor& t, const char* name) {
  check(t.dim() == 3, std::string(name) + ": wanted 3 dimensions, got " + std::to_string(t.dim()));
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class R>
const R* read(const Tensor& t) {
  return static_cast<const R*>(t.const_data_ptr());
}

// The tensors, with the shapes and types of the contract.
template <class R>
struct Arguments {
  static constexpr ScalarType kType = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

  Arguments(const Tensor& hidden_, const Tensor& weight_, const std::optional<Tensor>& bias_,
            const Tensor& copy_, const std::optional<Tensor>& gate_, const Tensor& source_,
            const Tensor& target_, int64_t ignore_index, double smoothing, double z_loss)
      : hidden(rows_dense(hidden_, "hidden")),
        weight(dense(weight_)),
        copy(rows_dense(copy_, "copy")),
        source(source_),
        target(target_),
        gate(gate_) {
    const int64_t B = hidden.size(0), T = hidden.size(1), H = hidden.size(2), S = copy.size(2);
    check(weight.dim() == 2 && weight.size(1) == H && weight.size(0) >= 1,
          "weight: wanted (V,H) with H = " + std::to_string(H) + " as in hidden, and at least one word");
    check(weight.scalar_type() == kType || weight.scalar_type() == hidden.scalar_type(),
          "weight: wanted the dtype of hidden, or that of the results");
    check(copy.size(0) == B && copy.size(1) == T && copy.scalar_type() == kType,
          "copy: wanted (B,T,S) of the type of the results, B and T as in hidden");
    check(source.dim() == 2 && source.size(0) == B && source.size(1) == S &&
              source.scalar_type() == ScalarType::Long,
          "source_ids: wanted int64 (B,S), S as in copy");
    check(is_matrix(target, B, T, ScalarType::Long), "target_ids: wanted int64 (B,T) as in hidden");
    if (bias_) {
      check(bias_->dim() == 1 && bias_->size(0) == weight.size(0) && bias_->scalar_type() == kType,
            "bias: wanted (V,) of the type of the results");
      bias = dense(*bias_);
    }
    check(!gate || is_matrix(*gate, B, T, kType), "gate: wanted (B,T) of the type of the results");
    check(gate || (smoothing == 0 && z_loss == 0), "label_smoothing, z_loss: wanted 0 without a gate");
    problem = {B,
               T,
               S,
               weight.size(0),
               H,
               hidden.const_data_ptr(),
               type_of(hidden, "hidden"),
               hidden.stride(0),
               hidden.stride(1),
               weight.const_data_ptr(),
               type_of(weight, "weight"),
               bias ? read<R>(*bias) : nullptr,
               read<R>(copy),
               copy.stride(0),
               copy.stride(1),
               gate ? read<R>(*gate) : nullptr,
               gate ? gate->stride(0) : 0,
               gate ? gate->stride(1) : 0,
               read<int64_t>(source),
               source.stride(0),
               source.stride(1),
               read<int64_t>(target),
               target.stride(0),
               target.stride(1),
               ignore_index,
               smoothing,
               z_loss};
    check_targets();
  }

  static bool is_matrix(const Tensor& t, int64_t B, int64_t T, ScalarType type) {
    return t.dim() == 2 && t.size(0) == B && t.size(1) == T && t.scalar_type() == type;
  }

  Tensor hidden, weight, copy, source, target;
  std::optional<Tensor> bias, gate;
  Nll<R> problem;

 private:
  void check_targets() const {
    for (int64_t b = 0; b < problem.B; ++b) {
      for (int64_t t = 0; t < problem.T; ++t) {
        const int64_t y = problem.target[b * problem.target_b + t * problem.target_t];
        if (y < 0 && y != problem.ignore_index)
          check(false, "target_ids: got the id " + std::to_string(y) +
                           ", wanted 0 or more, or ignore_index = " + std::to_string(problem.ignore_index));
      }
    }
  }
};

Tensor pointer_nll(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& copy, const std::optional<Tensor>& gate, const Tensor& source,
                   const Tensor& target, int64_t ignore_index, double smoothing, double z_loss) {
  return with_arithmetic(hidden, [&](auto zero) {
    using R = decltype(zero);
    const Arguments<R> in(hidden, weight, bias, copy, gate, source, target, ignore_index, smoothing, z_loss);
    Tensor values = empty(hidden, {in.problem.B, in.problem.T}, in.kType);
    nll<R>(in.problem, data<R>(values), torch_threads);
    return values;
  });
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results pointer_nll_grad(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& copy, const std::optional<Tensor>& gate, const Tensor& source,
                         const Tensor& target, int64_t ignore_index, double smoothing, double z_loss,
                         const std::optional<Tensor>& weights) {
  return with_arithmetic(hidden, [&](auto zero) -> Results {
    using R = decltype(zero);
    const Arguments<R> in(hidden, weight, bias, copy, gate, source, target, ignore_index, smoothing, z_loss);
    const Nll<R>& p = in.problem;
    check(!weights || in.is_matrix(*weights, p.B, p.T, in.kType),
          "weights: wanted (B,T) of the type of the results");
    const std::optional<Tensor> w = weights ? std::optional<Tensor>(dense(*weights)) : std::nullopt;
    Tensor total = empty(hidden, {}, in.kType);
    Tensor grad_hidden = empty(hidden, {p.B, p.T, p.H}, hidden.scalar_type());
    Tensor grad_weight = empty(hidden, {p.V, p.H}, weight.scalar_type());
    Tensor grad_bias = empty(hidden, {bias ? p.V : 0}, in.kType);
    Tensor grad_copy = empty(hidden, {p.B, p.T, p.S}, in.kType);
    Tensor grad_gate = gate ? empty(hidden, {p.B, p.T}, in.kType) : empty(hidden, {0}, in.kType);
    nll_grad<R>(p,
                {w ? read<R>(*w) : nullptr, data<R>(total), grad_hidden.mutable_data_ptr(),
                 grad_weight.mutable_data_ptr(), data<R>(grad_bias), data<R>(grad_copy), data<R>(grad_gate)},
                torch_threads);
    return {total, grad_hidden, grad_weight, grad_bias, grad_copy, grad_gate};
  });
}

}  // namespace

#define POINTER_NLL                                                                                   \
  "Tensor hidden, Tensor weight, Tensor? bias, Tensor copy, Tensor? gate, Tensor source_ids, Tensor " \
  "target_ids, int ignore_index, float label_smoothing, float z_loss"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def("pointer_nll(" POINTER_NLL ") -> Tensor");
  m.def("pointer_nll_grad(" POINTER_NLL
        ", Tensor? weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_cpu, CPU, m) {
  m.impl("pointer_nll", TORCH_BOX(&pointer_nll));
  m.impl("pointer_nll_grad", TORCH_BOX(&pointer_nll_grad));
}
