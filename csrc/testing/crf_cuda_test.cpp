// The CUDA kernels of nll and its gradient, launched as the library launches them and run by the emulator,
// against the float64 log domain of the CPU: every regime, type, layout and mask, what a scaled domain can
// lose, rows that hold NaN or bad tags; launches, bytes, and the same bits under any schedule. Every buffer
// ends where memory ends.
//
// A part of the cases a run: which, FASTSEQ_EMULATOR_SEED says. With the argument "quick" far fewer of them,
// for the sanitizers and the planted bugs of mutants.py.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "crf/cuda/nll.cuh"
#include "testing/check.h"
#include "testing/crf_compare.h"
#include "testing/crf_cuda_batch.h"
#include "testing/crf_hazards.h"
#include "testing/crf_problem.h"
#include "testing/emulated.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

// ---- which cases, and under which schedules ---------------------------------------------------------------

uint64_t chosen_part = 0;  // the seed that was asked for
bool quick = false;

// Whether the next case belongs to this run, of which `rarely` means fewer. Scattered, as cases that are
// alike come at equal distances.
bool taken(unsigned rarely = 1) {
  static uint64_t turn = 0;
  const uint64_t scattered = (++turn * 0x9E3779B97F4A7C15u) >> 32, parts = (quick ? 60 : 3) * rarely;
  return scattered % parts == chosen_part % parts;
}

uint64_t next_seed() {
  static uint64_t seed = chosen_part << 32;
  return ++seed;
}

// ---- the kernels on one problem ---------------------------------------------------------------------------

template <class R>
struct Run {
  Result<R> result;
  Memory<R> total;
  std::vector<bool> marked;  // rows that the scaled kernels gave up
  emulator::Counters counters;
};

// The workspace holds zeros or NaNs, as the seed says: what is read of it must have been written.
template <class S, class R>
Run<R> run(const Problem& p, const View& view, Off off, uint64_t seed, bool gradient = true) {
  const int64_t K = p.K;
  Run<R> out{{Memory<R>(p.B), Memory<R>(K * K), Memory<R>(K), Memory<R>(K),
              Memory<char>(gradient ? view.extent(p) * bytes(view.type) : 0)},
             Memory<R>(1),
             std::vector<bool>(p.B),
             {}};
  const Parameters<R> parameters(p);
  const Memory<R> weights(p.weights);
  const Positions positions(p, off);
  device::Batch<S, R> batch = device_batch<S>(p, view, parameters, positions);
  batch.weights = gradient && p.weighted ? weights.data() : nullptr;
  batch.scale = kScale;
  const device::Gradients<S, R> to{
      {reinterpret_cast<S*>(out.result.emissions.data()), view.stride_b, view.stride_t},
      out.total.data(),
      out.result.transitions.data(),
      out.result.start.data(),
      out.result.end.data()};
  Memory<char> workspace(device::nll_workspace(batch, gradient));
  std::memset(workspace.data(), seed % 2 ? 0xFF : 0, size_t(workspace.size()));

  emulator::settings().seed = seed;
  emulator::reset_counters();
  device::nll<S, R>(batch, out.result.nll.data(), gradient ? &to : nullptr, workspace.data(), {});
  out.counters = emulator::counters();
  const device::Plan<S, R> plan(batch, gradient, workspace.data());
  const uint8_t* marks = plan.scaled.sweeps.marks;
  for (int64_t b = 0; marks != nullptr && b < p.B; ++b) out.marked[b] = marks[2 * b] || marks[2 * b + 1];
  return out;
}

template <class R>
bool same_bits(const Run<R>& a, const Run<R>& b) {
  return testing::same_bits(a.result, b.result) && testing::same_bits(a.total, b.total) &&
         a.marked == b.marked;
}

// ---- what must hold of every problem ----------------------------------------------------------------------

// How many rows went which way, for each of the regimes of nll.cuh.
struct Ways {
  int scaled = 0, exact = 0;
};
std::array<Ways, 5> ways;

Ways& ways_of(int64_t K) { return ways[K <= 16 ? 0 : K <= 32 ? 1 : K <= 64 ? 2 : K <= 128 ? 3 : 4]; }

int count(const std::vector<bool>& marked) { return int(std::count(marked.begin(), marked.end(), true)); }

template <class R>
void check_total(const Problem& p, const Run<R>& got) {
  double want = 0, size = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const double weight = weight_of(p, b);
    if (weight == 0) continue;
    want += weight * double(got.result.nll[b]), size += std::abs(weight * double(got.result.nll[b]));
  }
  if (!near(got.total[0], want, 1e-6 * size) && report(__FILE__, __LINE__))
    std::printf("total is %.9g, wanted %.9g\n", double(got.total[0]), want);
}

