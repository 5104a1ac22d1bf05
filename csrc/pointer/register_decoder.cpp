// The torch ops fastseq_cpu::pointer_decoder and pointer_decoder_grad: tensors to raw pointers, nothing else.
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/torch_cpu.h"
#include "decoder.h"

namespace {

using namespace fastseq;
using namespace fastseq::pointer;
using Optional = std::optional<Tensor>;

// Keeps the tensors that had to be made contiguous for as long as the pointers are in use.
template <class R>
class Arguments {
 public:
  static constexpr ScalarType kType = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

  const R* get(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
    bool ok = t.scalar_type() == kType && t.dim() == int64_t(shape.size());
    std::string wanted = name;
    wanted += ": wanted (";
    for (size_t i = 0; i < shape.size(); ++i) {
      ok = ok && t.size(int64_t(i)) == shape.begin()[i];
      if (i) wanted += ",";
      wanted += std::to_string(shape.begin()[i]);
    }
    check(ok, wanted + ") of the type of inputs");
    kept.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return static_cast<const R*>(kept.back().const_data_ptr());
  }
  const R* get(const Optional& t, const char* name, std::initializer_list<int64_t> shape) {
    return t ? get(*t, name, shape) : nullptr;
  }

 private:
  std::vector<Tensor> kept;
};

SourcePositions positions_on(const Optional& mask, int64_t Bm, int64_t S) {
  SourcePositions on;
  if (mask)
    check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == Bm &&
              mask->size(1) == S,
          "mask: wanted bool (B,S) as in memory");
  const bool* flags = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const int64_t step_b = mask ? mask->stride(0) : 0, step_s = mask ? mask->stride(1) : 0;
  on.offset.push_back(0);
  for (int64_t b = 0; b < Bm; ++b) {
    for (int64_t s = 0; s < S; ++s)
      if (flags == nullptr || flags[b * step_b + s * step_s]) on.positions.push_back(int32_t(s));
    on.offset.push_back(int64_t(on.positions.size()));
  }
  return on;
}

#define DECODER_INPUTS                                                                         \
  const Tensor &inputs, const Tensor &memory, const Tensor &features, const Optional &mask,    \
      const Tensor &hidden, const Tensor &cell, const Tensor &context, const Tensor &coverage, \
      const Tensor &w_context, const Tensor &w_ih, const Tensor &w_hh, const Tensor &bias,     \
      const Tensor &w_query, const Tensor &b_query, const Optional &w_coverage, const Tensor &v
#define DECODER_ARGUMENTS                                                                                \
  inputs, memory, features, mask, hidden, cell, context, coverage, w_context, w_ih, w_hh, bias, w_query, \
      b_query, w_coverage, v

template <class R>
struct Inputs {
  Arguments<R> arguments;
  SourcePositions on;
  Decoder<R> decoder;

  explicit Inputs(DECODER_INPUTS)
      : on((check(inputs.dim() == 3, "inputs: wanted 3 dimensions (B,T,E)"),
            check(memory.dim() == 3, "memory: wanted 3 dimensions (B,S,M)"),
            check(features.dim() == 3, "features: wanted 3 dimensions (B,S,A)"),
            check(hidden.dim() == 2, "hidden: wanted 2 dimensions (B,H)"),
            positions_on(mask, memory.size(0), memory.size(1)))),
        decoder(make(DECODER_ARGUMENTS)) {}

 private:
  Decoder<R> make(DECODER_INPUTS) {  // the mask is in `on`
    static_cast<void>(mask);
    const int64_t B = inputs.size(0), T = inputs.size(1), E = inputs.size(2), Bm = memory.size(0),
                  S = memory.size(1), M = memory.size(2), A = features.size(2), H = hidden.size(1);
    check(B == Bm || (Bm > 0 && B % Bm == 0), "memory: wanted rows that divide the rows of inputs, got " +
                                                  std::to_string(Bm) + " for " + std::to_string(B));
    auto& a = arguments;
    return {B,
            Bm,
            T,
            S,
            E,
            H,
            M,
            A,
            on,
            a.get(inputs, "inputs", {B, T, E}),
            a.get(memory, "memory", {Bm, S, M}),
            a.get(features, "features", {Bm, S, A}),
            a.get(hidden, "hidden", {B, H}),
            a.get(cell, "cell", {B, H}),
            a.get(context, "context", {B, M}),
            a.get(coverage, "coverage", {B, S}),
            a.get(w_context, "w_context", {E, M}),
            a.get(w_ih, "w_ih", {4 * H, E}),
            a.get(w_hh, "w_hh", {4 * H, H}),
            a.get(bias, "bias", {4 * H}),
            a.get(w_query, "w_query", {A, 2 * H}),
            a.get(b_query, "b_query", {A}),
            a.get(w_coverage, "w_coverage", {A}),
            a.get(v, "v", {A})};
  }
};

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class R>
Seven forward(DECODER_INPUTS) {
  const Inputs<R> in(DECODER_ARGUMENTS);
  const Decoder<R>& d = in.decoder;
  const auto make = [&](std::initializer_list<int64_t> sizes) {
    return empty(inputs, sizes, Arguments<R>::kType);
  };
  Tensor x = make({d.B, d.T, d.E}), hiddens = make({d.B, d.T, d.H}), cells = make({d.B, d.T, d.H}),
         contexts = make({d.B, d.T, d.M}), attention = make({d.B, d.T, d.S}), cover = make({d.B, d.S}),
         loss = make({d.B, d.T});
  const DecoderOutputs<R> out{data<R>(x),         data<R>(hiddens), data<R>(cells), data<R>(contexts),
                              data<R>(attention), data<R>(cover),   data<R>(loss)};
  FASTSEQ_SELECT(decoder_forward<R>)(d, out, torch_threads);
  return {x, hiddens, cells, contexts, attention, cover, loss};
}

