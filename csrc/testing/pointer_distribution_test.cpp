// The output distribution of a pointer-generator on a CPU, its gradient, and the best words, against plain
// loops in float64: every size and type, what is hostile, and the same bits from any number of threads. Run
// once per instruction set. Every buffer ends where memory ends, so that reading past it is a crash.
#include <algorithm>
#include <string>
#include <vector>

#include "pointer/distribution.h"
#include "testing/check.h"
#include "testing/pointer_mixture.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

constexpr Type kTypes[] = {Type::f32, Type::bf16, Type::f64, Type::f16};

template <class R>
struct Output {
  Memory<R> final, to_attention, to_gate;
  Memory<char> to_logits;
};

template <class R>
Output<R> run(const MixtureProblem& p, const ParallelFor& parallel) {
  const Memory<char> logits = p.logits_in_memory();
  const Memory<R> attention(p.attention), gate(p.gate), grad = p.grad_in_memory<R>();
  const Memory<int64_t> ids(p.ids);
  const pointer::Mixture<R> mixture{{logits.data(), p.type, p.B, p.T, p.V, p.logits_b(), p.logits_t()},
                                    attention.data(),
                                    p.T * p.S,
                                    p.S,
                                    gate.data(),
                                    ids.data(),
                                    p.S,
                                    p.oov};
  Output<R> out{Memory<R>(p.B * p.T * p.words()), Memory<R>(p.B * p.T * p.S), Memory<R>(p.B * p.T),
                Memory<char>(p.B * p.T * p.V * bytes(p.type))};
  FASTSEQ_SELECT(pointer_distribution<R>)(mixture, out.final.data(), parallel);
  FASTSEQ_SELECT(pointer_distribution_grad<R>)
  (mixture, grad.data(), p.T * p.grad_t(), p.grad_t(),
   {out.to_logits.data(), out.to_attention.data(), out.to_gate.data()}, parallel);
  return out;
}

template <class R>
void check_as(const MixtureProblem& p) {
  const Output<R> got = run<R>(p, serial_for), again = run<R>(p, threads(3));
  const MixtureTruth want(p);
  check_mixture(p, want, got.final);
  check_mixture_grad(p, want, got.to_logits, got.to_attention, got.to_gate);
  CHECK(same_bits(got.final, again.final) && same_bits(got.to_logits, again.to_logits));
  CHECK(same_bits(got.to_attention, again.to_attention) && same_bits(got.to_gate, again.to_gate));
}

void check(const MixtureProblem& p, const std::string& what) {
  context() = what + ": V " + std::to_string(p.V) + ", S " + std::to_string(p.S) + ", type " +
              std::to_string(int(p.type));
  p.type == Type::f64 ? check_as<double>(p) : check_as<float>(p);
}

void test_sizes() {
  unsigned turn = 0;
  for (int64_t V : {1, 3, 15, 16, 17, 31, 33, 64, 1023, 1024, 1025, 3000})
    for (int64_t S : {0, 1, 7, 40})
      for (int64_t oov : {0, 5}) {
        const Type type = kTypes[++turn % 4];
        check(MixtureProblem({2, 3, V, S, oov}, type, turn), "sizes");
      }
  check(MixtureProblem({0, 3, 5, 4, 1}, Type::f32, 1), "no batch");
  check(MixtureProblem({3, 0, 5, 4, 1}, Type::f32, 1), "no steps");
}

// exp down to the least that a float can hold, and 0 below.
void test_small_powers() {
  context() = "small powers";
  MixtureProblem p({1, 1, 12, 0, 0}, Type::f32, 1);
  p.gate = {100};
  for (int64_t v = 0; v < p.V; ++v) p.logits[v] = -10.0 * double(v);
  const Output<float> got = run<float>(p, serial_for);
  const MixtureTruth want(p);
  for (int64_t v = 0; v < 9; ++v) CHECK(std::fabs(got.final[v] / want.final[v] - 1) < 1e-5);
  for (int64_t v = 9; v < 11; ++v) CHECK(std::fabs(got.final[v] - want.final[v]) < 3e-45);
  CHECK(got.final[11] == 0);
}

// ---- the best words ---------------------------------------------------------------------------------------

template <class R>
void check_topk(const MixtureProblem& p, int64_t k, int64_t begin) {
  Memory<char> logits((p.B * p.T - begin) * p.V * bytes(p.type));
  crf::store_row(p.type, logits.data(), 0, (p.B * p.T - begin) * p.V, p.logits.data() + begin * p.V);
  const Memory<R> attention(p.attention), gate(p.gate), bias(std::vector<double>(p.V, 0.25));
  const Memory<int64_t> ids(p.ids);
  const int64_t N = p.B * p.T - begin;
  const pointer::Candidates<R> c{logits.data(), p.type,     bias.data(), attention.data(),
                                 gate.data(),   ids.data(), begin,       N,
                                 p.B,           p.T,        p.S,         p.V};
  Memory<R> values(N * k);
  Memory<int64_t> words(N * k);
  FASTSEQ_SELECT(pointer_topk<R>)(c, k, values.data(), words.data(), threads(2));
  const MixtureTruth want(p);
  for (int64_t row = 0; row < N; ++row) {
    const double* final = want.final.data() + (begin + row) * p.words();
    std::vector<int64_t> order(p.words());
    for (int64_t v = 0; v < p.words(); ++v) order[v] = v;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return final[a] > final[b]; });
    for (int64_t i = 0; i < k; ++i) {
      CHECK(words[row * k + i] == order[i]);
      CHECK_CLOSE(values[row * k + i], std::log(final[order[i]]), sizeof(R) == 8 ? 1e-12 : 1e-6);
    }
  }
}

void test_topk() {
  unsigned turn = 0;
  for (int64_t V : {1, 2, 17, 33, 1100})
    for (int64_t k : {1, 2, 8, 17}) {
      if (k > V) continue;
      ++turn;
      context() = "topk, V " + std::to_string(V) + ", k " + std::to_string(k);
      MixtureProblem p({2, 3, V, V == 1 ? 0 : 11, 3}, kTypes[turn % 4], turn);
      if (turn % 2)
        for (double& z : p.logits) z = std::round(z);  // of equal words the smaller comes first
      p.type == Type::f64 ? check_topk<double>(p, k, turn % 3) : check_topk<float>(p, k, turn % 3);
    }
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  test_sizes();
  test_small_powers();
  for (Type type : kTypes) mixture_hazards(type, check);
  test_topk();
  return summary("pointer_distribution");
}