// A value alone has the bits that it has with a gradient; but only a gradient's backward sweep can mark a row
// that the forward sweep did not.
template <class R>
void check_value(const Run<R>& value, const Run<R>& got) {
  CHECK(value.counters.launches <= 2);
  for (size_t b = 0; b < got.marked.size(); ++b) {
    CHECK(got.marked[b] || !value.marked[b]);
    if (got.marked[b] == value.marked[b])
      CHECK(std::memcmp(&value.result.nll[b], &got.result.nll[b], sizeof(R)) == 0);
    else
      CHECK_CLOSE(value.result.nll[b], got.result.nll[b], 1e-6);
  }
}

template <class S, class R>
Run<R> check_as(const Problem& p, const View& view, Off off) {
  Run<R> got = run<S, R>(p, view, off, next_seed());
  check_result(p, view, got.result);
  check_total(p, got);
  CHECK(got.counters.launches <= 4);
  if (!emulator::kThreadSanitizer)  // which takes long, and sees a race under any schedule
    CHECK(same_bits(got, run<S, R>(p, view, off, next_seed())));
  check_value(run<S, R>(p, view, off, next_seed(), false), got);
  if (std::is_same_v<R, float>)
    ways_of(p.K).exact += count(got.marked), ways_of(p.K).scaled += int(p.B) - count(got.marked);
  return got;
}

// Returns how many rows were marked.
int check(const Problem& p, Type type, Layout layout, Off off, const std::string& what) {
  context() = what + ": B " + std::to_string(p.B) + ", T " + std::to_string(p.T) + ", K " +
              std::to_string(p.K) + ", type " + std::to_string(int(type)) + ", layout " +
              std::to_string(int(layout));
  const View view(p, type, layout);
  switch (type) {
    case Type::f32:
      return count(check_as<float, float>(p, view, off).marked);
#if !defined(FASTSEQ_TEST_FLOAT_ALONE)  // mutants.py compiles this file many times
    case Type::f64:
      return count(check_as<double, double>(p, view, off).marked);
    case Type::bf16:
      return count(check_as<device::bf16, float>(p, view, off).marked);
    case Type::f16:
      return count(check_as<device::f16, float>(p, view, off).marked);
#else
    default:
      return check(p, Type::f32, layout, off, what);
#endif
  }
  return 0;
}

// ---- every size -------------------------------------------------------------------------------------------

constexpr Type kTypes[] = {Type::f32, Type::bf16, Type::f64, Type::f16, Type::f32};

// About as many rows as a block has teams.
std::array<int64_t, 3> rows_for(int64_t K) {
  if (K <= 16) return {7, 8, 9};
  if (K <= 32) return {3, 4, 5};
  return {1, 2, 3};
}

void check_size(int64_t B, int64_t T, int64_t K, int turn) {
  Problem p(B, T, K, Mask(turn % 4), unsigned(turn));
  p.tagged = turn % 5 != 0;
  p.weighted = turn % 6 != 0;
  const bool forbids = turn % 8 == 3;
  if (forbids) p.forbid_some_edges();
  const int marked = check(p, kTypes[turn / 2 % 5], Layout(turn / 3 % 4), Off(turn / 4 % 3), "sizes");
  CHECK(forbids || marked == 0);
}

void test_sizes() {
  int turn = 0;  // types, layouts, masks and the rest take turns
  for (int64_t K : {1, 2, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200})
    for (int64_t T : {0, 1, 15, 16, 17, 33, 50})
      for (int64_t B : rows_for(K))
        if (++turn, taken() && !(quick && K > 128)) check_size(B, T, K, turn);
}

// One of each regime in every run.
void test_core() {
  check_size(9, 33, 9, 1);
  check_size(5, 20, 25, 2);
  check_size(1, 33, 40, 4);
  check_size(2, 18, 100, 6);
  check_size(1, 6, 130, 9);
  for (int64_t K : {1, 20, 40, 70, 130}) {
    if (emulator::kThreadSanitizer && K > 64) continue;  // K*K / 16 blocks of 512 threads for the sums
    check_size(0, 4, K, 1);
    check_size(2, 0, K, 2);
    Problem off(3, 20, K, Mask::none, 1);
    off.keep([](int64_t, int64_t) { return false; });
    check(off, Type::f32, Layout::padded, Off::mask, "all empty");
  }
}

