// The decoder's CUDA kernels, launched as the library launches them and run by the emulator, against a loop
// in float64, and their gradient against the loop's differences: sizes around all that threads are dealt out
// by, masks of every kind, absent gradients, beams, NaN; launches, bytes, and the same bits under any
// schedule. Every buffer ends where memory ends.
//
// With the argument "quick" only some of the cases, for the sanitizers and the planted bugs of mutants.py.
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "pointer/cuda/decoder_launch.cuh"
#include "testing/check.h"
#include "testing/emulated.h"
#include "testing/memory.h"
#include "testing/pointer_decoder_problem.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;
namespace device = fastseq::pointer::cuda;

bool quick = false;

uint64_t next_seed() {
  static uint64_t seed = emulator::settings().seed << 32;
  return ++seed;
}

// ---- the kernels on one problem ---------------------------------------------------------------------------

template <class R>
struct Run {
  std::vector<Memory<R>> outputs, gradients;
  emulator::Counters forward, back;
};

// Memory that is written before it is read holds zeros or NaNs, as the seed says.
template <class E>
Memory<E> scratch(int64_t size, uint64_t seed) {
  Memory<E> memory(size);
  if (size) std::memset(static_cast<void*>(memory.data()), seed % 2 ? 0xFF : 0, size_t(size) * sizeof(E));
  return memory;
}

template <class R>
class Kernels {
 public:
  explicit Kernels(const DecoderProblem& p) : p_(p), n_(p.n), mask_(p.mask) {
    for (const Vector& values : p.in) in_.emplace_back(values);
    for (const Vector& values : p.arriving) arriving_.emplace_back(values);
  }

  Run<R> run(uint64_t seed, bool gradient) const {
    emulator::settings().seed = seed;
    Run<R> out{};
    for (const Vector& shape : p_.empty_outputs()) out.outputs.emplace_back(int64_t(shape.size()));
    Memory<char> spare = scratch<char>(device::decoder_spare<R>(n_), seed);
    emulator::reset_counters();
    device::decoder<R>(inputs(),
                       {out.outputs[kX].data(), out.outputs[kHiddens].data(), out.outputs[kCells].data(),
                        out.outputs[kContexts].data(), out.outputs[kAttention].data(),
                        out.outputs[kCoverageOut].data(), out.outputs[kCoverageLoss].data()},
                       spare.data(), {});
    out.forward = emulator::counters();
    if (gradient) run_back(seed, out);
    return out;
  }

 private:
  const R* at(Input i) const { return in_[i].data(); }
  const R* arriving(Output o) const { return p_.arrives[o] ? arriving_[o].data() : nullptr; }

  device::DecoderInputs<R> inputs() const {
    return {n_,
            at(kInputs),
            at(kMemory),
            at(kFeatures),
            p_.masked ? mask_.data() : nullptr,
            at(kHidden),
            at(kCell),
            at(kContext),
            at(kCoverage),
            at(kWContext),
            at(kWIh),
            at(kWHh),
            at(kBias),
            at(kWQuery),
            at(kBQuery),
            p_.covered ? at(kWCoverage) : nullptr,
            at(kV)};
  }

  void run_back(uint64_t seed, Run<R>& out) const {
    for (Input i : kGradientOf)
      out.gradients.emplace_back(i == kWCoverage && !p_.covered ? 0 : in_[i].size());
    std::vector<R*> to;
    for (Memory<R>& g : out.gradients) to.push_back(g.data());
    const int64_t steps = int64_t(n_.B) * n_.T;
    Memory<R> query = scratch<R>(steps * n_.A, seed), contexts = scratch<R>(steps * n_.M, seed),
              scores = scratch<R>(steps * n_.S, seed), coverage = scratch<R>(steps * n_.S, seed),
              partials = scratch<R>(device::decoder_owners(n_) * 2 * n_.A, seed);
    Memory<char> spare = scratch<char>(device::decoder_grad_spare<R>(n_), seed);
    emulator::reset_counters();
    device::decoder_grad<R>(
        inputs(),
        {out.outputs[kX].data(), out.outputs[kHiddens].data(), out.outputs[kCells].data(),
         out.outputs[kAttention].data()},
        {arriving(kX), arriving(kHiddens), arriving(kCells), arriving(kContexts), arriving(kAttention),
         arriving(kCoverageOut), arriving(kCoverageLoss)},
        {to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8], p_.covered ? to[9] : nullptr, to[10]},
        {query.data(), contexts.data(), scores.data(), coverage.data(), partials.data()}, spare.data(), {});
    out.back = emulator::counters();
  }

  const DecoderProblem& p_;
  const Sizes n_;
  Memory<bool> mask_;
  std::vector<Memory<R>> in_, arriving_;
};

