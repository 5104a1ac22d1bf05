// The torch ops fastseq_cpu::crf_* on the LibTorch stable ABI: tensors to raw pointers and back, nothing
// else. Errors start with "fastseq: " and name the argument: Python turns those into ValueError.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

namespace {

using namespace fastseq;
using namespace fastseq::crf;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("fastseq: " + message);
}

void torch_parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, n, 1, f);
}

// An uninitialised CPU tensor. (torch::stable::new_empty looks its op up by name each time: five outputs cost
// 8 us.)
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const int64_t* like_strides = nullptr) {
  int64_t strides[4], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(),
                                                         like_strides ? like_strides : strides, int32_t(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      throw std::runtime_error("fastseq: emissions: wanted float64, float32, bfloat16 or float16");
  }
}

// The arguments that all the ops share, checked, as raw pointers. The tensors must outlive it.
template <class R>
class Inputs {
 public:
  static constexpr ScalarType kType = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

  Inputs(const Tensor& emissions, const std::optional<Tensor>& tags, const std::optional<Tensor>& mask,
         const Tensor& transitions, const Tensor& start, const Tensor& end)
      : emissions_(dense(emissions)),
        transitions_(parameter(transitions, "transitions", 2)),
        start_(parameter(start, "start", 1)),
        end_(parameter(end, "end", 1)) {
    const int64_t B = emissions.size(0), T = emissions.size(1), K = emissions.size(2);
    check(K >= 1, "emissions: wanted (B,T,K) with at least one tag, got K = 0");
    check(transitions.size(0) == K && transitions.size(1) == K && start.size(0) == K && end.size(0) == K,
          "transitions, start, end: wanted (K,K), (K,), (K,) with K = " + std::to_string(K) +
              " as in emissions");
    x = {emissions_.const_data_ptr(), type_of(emissions),  B, T, K,
         emissions_.stride(0),        emissions_.stride(1)};
    if (tags) {
      check(tags->scalar_type() == ScalarType::Long && tags->dim() == 2 && tags->size(0) == B &&
                tags->size(1) == T,
            "tags: wanted int64 (B,T) as in emissions");
      gold = {static_cast<const int64_t*>(tags->const_data_ptr()), tags->stride(0), tags->stride(1)};
    }
    if (mask)
      check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == B &&
                mask->size(1) == T,
            "mask: wanted bool (B,T) as in emissions");
    find_rows(mask);
  }

  Model<R> model() const {
    return {x, rows, static_cast<const R*>(transitions_.const_data_ptr()),
            static_cast<const R*>(start_.const_data_ptr()), static_cast<const R*>(end_.const_data_ptr())};
  }

  // A tensor that lies in memory as `torch.empty_like(emissions)` does.
  Tensor like_emissions(const Tensor& emissions) const { return torch::stable::empty_like(emissions); }

  Emissions x;
  Rows rows;
  Tags gold;

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

  Tensor emissions_, transitions_, start_, end_;
};