// ---- what is hostile --------------------------------------------------------------------------------------

void test_hazards() {
  int turn = 0;
  const auto check_some = [&](const Problem& p, Type type, Layout layout, const std::string& what) {
    ++turn;
    if (taken(4) && !(quick && p.K > 32)) check(p, type, layout, Off(turn % 3), what);
  };
  for (int64_t K : {2, 9, 16, 25, 50}) {
    lost_paths(K, check_some);
    lost_at_both_ends(K, check_some);
  }
  for (int64_t K : {1, 3, 16, 17, 33, 65}) {
    constraints(K, check_some);
    extreme_emissions(K, check_some);
  }
}

// Rows that lose a path must be seen, and others must not be; in every regime. The first tag, which keeps to
// itself, comes to be far ahead: of row 1 forward, of row 2 backward, and then is forbidden; of row 4 both
// ways, but it falls back again, so that log Z alone does not tell.
void test_marks(int64_t K) {
  Problem p(5, 12, K, Mask::none, unsigned(K));
  part(p);
  p.transitions[0] = 1 + std::log(float(K - 1));  // about what the others have for being many
  p.weights = {1, -2, 3, 1, -1};
  for (int64_t l = 0; l < 6; ++l) p.at(1, l, 0) += 25, p.at(2, 11 - l, 0) += 25;
  p.at(1, 11, 0) = p.at(2, 0, 0) = kNever;
  for (int64_t l = 0; l < 5; ++l) p.at(4, l, 0) += 40, p.at(4, 5 + l, 0) -= 40;
  const View view(p, Type::f32, Layout::dense);
  context() = "marks, K " + std::to_string(K);
  const Run<float> got = check_as<float, float>(p, view, Off::tag);
  CHECK((got.marked == std::vector<bool>{false, true, true, false, true}));
  const Run<float> value = run<float, float>(p, view, Off::tag, next_seed(), false);
  CHECK((value.marked == std::vector<bool>{false, true, false, false, true}));
}

// All edges but those from a tag to itself are left out of E, being 70 nats below. To stay with the first tag
// costs row 1 more than that, little by little, so that only the answer for what was left out can tell.
void test_left_out(int64_t K) {
  Problem p(2, 6, K, Mask::none, unsigned(K));
  for (int64_t n = 0; n < K * K; ++n) p.transitions[n] = n % (K + 1) ? -70.f : 0.f;
  for (int64_t k = 0; k < K; ++k) p.start[k] = k ? kNever : 0;
  for (int64_t l = 0; l < 6; ++l) p.at(0, l, 0) += 5, p.at(1, l, 1) += 30;
  const View view(p, Type::f32, Layout::dense);
  context() = "left out, K " + std::to_string(K);
  const Run<float> got = check_as<float, float>(p, view, Off::tag);
  CHECK(!got.marked[0] && got.marked[1]);
}

// NaN or +inf in a row: its own results are NaN, and the other rows' have the same bits as without it.
void test_poison(int64_t K) {
  for (float poison : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (int way = 0; way < 3; ++way) {
      if (!taken()) continue;
      Problem p(5, 6, K, Mask::holes, unsigned(K));
      const View view(p, Type::f32, Layout::dense);
      const Run<float> clean = run<float, float>(p, view, Off::either, next_seed());
      std::vector<bool> poisoned(p.B);
      for (int64_t b = way; b < p.B; b += 3)
        if (p.rows.length(b) > 0) poisoned[b] = true, p.at(b, p.rows.length(b) * way / 3, way % K) = poison;
      check(p, Type::f32, Layout::dense, Off::either, "poison");
      const View poisoned_view(p, Type::f32, Layout::dense);
      const Run<float> got = run<float, float>(p, poisoned_view, Off::either, next_seed());
      for (int64_t b = 0; b < p.B; ++b) {
        const int64_t row = p.T * K * 4;
        CHECK(std::isnan(got.result.nll[b]) == poisoned[b]);
        if (poisoned[b]) continue;
        CHECK(std::memcmp(&got.result.nll[b], &clean.result.nll[b], 4) == 0);
        CHECK(std::memcmp(got.result.emissions.data() + b * row, clean.result.emissions.data() + b * row,
                          row) == 0);
      }
    }
    for (int which = 0; which < 3; ++which) {
      if (!taken()) continue;
      Problem p(3, 6, K, Mask::right, unsigned(K));
      std::vector<float>& parameter = *std::array{&p.transitions, &p.start, &p.end}[which];
      parameter[parameter.size() / 2] = poison;
      check(p, Type::f32, Layout::dense, Off::mask, "poisoned parameter " + std::to_string(which));
    }
  }
}

