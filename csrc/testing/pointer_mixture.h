// Random rows for the output distribution of a pointer-generator, and what its formulas give in plain loops.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/half.h"
#include "testing/check.h"
#include "testing/memory.h"

namespace fastseq::testing {

using crf::Type;

struct MixtureSize {
  int64_t B, T, V, S, oov;
};

// Rows of logits and grad lie `pad` elements apart, of which none may be read.
struct MixtureProblem : MixtureSize {
  static constexpr int64_t kPad = 3;
  Type type;
  std::vector<double> logits, attention, gate, grad;  // as the kernels read them; dense
  std::vector<int64_t> ids;

  MixtureProblem(const MixtureSize& size, Type type, unsigned seed) : MixtureSize(size), type(type) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 2);
    const auto fill = [&](std::vector<double>& values, int64_t n) {
      for (values.resize(n); double& x : values) x = normal(random);
    };
    fill(logits, B * T * V), fill(attention, B * T * S), fill(gate, B * T), fill(grad, B * T * words());
    for (double& a : attention) a = std::fabs(a) / double(2 * S);
    std::uniform_int_distribution<int64_t> word(-1 - words() / 8, words() - 1);
    for (ids.resize(B * S); int64_t& id : ids) id = word(random);
    round_logits();
  }

  int64_t words() const { return V + oov; }
  double& logit(int64_t b, int64_t t, int64_t v) { return logits[(b * T + t) * V + v]; }
  int64_t logits_t() const { return V + kPad; }
  int64_t logits_b() const { return T * logits_t() + kPad; }
  int64_t grad_t() const { return words() + kPad; }

  // The logits in memory; what lies between the rows is NaN.
  Memory<char> logits_in_memory() const {
    const int64_t last = B * T > 0 ? (B - 1) * logits_b() + (T - 1) * logits_t() + V : 0;
    Memory<char> memory(last * bytes(type));
    std::memset(memory.data(), 0xFF, size_t(memory.size()));
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T; ++t)
        crf::store_row(type, memory.data(), b * logits_b() + t * logits_t(), V,
                       logits.data() + (b * T + t) * V);
    return memory;
  }
  template <class R>
  Memory<R> grad_in_memory() const {
    Memory<R> memory(B * T > 0 ? B * T * grad_t() - kPad : 0);
    for (int64_t i = 0; i < memory.size(); ++i) {
      const int64_t v = i % grad_t();
      memory[i] = v < words() ? R(grad[i / grad_t() * words() + v]) : std::numeric_limits<R>::quiet_NaN();
    }
    return memory;
  }

  // Makes the logits what the type can hold: after an edit.
  void round_logits() {
    for (double& z : logits) {
      char memory[8];
      crf::store_row(type, memory, 0, 1, &z);
      crf::load_row({memory, type, 1, 1, 1, 0, 0}, 0, 0, &z);
    }
  }
};

struct MixtureTruth {
  std::vector<double> final, to_logits, to_attention, to_gate;

  explicit MixtureTruth(const MixtureProblem& p)
      : final(p.B * p.T * p.words()),
        to_logits(p.logits.size()),
        to_attention(p.attention.size()),
        to_gate(p.B * p.T) {
    for (int64_t n = 0; n < p.B * p.T; ++n) row(p, n);
  }

 private:
  static double sigmoid(double x) {
    return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
  }

  void row(const MixtureProblem& p, int64_t n) {
    const double *z = p.logits.data() + n * p.V, *a = p.attention.data() + n * p.S,
                 *grad = p.grad.data() + n * p.words();
    const int64_t* ids = p.ids.data() + n / p.T * p.S;
    const double generate = sigmoid(p.gate[n]), copy = sigmoid(-p.gate[n]);
    double top = -INFINITY, total = 0, mean = 0, copied = 0, bad = p.gate[n] * 0;
    bad = std::isinf(p.gate[n]) ? 0 : bad;
    for (int64_t v = 0; v < p.V; ++v) top = z[v] > top ? z[v] : top;
    std::vector<double> q(p.V);
    for (int64_t v = 0; v < p.V; ++v) total += q[v] = std::exp(z[v] - top);
    for (int64_t v = 0; v < p.V; ++v) q[v] /= total, mean += q[v] * grad[v];
    for (int64_t i = 0; i < p.S; ++i)
      if (ids[i] >= 0) bad += a[i] * 0, copied += a[i] * grad[ids[i]];
    bad += q[0] * 0;
    double* out = final.data() + n * p.words();
    for (int64_t v = 0; v < p.words(); ++v) out[v] = bad + (v < p.V ? generate * q[v] : 0);
    for (int64_t i = 0; i < p.S; ++i)
      if (ids[i] >= 0) out[ids[i]] += copy * a[i];
    bad += (mean - copied) * 0;
    for (int64_t v = 0; v < p.V; ++v) to_logits[n * p.V + v] = bad + generate * q[v] * (grad[v] - mean);
    for (int64_t i = 0; i < p.S; ++i) to_attention[n * p.S + i] = ids[i] < 0 ? 0 : bad + copy * grad[ids[i]];
    to_gate[n] = bad + generate * copy * (mean - copied);
  }
};

