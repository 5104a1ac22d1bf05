// The ops pointer_decoder and pointer_decoder_grad on CUDA tensors: tensors to raw pointers and back. Nothing
// waits for the device, and what is allocated depends on shapes alone. Registered by register_decoder.cu, and
// for CPU tensors in the emulator by testing/emulator_register.cpp.
#pragma once
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../common/torch_cuda.h"
#include "../../common/torch_tensor.h"
#include "decoder.h"

namespace fastseq::pointer::cuda {

using Shape = std::initializer_list<int64_t>;

// Checks tensors, makes them dense, and keeps them until the call is over.
template <class R>
class Dense {
 public:
  static constexpr ScalarType kType = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

  const R* operator()(const Tensor& t, const char* name, Shape shape) {
    check(t.scalar_type() == kType, std::string(name) + ": wanted " +
                                        (kType == ScalarType::Double ? "float64" : "float32") +
                                        ", as inputs");
    return static_cast<const R*>(keep(t, name, shape).const_data_ptr());
  }
  // Null where there is none.
  const R* operator()(const std::optional<Tensor>& t, const char* name, Shape shape) {
    return t ? (*this)(*t, name, shape) : nullptr;
  }
  const bool* mask(const std::optional<Tensor>& t, Shape shape) {
    if (!t) return nullptr;
    check(t->scalar_type() == ScalarType::Bool, "mask: wanted bool");
    return static_cast<const bool*>(keep(*t, "mask", shape).const_data_ptr());
  }

 private:
  const Tensor& keep(const Tensor& t, const char* name, Shape shape) {
    bool same = t.dim() == int64_t(shape.size());
    std::string wanted;
    for (size_t i = 0; i < shape.size(); ++i) {
      same = same && t.size(int64_t(i)) == shape.begin()[i];
      wanted += std::to_string(shape.begin()[i]) + ",";
    }
    check(same, std::string(name) + ": wanted shape (" + wanted + ")");
    return kept_.emplace_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  }

  std::vector<Tensor> kept_;
};

// The 16 inputs that both ops have.
struct DecoderTensors {
  const Tensor &inputs, &memory, &features;
  const std::optional<Tensor>& mask;
  const Tensor &hidden, &cell, &context, &coverage, &w_context, &w_ih, &w_hh, &bias, &w_query, &b_query;
  const std::optional<Tensor>& w_coverage;
  const Tensor& v;

  DecoderSizes sizes() const {
    check(inputs.dim() == 3 && memory.dim() == 3 && features.dim() == 3 && hidden.dim() == 2,
          "inputs, memory, features, hidden: wanted 3, 3, 3 and 2 dimensions");
    const int64_t B = inputs.size(0), Bm = memory.size(0), T = inputs.size(1), S = memory.size(1);
    const int64_t E = inputs.size(2), H = hidden.size(1), M = memory.size(2), A = features.size(2);
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    check(B == 0 || (Bm > 0 && B % Bm == 0), "memory: wanted a number of rows that divides that of inputs");
    check(H <= kMaxHidden && E <= kMaxEmbedding && M <= kMaxMemory && A <= kMaxAttention &&
              S <= kMaxPositions && B <= kMost && T <= kMost,
          "inputs: wanted H <= " + std::to_string(kMaxHidden) + ", E <= " + std::to_string(kMaxEmbedding) +
              ", M <= " + std::to_string(kMaxMemory) + ", A <= " + std::to_string(kMaxAttention) +
              ", S <= " + std::to_string(kMaxPositions));
    return {int(B), int(Bm), int(T), int(S), int(E), int(H), int(M), int(A)};
  }