template <class R>
bool same_bits(const std::vector<Memory<R>>& a, const std::vector<Memory<R>>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) same = testing::same_bits(a[i], b[i]);
  return same;
}

// ---- what must hold of every problem ----------------------------------------------------------------------

template <class R>
void check_outputs(const Run<R>& got, const Outputs& want, double tolerance) {
  for (int o = 0; o < kOutputCount; ++o)
    for (size_t k = 0; k < want[o].size(); ++k)
      CHECK_CLOSE(got.outputs[o][int64_t(k)], want[o][k], tolerance);
}

// Some elements of each gradient, or all where they are few.
void check_differences(DecoderProblem& p, const Run<double>& got, unsigned seed, int64_t most) {
  std::mt19937 random(seed);
  for (int g = 0; g < kGradients; ++g) {
    const int64_t size = got.gradients[g].size(), count = std::min<int64_t>(size, most);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t k = size <= count ? c : int64_t(random() % uint64_t(size));
      CHECK_CLOSE(got.gradients[g][k], p.difference(kGradientOf[g], size_t(k)), 1e-6);
    }
  }
}

void check_close(const std::vector<Memory<float>>& got, const std::vector<Memory<double>>& want,
                 double tolerance) {
  for (size_t g = 0; g < want.size(); ++g)
    for (int64_t k = 0; k < want[g].size(); ++k) CHECK_CLOSE(got[g][k], want[g][k], tolerance);
}

template <class R>
Run<R> run_twice(const DecoderProblem& p, bool gradient) {
  const Kernels<R> kernels(p);
  Run<R> run = kernels.run(next_seed(), gradient);
  if (!quick) {
    const Run<R> other = kernels.run(next_seed(), gradient);
    CHECK(same_bits(run.outputs, other.outputs) && same_bits(run.gradients, other.gradients));
  }
  return run;
}

void test(DecoderProblem p, unsigned seed, int64_t differences = quick ? 12 : 30) {
  const bool gradient = p.n.B == p.n.Bm;
  const Run<double> exact = run_twice<double>(p, gradient);
  check_outputs(exact, p.forward(), 1e-12);
  CHECK(exact.forward.launches == (p.n.B ? 1 : 0) && exact.back.launches <= 4);
  if (gradient) check_differences(p, exact, seed, differences);
  if (quick && seed % 2) return;
  const Run<float> rounded = run_twice<float>(p, gradient);
  check_outputs(rounded, p.forward(), 1e-5);
  check_close(rounded.gradients, exact.gradients, 5e-5);
}

// ---- the cases --------------------------------------------------------------------------------------------

// B, Bm, T, S, E, H, M, A: one of everything; more than 64 rows of a matrix, 256 and 512 columns, 128 columns
// of features, 8 and 32 positions, 32 steps.
const std::vector<Sizes> kSizes = {{3, 3, 3, 9, 3, 4, 5, 6},   {1, 1, 2, 37, 2, 3, 4, 140},
                                   {1, 1, 1, 1, 1, 1, 1, 1},   {2, 2, 3, 37, 9, 8, 33, 40},
                                   {2, 2, 34, 5, 2, 3, 4, 5},  {2, 2, 2, 70, 33, 70, 65, 140},
                                   {1, 1, 2, 3, 2, 2, 600, 4}, {1, 1, 2, 130, 70, 17, 100, 300}};
constexpr Mask kMasks[] = {Mask::holes, Mask::none, Mask::right, Mask::one_empty};

void test_sizes() {
  unsigned n = 0;
  for (const Sizes& size : kSizes) {
    for (Mask mask : kMasks) {
      const unsigned seed = n++;
      if (quick ? seed > 1 && seed != 5
                : size.S > 20 && seed % 4 != emulator::settings().seed % 4 && seed % 4 != 3)
        continue;
      context() = "S " + std::to_string(size.S) + ", T " + std::to_string(size.T) + ", A " +
                  std::to_string(size.A) + ", mask " + std::to_string(int(mask));
      constexpr unsigned kAbsent[] = {0, 0x25, 0x5A, 0x37};
      DecoderProblem p(size, mask, seed, kAbsent[(seed + seed / 4) % 4]);
      p.covered = seed % 3 != 1;
      test(p, seed);
    }
  }
}

void test_beams() {
  context() = "beams";
  test(DecoderProblem({6, 2, 2, 5, 3, 4, 5, 6}, Mask::one_empty, 1), 1);
}

