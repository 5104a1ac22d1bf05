// The ops crf_nll, crf_nll_grad and crf_viterbi on CUDA tensors: tensors to raw pointers and back. Nothing
// waits for the device, and what is allocated depends on shapes alone. Registered by register.cu, and for CPU
// tensors in the emulator by testing/emulator_register.cpp.
#pragma once
#include <limits>
#include <tuple>

#include "../../common/torch_cuda.h"
#include "../arguments.h"
#include "kernels.h"

namespace fastseq::crf::cuda {

// The arguments of one call, as the kernels take them; what happens on the device goes to `stream`.
template <class S, class R>
class Call : public Arguments<R> {
 public:
  Call(const Tensor& emissions_, const std::optional<Tensor>& tags_, const std::optional<Tensor>& mask_,
       const Tensor& transitions_, const Tensor& start_, const Tensor& end_,
       const std::optional<Tensor>& weights_ = std::nullopt, double scale = 1.0)
      : Arguments<R>(emissions_, tags_, mask_, transitions_, start_, end_),
        weights(this->row_weights(weights_)),
        stream(current_stream(emissions_.get_device_index())) {
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    check(this->B <= kMost && this->T <= kMost && this->K <= kMaxTags,
          "emissions: wanted (B,T,K) with K <= " + std::to_string(kMaxTags) +
              ", got K = " + std::to_string(this->K));
    batch = {int(this->B),
             int(this->T),
             int(this->K),
             plane<S>(this->emissions),
             this->tags ? plane<int64_t>(*this->tags) : Plane<int64_t>{},
             this->mask ? plane<bool>(*this->mask) : Plane<bool>{},
             this->transitions_data(),
             this->start_data(),
             this->end_data(),
             weights ? static_cast<const R*>(weights->const_data_ptr()) : nullptr,
             scale};
  }

  std::optional<Tensor> weights;
  cudaStream_t stream;
  Batch<S, R> batch;

 private:
  template <class E>
  static Plane<E> plane(const Tensor& t) {
    return {static_cast<const E*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
  }
};

inline Tensor crf_nll(const Tensor& emissions, const std::optional<Tensor>& tags,
                      const std::optional<Tensor>& mask, const Tensor& transitions, const Tensor& start,
                      const Tensor& end) {
  const DeviceGuard guard(emissions.get_device_index());
  return with_types(emissions, "emissions", [&](auto s, auto r) {
    using S = decltype(s);
    using R = decltype(r);
    const Call<S, R> call(emissions, tags, mask, transitions, start, end);
    Tensor out = empty(start, {call.B}, call.kType);
    Tensor workspace = empty(start, {nll_workspace(call.batch, false)}, ScalarType::Byte);
    nll<S, R>(call.batch, data<R>(out), nullptr, data<char>(workspace), call.stream);
    check_launch("crf_nll");
    return out;
  });
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Grads crf_nll_grad(const Tensor& emissions, const std::optional<Tensor>& tags,
                          const std::optional<Tensor>& mask, const Tensor& transitions, const Tensor& start,
                          const Tensor& end, const std::optional<Tensor>& weights, double scale) {
  const DeviceGuard guard(emissions.get_device_index());
  return with_types(emissions, "emissions", [&](auto s, auto r) -> Grads {
    using S = decltype(s);
    using R = decltype(r);
    const Call<S, R> call(emissions, tags, mask, transitions, start, end, weights, scale);
    Tensor total = empty(start, {}, call.kType), values = empty(start, {call.B}, call.kType),
           ga = empty(start, {call.K, call.K}, call.kType), gs = empty(start, {call.K}, call.kType),
           ge = empty(start, {call.K}, call.kType),
           workspace = empty(start, {nll_workspace(call.batch, true)}, ScalarType::Byte);
    EmissionGradient gx(emissions);
    const Gradient<S> rows{data<S>(gx.rows()), gx.rows().stride(0), gx.rows().stride(1)};
    const Gradients<S, R> gradients{rows, data<R>(total), data<R>(ga), data<R>(gs), data<R>(ge)};
    nll<S, R>(call.batch, data<R>(values), &gradients, data<char>(workspace), call.stream);
    check_launch("crf_nll_grad");
    return {total, gx.take(), ga, gs, ge};
  });
}

inline std::tuple<Tensor, Tensor> crf_viterbi(const Tensor& emissions, const std::optional<Tensor>& mask,
                                              const Tensor& transitions, const Tensor& start,
                                              const Tensor& end) {
  const DeviceGuard guard(emissions.get_device_index());
  return with_types(emissions, "emissions", [&](auto s, auto r) -> std::tuple<Tensor, Tensor> {
    using S = decltype(s);
    using R = decltype(r);
    const Call<S, R> call(emissions, std::nullopt, mask, transitions, start, end);
    Tensor paths = empty(start, {call.B, call.T}, ScalarType::Long),
           scores = empty(start, {call.B}, call.kType),
           workspace = empty(start, {viterbi_workspace(call.batch)}, call.kType);
    viterbi<S, R>(call.batch, data<int64_t>(paths), data<R>(scores), data<R>(workspace), call.stream);
    check_launch("crf_viterbi");
    return {paths, scores};
  });
}

}  // namespace fastseq::crf::cuda

// Defines the ops in a library's namespace, and registers them for a dispatch key of torch.
#define FASTSEQ_CRF_OPS(library, key)                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) {                             \
    m.def(CRF_NLL);                                                       \
    m.def(CRF_NLL_GRAD);                                                  \
    m.def(CRF_VITERBI);                                                   \
  }                                                                       \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                            \
    m.impl("crf_nll", TORCH_BOX(&fastseq::crf::cuda::crf_nll));           \
    m.impl("crf_nll_grad", TORCH_BOX(&fastseq::crf::cuda::crf_nll_grad)); \
    m.impl("crf_viterbi", TORCH_BOX(&fastseq::crf::cuda::crf_viterbi));   \
  }
