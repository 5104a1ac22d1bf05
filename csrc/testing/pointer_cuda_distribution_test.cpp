// The CUDA kernels of the output distribution and its gradient, launched as the library launches them and run
// by the emulator, against plain loops in float64: sizes, types, what is hostile, ids that are too large;
// launches, bytes, and the same bits under any schedule. Every buffer ends where memory ends.
//
// A part of the cases a run: which, FASTSEQ_EMULATOR_SEED says. With the argument "quick" far fewer of them,
// for the sanitizers and the planted bugs of mutants.py.
#include <cstdio>
#include <string>
#include <type_traits>

#include "pointer/cuda/distribution.cuh"
#include "testing/check.h"
#include "testing/emulated.h"
#include "testing/pointer_mixture.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;
namespace device = fastseq::pointer::cuda;

uint64_t chosen_part = 0;  // the seed that was asked for
bool quick = false;

// Whether the next case belongs to this run.
bool taken() {
  static uint64_t turn = 0;
  const uint64_t parts = quick ? 12 : 3;
  return ++turn % parts == chosen_part % parts;
}

uint64_t next_seed() {
  static uint64_t seed = chosen_part << 32;
  return ++seed;
}

template <class R>
struct Output {
  Memory<R> final, to_attention, to_gate;
  Memory<char> to_logits;
  emulator::Counters forward, backward;
};

template <class S, class R>
Output<R> run(const MixtureProblem& p) {
  const Memory<char> logits = p.logits_in_memory();
  const Memory<R> attention(p.attention), gate(p.gate), grad = p.grad_in_memory<R>();
  const Memory<int64_t> ids(p.ids);
  const device::Mixture<S, R> mixture{int(p.B),
                                      int(p.T),
                                      int(p.V),
                                      int(p.S),
                                      int(p.oov),
                                      {reinterpret_cast<const S*>(logits.data()), p.logits_b(), p.logits_t()},
                                      {attention.data(), p.T * p.S, p.S},
                                      gate.data(),
                                      ids.data()};
  Memory<int64_t> sorted(p.B * p.S);
  Memory<int> positions(p.B * p.S);
  Memory<uint8_t> invalid(p.B);
  Output<R> out{Memory<R>(p.B * p.T * p.words()),
                Memory<R>(p.B * p.T * p.S),
                Memory<R>(p.B * p.T),
                Memory<char>(p.B * p.T * p.V * bytes(p.type)),
                {},
                {}};
  emulator::settings().seed = next_seed();
  emulator::reset_counters();
  device::distribution<S, R>(mixture, {sorted.data(), positions.data(), invalid.data()}, out.final.data(),
                             {});
  out.forward = emulator::counters();
  emulator::reset_counters();
  device::distribution_grad<S, R>(
      mixture, {grad.data(), p.T * p.grad_t(), p.grad_t()},
      {reinterpret_cast<S*>(out.to_logits.data()), out.to_attention.data(), out.to_gate.data()}, {});
  out.backward = emulator::counters();
  return out;
}

template <class S, class R>
Output<R> check_as(const MixtureProblem& p) {
  Output<R> got = run<S, R>(p);
  const MixtureTruth want(p);
  check_mixture(p, want, got.final);
  check_mixture_grad(p, want, got.to_logits, got.to_attention, got.to_gate);
  CHECK(got.forward.launches <= 2 && got.backward.launches <= 1);
  if (emulator::kThreadSanitizer) return got;  // which takes long, and sees a race under any schedule
  const Output<R> again = run<S, R>(p);
  CHECK(same_bits(got.final, again.final) && same_bits(got.to_logits, again.to_logits));
  CHECK(same_bits(got.to_attention, again.to_attention) && same_bits(got.to_gate, again.to_gate));
  return got;
}

void check(const MixtureProblem& p, const std::string& what) {
  if (!taken()) return;
  context() = what + ": V " + std::to_string(p.V) + ", S " + std::to_string(p.S) + ", type " +
              std::to_string(int(p.type));
  if (p.type == Type::f32) check_as<float, float>(p);
#if !defined(FASTSEQ_TEST_FLOAT_ALONE)  // mutants.py compiles this file many times
  if (p.type == Type::f64) check_as<double, double>(p);
  if (p.type == Type::bf16) check_as<device::bf16, float>(p);
  if (p.type == Type::f16) check_as<device::f16, float>(p);
#endif
}

constexpr Type kTypes[] = {Type::f32, Type::bf16, Type::f64, Type::f16};

void test_sizes() {
  unsigned turn = 0;
  for (int64_t V : {1, 31, 500, 512, 513, 2048, 2100})
    for (int64_t S : {0, 1, 33, 520})
      for (int64_t oov : {0, 4}) {
        ++turn;
        check(MixtureProblem({2, 2, V, S, oov}, kTypes[turn % 4], turn), "sizes");
      }
}

// In every run: some of each kind, more ids than a tile of the sort holds, with many of them equal.
void test_core() {
  context() = "core";
  check_as<float, float>(MixtureProblem({2, 2, 600, 40, 5}, Type::f32, 3));
  check_as<float, float>(MixtureProblem({1, 1, 30, 1100, 3}, Type::f32, 4));
  check_as<float, float>(MixtureProblem({1, 2, 40, 0, 3}, Type::f32, 5));
  check_as<float, float>(MixtureProblem({0, 2, 40, 3, 3}, Type::f32, 5));
  check_as<float, float>(MixtureProblem({2, 0, 40, 3, 3}, Type::f32, 5));
}

// An id that is too large makes the rows of its b NaN, and is never an index.
void test_large_ids() {
  context() = "large ids";
  for (int64_t bad : {int64_t(25), int64_t(1) << 40, std::numeric_limits<int64_t>::max()}) {
    MixtureProblem p({2, 2, 21, 5, 4}, Type::f32, 9);
    const MixtureTruth want(p);
    p.ids[p.S + 3] = bad;
    const Output<float> got = run<float, float>(p);
    const int64_t good = p.T * p.words();
    for (int64_t i = 0; i < good; ++i) CHECK_CLOSE(got.final[i], want.final[i], 2e-6);
    for (int64_t i = good; i < 2 * good; ++i) CHECK(std::isnan(got.final[i]));
    for (int64_t n = 0; n < 4; ++n) CHECK(std::isnan(got.to_gate[n]) == (n >= 2));
  }
}

// The formula at the top of distribution.cuh; and the gate and a flag, which each thread reads, all at once.
void test_traffic() {
  const MixtureProblem p({1, 2, 6000, 50, 4}, Type::f32, 2);
  const Output<float> got = check_as<float, float>(p);
  context() = "traffic";
  const double rows = 2, V = 6000, P = 50, all = device::mixing::kThreads;
  const auto moved = [](const emulator::Counters& c) { return double(c.bytes_read + c.bytes_written); };
  CHECK_CLOSE(moved(got.forward), rows * (2 * 4 * V + 4 * (V + 4) + 52 * P + 5 * all) + 36 * P, 0.01);
  CHECK_CLOSE(moved(got.backward), rows * (2 * 8 * V + 4 * V + 32 * P + 4 * all), 0.01);
}

void run_all() {
  test_core();
  test_large_ids();
  test_sizes();
  for (Type type : kTypes) mixture_hazards(type, check);
  if (!quick) test_traffic();
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::string(argv[1]) == "quick";
  chosen_part = emulator::settings().seed;
  return run_emulated("pointer_cuda_distribution", run_all);
}
