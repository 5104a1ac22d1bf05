// What the registrations of the CRF ops share, for every device: the arguments, checked, as raw pointers.
#pragma once
#include <optional>
#include <type_traits>

#include "../common/torch_tensor.h"

namespace fastseq::crf {

// The tensors, with the shapes and types of the contract: emissions with dense tags, parameters contiguous.
template <class R>
struct Arguments {
  static constexpr ScalarType kType = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

  Arguments(const Tensor& emissions_, const std::optional<Tensor>& tags_, const std::optional<Tensor>& mask_,
            const Tensor& transitions_, const Tensor& start_, const Tensor& end_)
      : emissions(dense(emissions_)),
        tags(tags_),
        mask(mask_),
        transitions(parameter(transitions_, "transitions", 2)),
        start(parameter(start_, "start", 1)),
        end(parameter(end_, "end", 1)),
        B(emissions.size(0)),
        T(emissions.size(1)),
        K(emissions.size(2)) {
    check(K >= 1, "emissions: wanted (B,T,K) with at least one tag, got K = 0");
    check(transitions.size(0) == K && transitions.size(1) == K && start.size(0) == K && end.size(0) == K,
          "transitions, start, end: wanted (K,K), (K,), (K,) with K = " + std::to_string(K) +
              " as in emissions");
    if (tags)
      check(tags->scalar_type() == ScalarType::Long && tags->dim() == 2 && tags->size(0) == B &&
                tags->size(1) == T,
            "tags: wanted int64 (B,T) as in emissions");
    if (mask)
      check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == B &&
                mask->size(1) == T,
            "mask: wanted bool (B,T) as in emissions");
  }

  const R* transitions_data() const { return static_cast<const R*>(transitions.const_data_ptr()); }
  const R* start_data() const { return static_cast<const R*>(start.const_data_ptr()); }
  const R* end_data() const { return static_cast<const R*>(end.const_data_ptr()); }

  // `weights`, checked and contiguous.
  std::optional<Tensor> row_weights(const std::optional<Tensor>& weights) const {
    if (!weights) return std::nullopt;
    check(weights->dim() == 1 && weights->size(0) == B && weights->scalar_type() == kType,
          "weights: wanted (B,) of the type of the results, B = " + std::to_string(B));
    return torch::stable::contiguous(*weights);
  }

  Tensor emissions;
  std::optional<Tensor> tags, mask;
  Tensor transitions, start, end;
  int64_t B, T, K;

 private:
  static Tensor dense(const Tensor& emissions) {
    check(emissions.dim() == 3,
          "emissions: wanted 3 dimensions (B,T,K), got " + std::to_string(emissions.dim()));
    return emissions.stride(2) == 1 || emissions.size(2) <= 1 ? emissions
                                                              : torch::stable::contiguous(emissions);
  }

  static Tensor parameter(const Tensor& t, const char* name, int64_t dim) {
    check(t.dim() == dim && t.scalar_type() == kType,
          std::string(name) + ": wanted " + std::to_string(dim) + " dimensions of " +
              (kType == ScalarType::Double ? "float64" : "float32") + " for these emissions");
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }
};

// Where an emission gradient is written row by row: the tensor that is returned, which lies in memory as
// torch.empty_like(emissions) does, or, where its tags do not lie densely, one that is copied to it at the
// end.
class EmissionGradient {
 public:
  explicit EmissionGradient(const Tensor& emissions)
      : result_(torch::stable::empty_like(emissions)),
        rows_(result_.stride(2) == 1 || emissions.size(2) == 1
                  ? result_
                  : empty(emissions, {emissions.size(0), emissions.size(1), emissions.size(2)},
                          emissions.scalar_type())) {}
  Tensor& rows() { return rows_; }
  Tensor take() {
    if (rows_.const_data_ptr() != result_.const_data_ptr()) torch::stable::copy_(result_, rows_);
    return result_;
  }

 private:
  Tensor result_, rows_;
};

}  // namespace fastseq::crf

// The schemas, less the namespace of the library.
#define CRF_MODEL "Tensor emissions, Tensor? mask, Tensor transitions, Tensor start, Tensor end"
#define CRF_PATHS "Tensor emissions, Tensor? tags, Tensor? mask, Tensor transitions, Tensor start, Tensor end"
#define CRF_NLL "crf_nll(" CRF_PATHS ") -> Tensor"
#define CRF_NLL_GRAD \
  "crf_nll_grad(" CRF_PATHS ", Tensor? weights, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
#define CRF_VITERBI "crf_viterbi(" CRF_MODEL ") -> (Tensor, Tensor)"