  template <class R>
  DecoderInputs<R> dense(Dense<R>& as) const {
    const DecoderSizes n = sizes();
    return {n,
            as(inputs, "inputs", {n.B, n.T, n.E}),
            as(memory, "memory", {n.Bm, n.S, n.M}),
            as(features, "features", {n.Bm, n.S, n.A}),
            as.mask(mask, {n.Bm, n.S}),
            as(hidden, "hidden", {n.B, n.H}),
            as(cell, "cell", {n.B, n.H}),
            as(context, "context", {n.B, n.M}),
            as(coverage, "coverage", {n.B, n.S}),
            as(w_context, "w_context", {n.E, n.M}),
            as(w_ih, "w_ih", {4 * n.H, n.E}),
            as(w_hh, "w_hh", {4 * n.H, n.H}),
            as(bias, "bias", {4 * n.H}),
            as(w_query, "w_query", {n.A, 2 * n.H}),
            as(b_query, "b_query", {n.A}),
            as(w_coverage, "w_coverage", {n.A}),
            as(v, "v", {n.A})};
  }
};

// Calls f(R{}) with the element type of all tensors.
template <class F>
auto with_type(const Tensor& inputs, const F& f) {
  const ScalarType type = inputs.scalar_type();
  check(type == ScalarType::Double || type == ScalarType::Float, "inputs: wanted float64 or float32");
  return type == ScalarType::Double ? f(double{}) : f(float{});
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Seven decoder_outputs(const DecoderTensors& in) {
  return with_type(in.inputs, [&](auto zero) -> Seven {
    using R = decltype(zero);
    Dense<R> dense;
    const DecoderInputs<R> inputs = in.dense(dense);
    const DecoderSizes& n = inputs.sizes;
    const auto make = [&](Shape shape) { return empty(in.inputs, shape, Dense<R>::kType); };
    Tensor x = make({n.B, n.T, n.E}), hiddens = make({n.B, n.T, n.H}), cells = make({n.B, n.T, n.H}),
           contexts = make({n.B, n.T, n.M}), attention = make({n.B, n.T, n.S}), coverage = make({n.B, n.S}),
           loss = make({n.B, n.T}), spare = empty(in.inputs, {decoder_spare<R>(n)}, ScalarType::Byte);
    const DecoderOutputs<R> outputs{data<R>(x),         data<R>(hiddens),  data<R>(cells), data<R>(contexts),
                                    data<R>(attention), data<R>(coverage), data<R>(loss)};
    decoder(inputs, outputs, data<char>(spare), current_stream(in.inputs.get_device_index()));
    check_launch("pointer_decoder");
    return {x, hiddens, cells, contexts, attention, coverage, loss};
  });
}

// What arrives at the seven outputs, and the outputs that are read again.
using Arriving = std::array<std::reference_wrapper<const std::optional<Tensor>>, 7>;
struct DecoderKept {
  const Tensor &x, &hiddens, &cells, &attention;
};

using Eleven =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Eleven decoder_gradients(const Arriving& g, const DecoderTensors& in, const DecoderKept& kept) {
  return with_type(in.inputs, [&](auto zero) -> Eleven {
    using R = decltype(zero);
    Dense<R> as;
    const DecoderInputs<R> inputs = in.dense(as);
    const DecoderSizes& n = inputs.sizes;
    check(n.B == n.Bm, "memory: wanted as many rows as inputs has for a gradient");
    const DecoderArriving<R> arriving{
        as(g[0].get(), "grad_x", {n.B, n.T, n.E}),         as(g[1].get(), "grad_hiddens", {n.B, n.T, n.H}),
        as(g[2].get(), "grad_cells", {n.B, n.T, n.H}),     as(g[3].get(), "grad_contexts", {n.B, n.T, n.M}),
        as(g[4].get(), "grad_attention", {n.B, n.T, n.S}), as(g[5].get(), "grad_coverage", {n.B, n.S}),
        as(g[6].get(), "grad_coverage_loss", {n.B, n.T})};
    const DecoderSaved<R> saved{
        as(kept.x, "x", {n.B, n.T, n.E}), as(kept.hiddens, "hiddens", {n.B, n.T, n.H}),
        as(kept.cells, "cells", {n.B, n.T, n.H}), as(kept.attention, "attention", {n.B, n.T, n.S})};
    const auto make = [&](Shape shape) { return empty(in.inputs, shape, Dense<R>::kType); };
    Tensor d_inputs = make({n.B, n.T, n.E}), gates = make({n.B, n.T, 4 * n.H}), query = make({n.B, n.T, n.A}),
           memory = make({n.B, n.S, n.M}), features = make({n.B, n.S, n.A}), hidden = make({n.B, n.H}),
           cell = make({n.B, n.H}), context = make({n.B, n.M}), coverage = make({n.B, n.S}),
           w_coverage = make({inputs.w_coverage ? n.A : 0}), v = make({n.A});
    const DecoderGradients<R> gradients{data<R>(d_inputs), data<R>(gates),
                                        data<R>(query),    data<R>(memory),
                                        data<R>(features), data<R>(hidden),
                                        data<R>(cell),     data<R>(context),
                                        data<R>(coverage), inputs.w_coverage ? data<R>(w_coverage) : nullptr,
                                        data<R>(v)};
    Tensor queries = make({n.B, n.T, n.A}), contexts = make({n.B, n.T, n.M}), scores = make({n.B, n.T, n.S}),
           covered = make({n.B, n.T, n.S}), partials = make({decoder_owners(n), 2, n.A}),
           spare = empty(in.inputs, {decoder_grad_spare<R>(n)}, ScalarType::Byte);
    const DecoderScratch<R> scratch{data<R>(queries), data<R>(contexts), data<R>(scores), data<R>(covered),
                                    data<R>(partials)};
    decoder_grad(inputs, saved, arriving, gradients, scratch, data<char>(spare),
                 current_stream(in.inputs.get_device_index()));
    check_launch("pointer_decoder_grad");
    return {d_inputs, gates, query, memory, features, hidden, cell, context, coverage, w_coverage, v};
  });
}

using Optional = const std::optional<Tensor>&;

inline Seven pointer_decoder(const Tensor& inputs, const Tensor& memory, const Tensor& features,
                             Optional mask, const Tensor& hidden, const Tensor& cell, const Tensor& context,
                             const Tensor& coverage, const Tensor& w_context, const Tensor& w_ih,
                             const Tensor& w_hh, const Tensor& bias, const Tensor& w_query,
                             const Tensor& b_query, Optional w_coverage, const Tensor& v) {
  const DeviceGuard guard(inputs.get_device_index());
  return decoder_outputs({inputs, memory, features, mask, hidden, cell, context, coverage, w_context, w_ih,
                          w_hh, bias, w_query, b_query, w_coverage, v});
}

inline Eleven pointer_decoder_grad(Optional grad_x, Optional grad_hiddens, Optional grad_cells,
                                   Optional grad_contexts, Optional grad_attention, Optional grad_coverage,
                                   Optional grad_coverage_loss, const Tensor& inputs, const Tensor& memory,
                                   const Tensor& features, Optional mask, const Tensor& hidden,
                                   const Tensor& cell, const Tensor& context, const Tensor& coverage,
                                   const Tensor& w_context, const Tensor& w_ih, const Tensor& w_hh,
                                   const Tensor& bias, const Tensor& w_query, const Tensor& b_query,
                                   Optional w_coverage, const Tensor& v, const Tensor& x,
                                   const Tensor& hiddens, const Tensor& cells, const Tensor&,
                                   const Tensor& attention) {
  const DeviceGuard guard(inputs.get_device_index());
  return decoder_gradients(
      {grad_x, grad_hiddens, grad_cells, grad_contexts, grad_attention, grad_coverage, grad_coverage_loss},
      {inputs, memory, features, mask, hidden, cell, context, coverage, w_context, w_ih, w_hh, bias, w_query,
       b_query, w_coverage, v},
      {x, hiddens, cells, attention});
}

}  // namespace fastseq::pointer::cuda

#define POINTER_DECODER_INPUTS                                                                 \
  "Tensor inputs, Tensor memory, Tensor features, Tensor? mask, Tensor hidden, Tensor cell, "  \
  "Tensor context, Tensor coverage, Tensor w_context, Tensor w_ih, Tensor w_hh, Tensor bias, " \
  "Tensor w_query, Tensor b_query, Tensor? w_coverage, Tensor v"
#define POINTER_DECODER \
  "pointer_decoder(" POINTER_DECODER_INPUTS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
#define POINTER_DECODER_GRAD                                                                          \
  "pointer_decoder_grad(Tensor? grad_x, Tensor? grad_hiddens, Tensor? grad_cells, "                   \
  "Tensor? grad_contexts, Tensor? grad_attention, Tensor? grad_coverage, Tensor? "                    \
  "grad_coverage_loss, " POINTER_DECODER_INPUTS                                                       \
  ", Tensor x, Tensor hiddens, Tensor cells, Tensor contexts, Tensor attention) -> (Tensor, Tensor, " \
  "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

// Defines the ops in a library's namespace, and registers them for a dispatch key of torch.
#define FASTSEQ_DECODER_OPS(library, key)                                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) {                                                 \
    m.def(POINTER_DECODER);                                                                   \
    m.def(POINTER_DECODER_GRAD);                                                              \
  }                                                                                           \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                                \
    m.impl("pointer_decoder", TORCH_BOX(&fastseq::pointer::cuda::pointer_decoder));           \
    m.impl("pointer_decoder_grad", TORCH_BOX(&fastseq::pointer::cuda::pointer_decoder_grad)); \
  }