Seven pointer_decoder(DECODER_INPUTS) {
  return inputs.scalar_type() == ScalarType::Double ? forward<double>(DECODER_ARGUMENTS)
                                                    : forward<float>(DECODER_ARGUMENTS);
}

using Eleven =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

#define DECODER_SAVED                                                                               \
  const Optional &grad_x, const Optional &grad_hiddens, const Optional &grad_cells,                 \
      const Optional &grad_contexts, const Optional &grad_attention, const Optional &grad_coverage, \
      const Optional &grad_coverage_loss, DECODER_INPUTS, const Tensor &x, const Tensor &hiddens,   \
      const Tensor &cells, const Tensor &contexts, const Tensor &attention

template <class R>
Eleven backward(DECODER_SAVED) {
  Inputs<R> in(DECODER_ARGUMENTS);
  const Decoder<R>& d = in.decoder;
  check(d.B == d.Bm, "memory: the gradient wants as many rows as inputs has, got " + std::to_string(d.Bm));
  auto& a = in.arguments;
  const int64_t B = d.B, T = d.T;
  const DecoderSaved<R> saved{a.get(grad_x, "grad_x", {B, T, d.E}),
                              a.get(grad_hiddens, "grad_hiddens", {B, T, d.H}),
                              a.get(grad_cells, "grad_cells", {B, T, d.H}),
                              a.get(grad_contexts, "grad_contexts", {B, T, d.M}),
                              a.get(grad_attention, "grad_attention", {B, T, d.S}),
                              a.get(grad_coverage, "grad_coverage", {B, d.S}),
                              a.get(grad_coverage_loss, "grad_coverage_loss", {B, T}),
                              a.get(x, "x", {B, T, d.E}),
                              a.get(hiddens, "hiddens", {B, T, d.H}),
                              a.get(cells, "cells", {B, T, d.H}),
                              a.get(contexts, "contexts", {B, T, d.M}),
                              a.get(attention, "attention", {B, T, d.S})};
  const auto make = [&](std::initializer_list<int64_t> sizes) { return empty(inputs, sizes, a.kType); };
  Tensor d_inputs = make({B, T, d.E}), d_gates = make({B, T, 4 * d.H}), d_query = make({B, T, d.A}),
         d_memory = make({B, d.S, d.M}), d_features = make({B, d.S, d.A}), d_hidden = make({B, d.H}),
         d_cell = make({B, d.H}), d_context = make({B, d.M}), d_coverage = make({B, d.S}),
         d_w_coverage = make({w_coverage ? d.A : 0}), d_v = make({d.A});
  const DecoderGradients<R> out{data<R>(d_inputs),     data<R>(d_gates),    data<R>(d_query),
                                data<R>(d_memory),     data<R>(d_features), data<R>(d_hidden),
                                data<R>(d_cell),       data<R>(d_context),  data<R>(d_coverage),
                                data<R>(d_w_coverage), data<R>(d_v)};
  FASTSEQ_SELECT(decoder_backward<R>)(d, saved, out, torch_threads);
  return {d_inputs, d_gates,   d_query,    d_memory,     d_features, d_hidden,
          d_cell,   d_context, d_coverage, d_w_coverage, d_v};
}

Eleven pointer_decoder_grad(DECODER_SAVED) {
  const auto run = inputs.scalar_type() == ScalarType::Double ? &backward<double> : &backward<float>;
  return run(grad_x, grad_hiddens, grad_cells, grad_contexts, grad_attention, grad_coverage,
             grad_coverage_loss, DECODER_ARGUMENTS, x, hiddens, cells, contexts, attention);
}

#define DECODER_SCHEMA                                                                                \
  "Tensor inputs, Tensor memory, Tensor features, Tensor? mask, Tensor hidden, Tensor cell, Tensor "  \
  "context, "                                                                                         \
  "Tensor coverage, Tensor w_context, Tensor w_ih, Tensor w_hh, Tensor bias, Tensor w_query, Tensor " \
  "b_query, "                                                                                         \
  "Tensor? w_coverage, Tensor v"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def("pointer_decoder(" DECODER_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pointer_decoder_grad(Tensor? grad_x, Tensor? grad_hiddens, Tensor? grad_cells, Tensor? grad_contexts, "
      "Tensor? grad_attention, Tensor? grad_coverage, Tensor? grad_coverage_loss, " DECODER_SCHEMA
      ", Tensor x, Tensor hiddens, Tensor cells, Tensor contexts, Tensor attention) -> (Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_cpu, CPU, m) {
  m.impl("pointer_decoder", TORCH_BOX(&pointer_decoder));
  m.impl("pointer_decoder_grad", TORCH_BOX(&pointer_decoder_grad));
}