void test_nothing() {
  for (const Sizes& size : {Sizes{0, 0, 3, 4, 2, 3, 4, 5},
                            {0, 2, 3, 4, 2, 3, 4, 5},
                            {2, 2, 0, 4, 2, 3, 4, 5},
                            {2, 2, 3, 0, 2, 3, 4, 5}}) {
    context() = "nothing, B " + std::to_string(size.B) + ", T " + std::to_string(size.T);
    test(DecoderProblem(size, Mask::none, 2), 2);
  }
}

// The largest vectors there may be, and more positions than shared memory holds.
void test_limits() {
  using namespace device;
  context() = "largest vectors";
  test(DecoderProblem({1, 1, 1, 2, kMaxEmbedding, kMaxHidden, kMaxMemory, kMaxAttention}, Mask::none, 3), 3,
       2);
  context() = "many positions";
  const Sizes many{2, 2, 2, 6000, 2, 2, 3, 3};
  CHECK(decoder_spare<double>(many) > 0 && decoder_grad_spare<float>(many) > 0);
  test(DecoderProblem(many, Mask::holes, 4), 4, 6);
}

// At a tie of attention and coverage the gradient of the least is the attention's.
void test_tie() {
  context() = "tie";
  DecoderProblem p({1, 1, 1, 1, 2, 2, 2, 2}, Mask::none, 5, 0x3F);  // only the coverage's loss matters
  p.in[kCoverage] = {1};  // as is the attention of the only position
  const Run<double> got = Kernels<double>(p).run(next_seed(), true);
  CHECK(got.outputs[kAttention][0] == 1 && got.outputs[kCoverageLoss][0] == 1);
  CHECK(got.gradients[8][0] == 0);
  p.in[kCoverage] = {0.5};
  CHECK(Kernels<double>(p).run(next_seed(), true).gradients[8][0] == p.arriving[kCoverageLoss][0]);
}

// NaN in a row makes that row NaN from there on, and no other.
void test_poison() {
  context() = "poison";
  DecoderProblem p({3, 3, 3, 5, 3, 4, 5, 6}, Mask::holes, 6);
  const Run<float> clean = Kernels<float>(p).run(next_seed(), true);
  p.in[kInputs][(1 * 3 + 1) * 3] = std::nan("");
  const Run<float> got = Kernels<float>(p).run(next_seed(), true);
  for (int o = 0; o < kOutputCount; ++o) {
    const int64_t length = got.outputs[o].size() / 3;
    for (int64_t k = 0; k < 3 * length; ++k)
      if (k / length != 1) CHECK(got.outputs[o][k] == clean.outputs[o][k]);
  }
  for (int t = 0; t < 3; ++t) CHECK(std::isnan(got.outputs[kCoverageLoss][3 + t]) == (t > 0));
  for (int g = 0; g < kGradients; ++g) {
    const int64_t size = got.gradients[g].size();
    bool any = false;
    for (int64_t k = 0; k < size; ++k) {
      const bool poisoned = std::isnan(got.gradients[g][k]);
      any |= poisoned;
      if (p.of_row(kGradientOf[g]) && k / (size / 3) != 1)
        CHECK(got.gradients[g][k] == clean.gradients[g][k]);
      if (!p.of_row(kGradientOf[g])) CHECK(poisoned);
    }
    CHECK(any);
  }
}

// The formula of decoder_forward.cuh, as far as the emulator counts it: what kernels load and store by these
// names. v and w_coverage are read again for each position, from a cache.
void test_traffic() {
  context() = "traffic";
  const DecoderProblem p({1, 1, 4, 100, 32, 32, 64, 64}, Mask::none, 7);
  const Sizes& n = p.n;
  const emulator::Counters got = Kernels<float>(p).run(next_seed(), false).forward;
  const double weights = n.E * n.M + 4 * n.H * (n.E + n.H) + 2 * n.H * n.A;
  const double step = weights + n.S * (n.M + n.A) + 2 * n.S * n.A + 4 * n.H + n.A + n.E;
  CHECK_CLOSE(double(got.bytes_read), 4 * n.T * step, 0.01);
  const double outputs = n.T * (n.E + 2 * n.H + n.M + n.S + 1) + n.S;
  CHECK(double(got.bytes_written) == 4 * outputs);
}

void run_all() {
  test_sizes();
  test_tie();
  if (quick && emulator::kThreadSanitizer) return;
  test_poison();
  test_beams();
  test_nothing();
  if (quick) return;
  test_limits();
  test_traffic();
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::string(argv[1]) == "quick";
  return run_emulated("pointer_cuda_decoder", run_all);
}