// How far a result of a type may be from the truth.
inline double tolerance_of(Type type) {
  return type == Type::f64 ? 1e-12 : type == Type::bf16 ? 0x1p-8 : type == Type::f16 ? 0x1p-11 : 3e-6;
}

// Holds what a kernel wrote to the truth; of the gradients, or of the distribution where they are empty.
template <class R>
void check_mixture(const MixtureProblem& p, const MixtureTruth& want, const Memory<R>& final) {
  for (int64_t i = 0; i < final.size(); ++i)
    CHECK_CLOSE(final[i], want.final[i], sizeof(R) == 8 ? 1e-13 : 2e-6);
  CHECK(final.size() == p.B * p.T * p.words());
}
template <class R>
void check_mixture_grad(const MixtureProblem& p, const MixtureTruth& want, const Memory<char>& to_logits,
                        const Memory<R>& to_attention, const Memory<R>& to_gate) {
  const double rounded = sizeof(R) == 8 ? 1e-12 : 3e-6;
  std::vector<double> row(p.V);
  for (int64_t n = 0; n < p.B * p.T; ++n) {
    crf::load_row({to_logits.data(), p.type, 1, p.B * p.T, p.V, 0, p.V}, 0, n, row.data());
    for (int64_t v = 0; v < p.V; ++v) CHECK_CLOSE(row[v], want.to_logits[n * p.V + v], tolerance_of(p.type));
    CHECK_CLOSE(to_gate[n], want.to_gate[n], rounded);
  }
  for (int64_t i = 0; i < to_attention.size(); ++i)
    CHECK_CLOSE(to_attention[i], want.to_attention[i], rounded);
}

// Calls check(problem, what) for what breaks an implementation that is only right on ordinary numbers.
template <class F>
void mixture_hazards(Type type, const F& check) {
  const MixtureSize size{2, 3, 21, 9, 4};
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const auto edited = [&](const char* what, const auto& edit) {
    MixtureProblem p(size, type, 7);
    edit(p);
    p.round_logits();
    check(p, what);
  };
  edited("logits x 200", [](auto& p) {
    for (double& z : p.logits) z *= 200;
  });
  for (double gate : {60.0, 200.0, inf})
    edited("gate", [&](auto& p) {
      for (size_t n = 0; n < p.gate.size(); ++n) p.gate[n] = n % 2 ? gate : -gate;
    });
  edited("forbidden words", [&](auto& p) {
    for (int64_t v = 0; v < 20; ++v) p.logit(0, 1, v) = -inf;
    for (int64_t v = 0; v < p.V; ++v) p.logit(1, 2, v) = -inf;
  });
  edited("one word", [](auto& p) {
    for (int64_t i = 0; i < p.S; ++i) p.ids[i] = 5, p.ids[p.S + i] = 24;
  });
  edited("no source", [&](auto& p) {
    for (int64_t i = 0; i < p.S; ++i) p.ids[i] = -1 - i;
    for (int64_t i = 0; i < p.T * p.S; ++i) p.attention[i] = nan;  // which nobody reads
  });
  for (double poison : {nan, inf}) {
    edited("poisoned logit", [&](auto& p) { p.logit(1, 0, 20) = poison; });
    edited("poisoned attention", [&](auto& p) { p.ids[2] = 3, p.attention[p.S + 2] = poison; });
    edited("poisoned grad", [&](auto& p) { p.grad[p.words() + 1] = poison; });
  }
  edited("poisoned gate", [&](auto& p) { p.gate[4] = nan; });
}

}  // namespace fastseq::testing
