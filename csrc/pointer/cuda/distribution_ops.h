// The ops pointer_distribution and pointer_distribution_grad on CUDA tensors: tensors to raw pointers and
// back. Nothing waits for the device, and what is allocated depends on shapes alone. Registered by
// register_distribution.cu, and for CPU tensors in the emulator by testing/emulator_register.cpp.
#pragma once
#include <limits>
#include <tuple>

#include "../../common/torch_cuda.h"
#include "../distribution_arguments.h"
#include "distribution.h"

namespace fastseq::pointer::cuda {

template <class E>
Rows<E> rows(const Tensor& t) {
  return {static_cast<const E*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

// The arguments of one call, as the kernels take them.
template <class S, class R>
struct MixtureCall : MixtureArguments<R> {
  template <class... Arguments>
  explicit MixtureCall(const Arguments&... arguments) : MixtureArguments<R>(arguments...) {
    const auto& in = *this;
    constexpr int64_t kMost = std::numeric_limits<int>::max() - 4096;  // a thread looks some words ahead
    check(
        in.B <= kMost && in.T <= kMost && in.B * in.T <= kMost && in.V <= kMost - in.num_oov && in.S <= kMost,
        "logits: wanted fewer than 2^31 - 4096 rows, words and source positions");
    mixture = {int(in.B),
               int(in.T),
               int(in.V),
               int(in.S),
               int(in.num_oov),
               rows<S>(in.logits),
               rows<R>(in.attention),
               in.gate_data(),
               in.ids()};
  }
  Mixture<S, R> mixture;
};

inline Tensor pointer_distribution(const Tensor& logits, const Tensor& attention, const Tensor& gate,
                                   const Tensor& source_ids, int64_t num_oov) {
  const DeviceGuard guard(logits.get_device_index());
  return with_types(logits, "logits", [&](auto s, auto r) {
    using S = decltype(s);
    using R = decltype(r);
    const MixtureCall<S, R> call(logits, attention, gate, source_ids, num_oov);
    Tensor out = empty(gate, {call.B, call.T, call.V + num_oov}, call.kType),
           ids = empty(gate, {call.B, call.S}, ScalarType::Long),
           positions = empty(gate, {call.B, call.S}, ScalarType::Int),
           invalid = empty(gate, {call.B}, ScalarType::Byte);
    const SourceOrder order{data<int64_t>(ids), data<int>(positions), data<uint8_t>(invalid)};
    distribution<S, R>(call.mixture, order, data<R>(out), current_stream(logits.get_device_index()));
    check_launch("pointer_distribution");
    return out;
  });
}

inline std::tuple<Tensor, Tensor, Tensor> pointer_distribution_grad(const Tensor& grad, const Tensor& logits,
                                                                    const Tensor& attention,
                                                                    const Tensor& gate,
                                                                    const Tensor& source_ids,
                                                                    int64_t num_oov) {
  const DeviceGuard guard(logits.get_device_index());
  return with_types(logits, "logits", [&](auto s, auto r) -> std::tuple<Tensor, Tensor, Tensor> {
    using S = decltype(s);
    using R = decltype(r);
    const MixtureCall<S, R> call(logits, attention, gate, source_ids, num_oov);
    const Tensor g = call.output_grad(grad);
    Tensor to_logits = empty(logits, {call.B, call.T, call.V}, logits.scalar_type()),
           to_attention = empty(gate, {call.B, call.T, call.S}, call.kType),
           to_gate = empty(gate, {call.B, call.T}, call.kType);
    const MixtureGradients<S, R> to{data<S>(to_logits), data<R>(to_attention), data<R>(to_gate)};
    distribution_grad<S, R>(call.mixture, rows<R>(g), to, current_stream(logits.get_device_index()));
    check_launch("pointer_distribution_grad");
    return {to_logits, to_attention, to_gate};
  });
}

}  // namespace fastseq::pointer::cuda

// Defines the ops in a library's namespace, and registers them for a dispatch key of torch.
#define FASTSEQ_DISTRIBUTION_OPS(library, key)                                                          \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) {                                                           \
    m.def(POINTER_DISTRIBUTION);                                                                        \
    m.def(POINTER_DISTRIBUTION_GRAD);                                                                   \
  }                                                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                                          \
    m.impl("pointer_distribution", TORCH_BOX(&fastseq::pointer::cuda::pointer_distribution));           \
    m.impl("pointer_distribution_grad", TORCH_BOX(&fastseq::pointer::cuda::pointer_distribution_grad)); \
  }
