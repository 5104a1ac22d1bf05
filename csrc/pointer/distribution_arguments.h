// What the registrations of the distribution ops share, for every device: the arguments, checked.
#pragma once
#include <string>
#include <type_traits>

#include "../common/torch_tensor.h"

namespace fastseq::pointer {

// t with its last dimension dense.
inline Tensor dense(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}

// The tensors, with the shapes and types of the contract: gate and source_ids contiguous, the others with
// dense rows. R is double or float.
template <class R>
struct MixtureArguments {
  static constexpr ScalarType kType = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

  MixtureArguments(const Tensor& logits_, const Tensor& attention_, const Tensor& gate_,
                   const Tensor& source_ids_, int64_t num_oov_)
      : logits(wanted(logits_, "logits", "(B,T,V)", 3, logits_.scalar_type())),
        attention(wanted(attention_, "attention", "(B,T,S)", 3, kType)),
        gate(torch::stable::contiguous(wanted(gate_, "gate", "(B,T)", 2, kType))),
        source_ids(
            torch::stable::contiguous(wanted(source_ids_, "source_ids", "(B,S)", 2, ScalarType::Long))),
        B(logits.size(0)),
        T(logits.size(1)),
        V(logits.size(2)),
        S(source_ids.size(1)),
        num_oov(num_oov_) {
    check(V >= 1, "logits: wanted (B,T,V) with at least one word, got V = 0");
    check(num_oov >= 0, "num_oov: wanted at least 0, got " + std::to_string(num_oov));
    check(attention.size(0) == B && attention.size(1) == T && attention.size(2) == S && gate.size(0) == B &&
              gate.size(1) == T && source_ids.size(0) == B,
          "attention, gate, source_ids: wanted (B,T,S), (B,T), (B,S) with B = " + std::to_string(B) +
              ", T = " + std::to_string(T) + " as in logits");
  }

  const R* attention_data() const { return static_cast<const R*>(attention.const_data_ptr()); }
  const R* gate_data() const { return static_cast<const R*>(gate.const_data_ptr()); }
  const int64_t* ids() const { return static_cast<const int64_t*>(source_ids.const_data_ptr()); }

  // `grad`, checked.
  Tensor output_grad(const Tensor& grad) const {
    Tensor g = wanted(grad, "grad", "(B,T,V+num_oov)", 3, kType);
    check(g.size(0) == B && g.size(1) == T && g.size(2) == V + num_oov,
          "grad: wanted (B,T,V+num_oov) as of logits and num_oov");
    return g;
  }

  Tensor logits, attention, gate, source_ids;
  int64_t B, T, V, S, num_oov;

 private:
  static Tensor wanted(const Tensor& t, const char* name, const char* letters, int64_t dim, ScalarType type) {
    check(t.dim() == dim && t.scalar_type() == type,
          std::string(name) + ": wanted " + letters +
              (type == ScalarType::Long     ? " of int64"
               : type == ScalarType::Double ? " of float64"
                                            : " of float32 for these logits"));
    return dense(t);
  }
};

}  // namespace fastseq::pointer

// The schemas, less the namespace of the library.
#define POINTER_ROWS "Tensor logits, Tensor attention, Tensor gate, Tensor source_ids, int num_oov"
#define POINTER_DISTRIBUTION "pointer_distribution(" POINTER_ROWS ") -> Tensor"
#define POINTER_DISTRIBUTION_GRAD \
  "pointer_distribution_grad(Tensor grad, " POINTER_ROWS ") -> (Tensor, Tensor, Tensor)"