// A tag outside [0, K) makes its row NaN, unless it has no weight, and no other; it is never an index.
void test_bad_tags(int64_t K) {
  for (int64_t bad : {K, int64_t(-1), int64_t(-101), int64_t(1) << 40, -(int64_t(1) << 40)}) {
    if (!taken()) continue;
    context() = "tag " + std::to_string(bad) + ", K " + std::to_string(K);
    Problem p(4, 18, K, Mask::none, 9);
    p.weights = {1, 2, 0, 1};
    const View view(p, Type::f32, Layout::dense);
    const Run<float> clean = run<float, float>(p, view, Off::tag, next_seed());
    p.tags[1 * 18 + 17] = p.tags[2 * 18 + 3] = bad;
    const Run<float> got = run<float, float>(p, view, Off::tag, next_seed());
    const auto* gradient = reinterpret_cast<const float*>(got.result.emissions.data());
    for (int64_t b = 0; b < 4; ++b) {
      CHECK(b % 3 ? std::isnan(got.result.nll[b]) : got.result.nll[b] == clean.result.nll[b]);
      for (int64_t n = b * 18 * K; n < (b + 1) * 18 * K; ++n)
        CHECK(b == 1 ? std::isnan(gradient[n]) : b == 2 ? gradient[n] == 0 : std::isfinite(gradient[n]));
    }
    for (int64_t n = 0; n < K * K; ++n) CHECK(std::isnan(got.result.transitions[n]));
    CHECK(std::isnan(got.total[0]));
    CHECK(std::isnan(run<float, float>(p, view, Off::tag, next_seed(), false).result.nll[2]));
  }
}

// ---- the usual way, and what it moves ---------------------------------------------------------------------

// Ordinary numbers are never done exactly, however long the row is.
void test_long(int64_t K) {
  Problem p(1, quick ? 100 : 1000, K, Mask::none, unsigned(K));
  const int marked = check(p, Type::f32, Layout::dense, Off::tag, "long");
  CHECK(marked == 0);
}

// The formula of nll.cuh for a full batch of float32, as far as the emulator counts it: what kernels load and
// store by these names. A share of the gradient is cleared and added to in place, which it does not count,
// and then read. `large`: the owners of shares are as few as the emissions are (nll.cuh), and all is within
// twice the least.
void test_traffic(int64_t B, int64_t T, int64_t K, bool large) {
  Problem p(B, T, K, Mask::none, 1);
  p.weighted = false;
  context() = "traffic, K " + std::to_string(K);
  const View view(p, Type::f32, Layout::dense);
  const Run<float> got = run<float, float>(p, view, Off::mask, next_seed());
  device::Batch<float, float> batch{};
  batch.B = int(B), batch.T = int(T), batch.K = int(K);
  const double owners = device::Plan<float, float>(batch, true, nullptr).scaled.owners;
  const double N = double(B * T), row = K <= 16 ? 16 : double((K + 31) / 32 * 32);
  const double emissions = 4 * 4 * N * double(K), checkpoints = 16 * N * row / 16;
  const double shares = 4 * double(device::partial_size(int(K))) * owners;
  const double tags = (3 * (8 + 1) + 4 + 4) * N;  // and the mask, and the scores of the tags
  const double parameters = 4 * 4 * double(K * K) * (double(B) + owners);  // from a cache
  const double moved = double(got.counters.bytes_read + got.counters.bytes_written);
  CHECK_CLOSE(moved, emissions + checkpoints + shares + tags + parameters, 0.05);
  CHECK_CLOSE(moved - parameters, emissions + checkpoints + shares + tags, 0.05);
  CHECK(!large || moved - parameters - tags + 3 * shares <= 2 * 3 * 4 * N * double(K));
}

void run_all() {
  test_core();
  for (int64_t K : {2, 20, 40, 100, 130}) {
    test_marks(K);
    test_left_out(K);
    test_poison(K);
    test_bad_tags(K);
  }
  test_sizes();
  test_hazards();
  for (int64_t K : {9, 25, 64}) test_long(K);
  for (const Ways& each : ways) CHECK(each.scaled > 0 && each.exact > 0);
  if (quick) return;
  test_traffic(32, 64, 9, true);
  test_traffic(32, 128, 25, true);
  test_traffic(8, 64, 64, false);
  test_traffic(4, 256, 128, false);
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::string(argv[1]) == "quick";
  chosen_part = emulator::settings().seed;
  return run_emulated("crf_cuda", run_all);
}