// Runs f with R = double for float64 emissions, else float.
template <class F>
auto with_arithmetic(const Tensor& emissions, const F& f) {
  return emissions.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class R>
R* data(Tensor& t) {
  return static_cast<R*>(t.mutable_data_ptr());
}

Tensor crf_nll(const Tensor& emissions, const std::optional<Tensor>& tags, const std::optional<Tensor>& mask,
               const Tensor& transitions, const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(emissions, tags, mask, transitions, start, end);
    Tensor out = empty({in.x.B}, in.kType);
    nll<R>(in.model(), in.gold, nullptr, 1.0, data<R>(out), nullptr, torch_parallel_for);
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
    const int64_t B = in.x.B, K = in.x.K;
    std::optional<Tensor> w;
    if (weights) {
      check(weights->dim() == 1 && weights->size(0) == B && weights->scalar_type() == in.kType,
            "weights: wanted (B,) of the type of the results, B = " + std::to_string(B));
      w = torch::stable::contiguous(*weights);
    }
    const R* w_data = w ? static_cast<const R*>(w->const_data_ptr()) : nullptr;
    Tensor total = empty({}, in.kType), values = empty({B}, in.kType), gx = in.like_emissions(emissions),
           ga = empty({K, K}, in.kType), gs = empty({K}, in.kType), ge = empty({K}, in.kType);
    // The gradient is written row by row; where K does not lie densely, through a copy.
    const bool direct = gx.stride(2) == 1 || K == 1;
    Tensor rows = direct ? gx : empty({B, in.x.T, K}, gx.scalar_type());
    const Gradients<R> gradient{
        rows.mutable_data_ptr(), rows.stride(0), rows.stride(1), data<R>(ga), data<R>(gs), data<R>(ge)};
    nll<R>(in.model(), in.gold, w_data, scale, data<R>(values), &gradient, torch_parallel_for);
    if (!direct) torch::stable::copy_(gx, rows);
    double sum = 0;
    for (int64_t b = 0; b < B; ++b) {
      const double weight = w_data ? double(w_data[b]) : 1.0;
      if (weight != 0) sum += weight * double(data<R>(values)[b]);  // 0 * infinity is 0 here
    }
    *data<R>(total) = R(B ? scale * sum : 0);
    return {total, gx, ga, gs, ge};
  });
}

std::tuple<Tensor, Tensor> crf_viterbi(const Tensor& emissions, const std::optional<Tensor>& mask,
                                       const Tensor& transitions, const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    Tensor paths = empty({in.x.B, in.x.T}, ScalarType::Long), scores = empty({in.x.B}, in.kType);
    if constexpr (std::is_same_v<R, float>)
      FASTSEQ_SELECT(viterbi)(in.model(), data<int64_t>(paths), data<R>(scores), torch_parallel_for);
    else
      FASTSEQ_SELECT(viterbi_exact<R>)(in.model(), data<int64_t>(paths), data<R>(scores), torch_parallel_for);
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
    Tensor paths = empty({in.x.B, n, in.x.T}, ScalarType::Long), scores = empty({in.x.B, n}, in.kType);
    FASTSEQ_SELECT(nbest<R>)(in.model(), n, data<int64_t>(paths), data<R>(scores), torch_parallel_for);
    return {paths, scores};
  });
}

Tensor crf_entropy(const Tensor& emissions, const std::optional<Tensor>& mask, const Tensor& transitions,
                   const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    Tensor out = empty({in.x.B}, in.kType);
    FASTSEQ_SELECT(entropy<R>)(in.model(), data<R>(out), torch_parallel_for);
    return out;
  });
}

Tensor crf_sample(const Tensor& uniforms, const Tensor& emissions, const std::optional<Tensor>& mask,
                  const Tensor& transitions, const Tensor& start, const Tensor& end) {
  return with_arithmetic(emissions, [&](auto zero) {
    using R = decltype(zero);
    const Inputs<R> in(emissions, std::nullopt, mask, transitions, start, end);
    check(uniforms.dim() == 3 && uniforms.size(1) == in.x.B && uniforms.size(2) == in.x.T &&
              uniforms.scalar_type() == in.kType,
          "uniforms: wanted (num_samples,B,T) of the type of the results");
    const Tensor u = torch::stable::contiguous(uniforms);
    Tensor out = empty({u.size(0), in.x.B, in.x.T}, ScalarType::Long);
    FASTSEQ_SELECT(sample<R>)
    (in.model(), static_cast<const R*>(u.const_data_ptr()), u.size(0), data<int64_t>(out),
     torch_parallel_for);
    return out;
  });
}

}  // namespace

#define CRF_MODEL "Tensor emissions, Tensor? mask, Tensor transitions, Tensor start, Tensor end"
#define CRF_PATHS "Tensor emissions, Tensor? tags, Tensor? mask, Tensor transitions, Tensor start, Tensor end"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def("crf_nll(" CRF_PATHS ") -> Tensor");
  m.def("crf_nll_grad(" CRF_PATHS
        ", Tensor? weights, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("crf_viterbi(" CRF_MODEL ") -> (Tensor, Tensor)");
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
