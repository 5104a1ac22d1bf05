// The torch ops fastseq_cpu::crf_*: tensors to raw pointers and back, nothing else.
#include <tuple>

#include "../common/torch_cpu.h"
#include "arguments.h"
#include "kernels.h"

namespace {

using namespace fastseq;
using namespace fastseq::crf;

// The arguments as the kernels take them. The tensors must outlive it.
template <class R>
class Inputs : public Arguments<R> {
 public:
  Inputs(const Tensor& emissions_, const std::optional<Tensor>& tags_, const std::optional<Tensor>& mask_,
         const Tensor& transitions_, const Tensor& start_, const Tensor& end_)
      : Arguments<R>(emissions_, tags_, mask_, transitions_, start_, end_) {
    const Tensor& e = this->emissions;
    x = {e.const_data_ptr(), type_of(e, "emissions"), this->B, this->T, this->K, e.stride(0), e.stride(1)};
    if (tags_)
      gold = {static_cast<const int64_t*>(tags_->const_data_ptr()), tags_->stride(0), tags_->stride(1)};
    find_rows(mask_);
  }

  Model<R> model() const { return {x, rows, this->transitions_data(), this->start_data(), this->end_data()}; }

  Emissions x;
  Rows rows;
  Tags gold;

 private:
  void find_rows(const std::optional<Tensor>& mask) {
    const bool* on = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    const int64_t on_b = mask ? mask->stride(0) : 0, on_t = mask ? mask->stride(1) : 0;
    rows.offset.resize(x.B + 1);
    rows.positions.resize(x.B * x.T);
    int64_t n = 0;
    int32_t* out = rows.positions.data();
    for (int64_t b = 0; b < x.B; ++b) {
      for (int64_t t = 0; t < x.T; ++t) {
        const int64_t y = gold.data ? gold.at(b, t) : 0;
        const bool here = (on == nullptr || on[b * on_b + t * on_t]) && y != -100;
        if (here && uint64_t(y) >= uint64_t(x.K))
          check(false, "tags: wanted ids in [0, " + std::to_string(x.K) + ") or -100, got " +
                           std::to_string(y) + " at [" + std::to_string(b) + ", " + std::to_string(t) + "]");
        out[n] = int32_t(t);  // kept only where on: no branch
        n += here;
      }
      rows.offset[b + 1] = n;
    }
  }
};

Tensor crf_nll(const Tensor& emissions, const std::optional<Tensor>& tags, const std::optional<Tensor>& mask,
               const Tensor& transitions, const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(emissions, tags, mask, transitions, start, end);
    Tensor out = empty(emissions, {in.B}, in.kType);
    nll<R>(in.model(), in.gold, nullptr, 1.0, data<R>(out), nullptr, torch_threads);
    return out;
  });
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads crf_nll_grad(const Tensor& emissions, const std::optional<Tensor>& tags,
                   const std::optional<Tensor>& mask, const Tensor& transitions, const Tensor& start,
                   const Tensor& end, const std::optional<Tensor>& weights, double scale) {
  return with_arithmetic(emissions, [&](auto zero) -> Grads {
    using R = decltype(zero);
    const Inputs<R> in(emissions, tags, mask, transitions, start, end);
    const int64_t B = in.B, K = in.K;
    const std::optional<Tensor> w = in.row_weights(weights);
    const R* w_data = w ? static_cast<const R*>(w->const_data_ptr()) : nullptr;
    Tensor total = empty(start, {}, in.kType), values = empty(start, {B}, in.kType),
           ga = empty(start, {K, K}, in.kType), gs = empty(start, {K}, in.kType),
           ge = empty(start, {K}, in.kType);
    EmissionGradient gx(emissions);
    const Gradients<R> gradient{gx.rows().mutable_data_ptr(),
                                gx.rows().stride(0),
                                gx.rows().stride(1),
                                data<R>(ga),
                                data<R>(gs),
                                data<R>(ge)};
    nll<R>(in.model(), in.gold, w_data, scale, data<R>(values), &gradient, torch_threads);
    double sum = 0;
    for (int64_t b = 0; b < B; ++b) {
      const double weight = w_data ? double(w_data[b]) : 1.0;
      if (weight != 0) sum += weight * double(data<R>(values)[b]);  // 0 * infinity is 0 here
    }
    *data<R>(total) = R(B ? scale * sum : 0);
    return {total, gx.take(), ga, gs, ge};
  });
}

std::tuple<Tensor, Tensor> crf_viterbi(const Tensor& emissions, const std::optional<Tensor>& mask,
                                       const Tensor& transitions, const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    Tensor paths = empty(emissions, {in.B, in.T}, ScalarType::Long),
           scores = empty(emissions, {in.B}, in.kType);
    if constexpr (std::is_same_v<R, float>)
      FASTSEQ_SELECT(viterbi)(in.model(), data<int64_t>(paths), data<R>(scores), torch_threads);
    else
      FASTSEQ_SELECT(viterbi_exact<R>)(in.model(), data<int64_t>(paths), data<R>(scores), torch_threads);
    return {paths, scores};
  });
}

std::tuple<Tensor, Tensor> crf_nbest(const Tensor& emissions, const std::optional<Tensor>& mask,
                                     const Tensor& transitions, const Tensor& start, const Tensor& end,
                                     int64_t n) {
  check(n >= 1, "n: wanted at least 1, got " + std::to_string(n));
  return with_arithmetic(emissions, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    Tensor paths = empty(emissions, {in.B, n, in.T}, ScalarType::Long),
           scores = empty(emissions, {in.B, n}, in.kType);
    FASTSEQ_SELECT(nbest<R>)(in.model(), n, data<int64_t>(paths), data<R>(scores), torch_threads);
    return {paths, scores};
  });
}

Tensor crf_entropy(const Tensor& emissions, const std::optional<Tensor>& mask, const Tensor& transitions,
                   const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    Tensor out = empty(emissions, {in.B}, in.kType);
    FASTSEQ_SELECT(entropy<R>)(in.model(), data<R>(out), torch_threads);
    return out;
  });
}

Tensor crf_sample(const Tensor& uniforms, const Tensor& emissions, const std::optional<Tensor>& mask,
                  const Tensor& transitions, const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    check(uniforms.dim() == 3 && uniforms.size(1) == in.B && uniforms.size(2) == in.T &&
              uniforms.scalar_type() == in.kType,
          "uniforms: wanted (num_samples,B,T) of the type of the results");
    const Tensor u = torch::stable::contiguous(uniforms);
    Tensor out = empty(emissions, {u.size(0), in.B, in.T}, ScalarType::Long);
    FASTSEQ_SELECT(sample<R>)
    (in.model(), static_cast<const R*>(u.const_data_ptr()), u.size(0), data<int64_t>(out), torch_threads);
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def(CRF_NLL);
  m.def(CRF_NLL_GRAD);
  m.def(CRF_VITERBI);
  m.def("crf_nbest(" CRF_MODEL ", int n) -> (Tensor, Tensor)");
  m.def("crf_entropy(" CRF_MODEL ") -> Tensor");
  m.def("crf_sample(Tensor uniforms, " CRF_MODEL ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_cpu, CPU, m) {
  m.impl("crf_nll", TORCH_BOX(&crf_nll));
  m.impl("crf_nll_grad", TORCH_BOX(&crf_nll_grad));
  m.impl("crf_viterbi", TORCH_BOX(&crf_viterbi));
  m.impl("crf_nbest", TORCH_BOX(&crf_nbest));
  m.impl("crf_entropy", TORCH_BOX(&crf_entropy));
  m.impl("crf_sample", TORCH_BOX(&crf_sample));
}
