// The kernels of crf/cuda/exact.cuh and reduce.cuh, run by the emulator, against exact_nll<double> of the
// CPU: every type of emissions, all kinds of masks, and what is hostile, on grids of several sizes. All
// arrays end where memory ends that may be touched. Each batch runs under two schedules, which must give the
// same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "crf/cuda/exact.cuh"
#include "crf/cuda/reduce.cuh"
#include "testing/check.h"
#include "testing/crf_cuda_batch.h"
#include "testing/crf_problem.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

constexpr double kScale = 0.75;
constexpr double kInf = std::numeric_limits<double>::infinity(),
                 kNaN = std::numeric_limits<double>::quiet_NaN();

// Under the thread sanitizer a block costs 50 ms, most of it for the fibers: then only some of the cases run,
// once each. It sees races whatever the schedule is.
constexpr bool kFew = emulator::kThreadSanitizer;
bool skip(unsigned n, unsigned every) { return kFew && n % every != 0; }

struct Case {
  Type type = Type::f64;
  Layout layout = Layout::dense;
  Off off = Off::either;
  int grid = 2;
  std::vector<uint8_t> marks = {};  // empty: all rows
  int float_owners = 0;             // shares of the scaled kernels
  bool gradient = true;
};

// ---- the kernels ----------------------------------------------------------------------------------------

template <class R>
struct Result {
  Memory<R> nll, total, transitions, start, end;
  Memory<char> emissions;
  Memory<uint8_t> used;
};

template <class S, class R>
Result<R> run(const Problem& p, const View& view, const Case& c) {
  const int B = int(p.B), T = int(p.T), K = int(p.K);
  const int64_t size = device::partial_size(K);
  const Parameters<R> parameters(p);
  const Memory<R> weights(p.weights);
  const Positions positions(p, c.off);
  Memory<uint8_t> marks(c.marks);
  device::Batch<S, R> batch = device_batch<S>(p, view, parameters, positions);
  batch.weights = p.weighted ? weights.data() : nullptr;
  batch.scale = kScale;

  Result<R> out{Memory<R>(B),
                Memory<R>(1),
                Memory<R>(K * K),
                Memory<R>(K),
                Memory<R>(K),
                Memory<char>(view.extent(p) * bytes(view.type)),
                Memory<uint8_t>(c.gradient ? c.grid : 0)};
  Memory<double> workspace(c.grid * device::exact_workspace(T, K)), partials(c.gradient ? c.grid * size : 0);
  device::Gradient<S> gradient;
  if (c.gradient && out.emissions.size())  // what is empty may have no address
    gradient = {reinterpret_cast<S*>(out.emissions.data()), view.stride_b, view.stride_t};
  FASTSEQ_LAUNCH((device::exact_kernel<S, R>), c.grid, device::exact::Block::kBlock, 0, nullptr, batch,
                 c.marks.empty() ? nullptr : marks.data(), out.nll.data(), gradient, workspace.data(),
                 c.gradient ? partials.data() : nullptr, c.gradient ? out.used.data() : nullptr);
  if (!c.gradient) return out;
  Memory<float> shares(c.float_owners * size);
  for (int64_t n = 0; n < shares.size(); ++n) shares[n] = float(n % 7) - 3;
  FASTSEQ_LAUNCH((device::reduce_kernel<R>), device::reduce_grid(K), device::reduce::Block::kBlock, 0,
                 nullptr, K, B, out.nll.data(), p.weighted ? weights.data() : nullptr, kScale, shares.data(),
                 c.float_owners, partials.data(), out.used.data(), c.grid, out.total.data(),
                 out.transitions.data(), out.start.data(), out.end.data());
  return out;
}

template <class R>
bool same_bits(const Result<R>& a, const Result<R>& b) {
  return same_bits(a.nll, b.nll) && same_bits(a.total, b.total) && same_bits(a.transitions, b.transitions) &&
         same_bits(a.start, b.start) && same_bits(a.end, b.end) && same_bits(a.emissions, b.emissions);
}

// ---- what they should give ------------------------------------------------------------------------------

bool marked(const Case& c, int64_t b) { return c.marks.empty() || c.marks[2 * b] || c.marks[2 * b + 1]; }

struct Wanted {
  std::vector<double> nll, emissions, sums;  // emissions (B,T,K)
  double total = 0;

  Wanted(const Problem& p, const View& view, const Case& c)
      : nll(p.B), emissions(p.B * p.T * p.K), sums(device::partial_size(int(p.K))) {
    const View exact = view.exactly(p);
    const Parameters<double> parameters(p);
    const std::vector<double> weights(p.weights.begin(), p.weights.end());
    std::vector<int64_t> which;
    for (int64_t b = 0; b < p.B; ++b)
      if (marked(c, b)) which.push_back(b);
    const Gradients<double> gradient{emissions.data(), p.T * p.K, p.K, nullptr, nullptr, nullptr};
    FASTSEQ_SELECT(exact_nll<double>)(parameters.model(p, exact), p.tagged ? p.gold() : Tags{}, which,
                                      p.weighted ? weights.data() : nullptr, kScale, nll.data(), &gradient,
                                      sums.data(), serial_for);
    for (int64_t n = 0; n < c.float_owners * int64_t(sums.size()); ++n)
      sums[n % sums.size()] += double(n % 7) - 3;
  }
};

// How far a value of the type may be from the number that was rounded to it, relative.
double rounding(Type type) {
  return type == Type::bf16 ? 0x1p-8 : type == Type::f16 ? 0x1p-11 : type == Type::f32 ? 0x1p-23 : 0;
}

template <class R>
bool untouched(const R* data, int64_t n) {
  const char* begin = reinterpret_cast<const char*>(data);
  return std::all_of(begin, begin + n * sizeof(R), [](char byte) { return byte == kUntouched; });
}

// The gradient of row b, positions that are off included; an unmarked row must be left alone.
template <class R>
void check_emissions(const Problem& p, const View& view, const Case& c, const Result<R>& got,
                     const Wanted& want, int64_t b, double tolerance) {
  const Emissions written = view.emissions(p, got.emissions.data());
  std::vector<double> row(p.K);
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t at = (b * view.stride_b + t * view.stride_t) * bytes(view.type);
    if (!marked(c, b)) {
      CHECK(untouched(got.emissions.data() + at, p.K * bytes(view.type)));
      continue;
    }
    load_row(written, b, t, row.data());
    for (int64_t k = 0; k < p.K; ++k)
      CHECK_CLOSE(row[k], want.emissions[(b * p.T + t) * p.K + k], rounding(view.type) + tolerance);
  }
}

template <class R>
void check_sums(const Problem& p, const Case& c, const Result<R>& got, const Wanted& want, double tolerance) {
  const int64_t K = p.K;
  for (int64_t n = 0; n < K * K; ++n) CHECK_CLOSE(got.transitions[n], want.sums[n], tolerance);
  for (int64_t k = 0; k < K; ++k) CHECK_CLOSE(got.start[k], want.sums[K * K + k], tolerance);
  for (int64_t k = 0; k < K; ++k) CHECK_CLOSE(got.end[k], want.sums[K * K + K + k], tolerance);
  for (int g = 0; g < c.grid; ++g) {
    bool any = false;
    for (int64_t b = g; b < p.B; b += c.grid) any |= marked(c, b);
    CHECK(got.used[g] == any);
  }
  double total = 0;  // of what is in nll: an unmarked row has the value of the scaled kernels there
  for (int64_t b = 0; b < p.B; ++b) {
    const double weight = p.weighted ? p.weights[b] : 1;
    if (weight != 0) total += weight * double(got.nll[b]);
  }
  CHECK_CLOSE(got.total[0], kScale * total, tolerance);
}

// Runs the kernels, and returns what they gave.
template <class S, class R>
Result<R> test(const Problem& p, const Case& c, double tolerance = 1e-11) {
  const View view(p, c.type, c.layout);
  Result<R> got = run<S, R>(p, view, c);
  ++emulator::settings().seed;
  if (!kFew) CHECK(same_bits(got, run<S, R>(p, view, c)));

  const Wanted want(p, view, c);
  const double rounded = std::max(tolerance, std::is_same_v<R, float> ? 0x1p-22 : 0.0);
  for (int64_t b = 0; b < p.B; ++b) {
    if (marked(c, b))
      CHECK_CLOSE(got.nll[b], want.nll[b], rounded);
    else
      CHECK(untouched(&got.nll[b], 1));
    check_emissions(p, view, c, got, want, b, tolerance);
  }
  check_sums(p, c, got, want, rounded);

  Case value = c;
  value.gradient = false;
  if (!kFew) CHECK(same_bits(run<S, R>(p, view, value).nll, got.nll));
  return got;
}

void test_as(Type type, const Problem& p, Case c, double tolerance = 1e-11) {
  c.type = type;
  if (type == Type::f64) test<double, double>(p, c, tolerance);
  if (type == Type::f32) test<float, float>(p, c, tolerance);
  if (type == Type::bf16) test<device::bf16, float>(p, c, tolerance);
  if (type == Type::f16) test<device::f16, float>(p, c, tolerance);
}

constexpr Type kTypes[] = {Type::f64, Type::f32, Type::bf16, Type::f16};
constexpr Mask kMasks[] = {Mask::none, Mask::right, Mask::holes, Mask::holes_and_empty};

// ---- random batches -------------------------------------------------------------------------------------

struct Size {
  int64_t B, T, K;
};

// As many combinations as there are masks for each size; types, layouts and the rest go round.
void test_random() {
  unsigned n = ~0u;
  for (const Size& size : {Size{5, 3, 1}, {4, 12, 2}, {3, 17, 9}, {2, 4, 33}, {2, 3, 70}}) {
    for (Mask mask : kMasks) {
      if (skip(++n, 5)) continue;
      context() = "random, K " + std::to_string(size.K) + ", mask " + std::to_string(int(mask));
      Problem p(size.B, size.T, size.K, mask, n);
      if (n % 3 == 0) p.forbid_some_edges();
      p.tagged = n % 4 != 3, p.weighted = n % 5 != 1;
      Case c{.layout = Layout(n % 4), .off = Off(n % 3), .grid = int(n % 2 ? size.B : 1 + n % 3)};
      c.float_owners = n % 2 ? 35 : 0;
      if (n % 3 == 1)
        for (int64_t b = 0; b < size.B; ++b) c.marks.push_back(b % 2), c.marks.push_back(b % 3 == 1);
      test_as(kTypes[(n + n / 4) % 4], p, c);
    }
  }
}

// A row's value and gradient depend on that row alone, whatever the grid.
void test_grids() {
  context() = "grids";
  const Problem p(5, 9, 6, Mask::holes_and_empty, 3);
  const View view(p, Type::f32, Layout::dense);
  const Result<float> one = run<float, float>(p, view, {.type = Type::f32, .grid = 1});
  for (int grid : {2, 5, 7}) {
    const Result<float> many = run<float, float>(p, view, {.type = Type::f32, .grid = grid});
    CHECK(same_bits(one.nll, many.nll) && same_bits(one.emissions, many.emissions));
    for (int64_t n = 0; n < one.transitions.size(); ++n)
      CHECK_CLOSE(one.transitions[n], many.transitions[n], 1e-6);
  }
}

// Long rows, whose alphas are computed twice, from checkpoints; and scores far beyond what exp could hold.
void test_long() {
  context() = "long";
  Problem p(2, 60, 9, Mask::holes, 5);
  test_as(Type::f64, p, {});
  for (float& x : p.x) x *= 1e4f;
  for (float& a : p.transitions) a *= 1e4f;
  test_as(Type::f32, p, {}, 1e-7);
  if (kFew) return;
  const Problem longer(1, 1000, 3, Mask::none, 6);
  test_as(Type::f64, longer, {.grid = 1}, 1e-9);
}

// ---- what is hostile ------------------------------------------------------------------------------------

// -inf: row 0 has impossible tags, row 1 no path at all, row 2 is like others; row 3 is dead and has no
// weight.
void test_impossible() {
  context() = "impossible";
  for (Type type : kTypes) {
    if (skip(unsigned(type), 4)) continue;
    Problem p(5, 6, 4, Mask::none, 7);
    p.transitions[0 * 4 + 1] = float(-kInf);
    p.tags[0] = 0, p.tags[1] = 1;
    for (int64_t k = 0; k < 4; ++k) p.at(1, 3, k) = p.at(3, 0, k) = float(-kInf);
    for (bool tagged : {true, false}) {
      p.tagged = tagged;
      test_as(type, p, {.off = Off::mask});
    }
  }
}

// A path that falls 1000 nats behind, and then is the only one left.
void test_lost_path() {
  context() = "lost path";
  Problem p(2, 40, 3, Mask::none, 8);
  for (int64_t i : {1, 2, 3, 6}) p.transitions[i] = float(-kInf);  // tag 0 keeps to itself
  for (int64_t t = 0; t < 20; ++t) p.at(0, t, 0) += 50;
  p.end[0] = float(-kInf);
  test_as(Type::f32, p, {});
}

// NaN or +inf spoils the rows that read it. Of emissions, one row where the position is on, none where it is
// off.
void test_poison() {
  for (float poison : {float(kNaN), float(kInf)}) {
    for (int where = 0; where < 5; ++where) {
      if (skip(where, 4)) continue;
      context() = "poison " + std::to_string(where);
      Problem p(5, 4, 3, Mask::right, 20 + where);
      p.keep([](int64_t b, int64_t t) {
        return t >= 4 - b || (b == 2 && t == 0);
      });  // row b: b positions; row 2: 3
      p.transitions[4] = p.start[1] = float(-kInf);
      if (where == 0) p.at(2, 1, 1) = poison, p.at(3, 0, 2) = poison;  // row 3 has no weight
      if (where == 1) p.x[(2 * 4 + 1) * 3] = p.x[0] = poison;          // off
      if (where == 2) p.transitions[5] = poison;
      if (where == 3) p.start[0] = poison;
      if (where == 4) p.end[2] = poison;
      test_as(where % 2 ? Type::f32 : Type::f64, p, {});
    }
  }
}

template <class R>
bool all(const Memory<R>& values, bool (*is)(double)) {
  return std::all_of(values.data(), values.data() + values.size(), [=](R x) { return is(x); });
}

// A tag outside [0, K) makes its row NaN, even if that is dead, and is never an index.
void test_bad_tags() {
  context() = "bad tags";
  const auto is_nan = [](double x) { return std::isnan(x); };
  const auto is_finite = [](double x) { return std::isfinite(x); };
  for (int64_t bad : {int64_t(4), int64_t(-1), int64_t(-101), int64_t(1) << 40, -(int64_t(1) << 40)}) {
    if (kFew && bad != 4) continue;
    for (int64_t row : {1, 2, 3}) {  // 2: dead; 3: of weight 0
      Problem p(4, 5, 4, Mask::none, 9);
      p.keep([](int64_t, int64_t t) { return t != 2; });
      p.weights[0] = p.weights[1] = p.weights[2] = 1;
      for (int64_t k = 0; k < 4; ++k) p.at(2, 0, k) = float(-kInf);
      if (row != 2) p.weights[2] = 0;  // its nll is infinite
      const View view(p, Type::f32, Layout::dense);
      const Result<float> clean = run<float, float>(p, view, {});
      p.tags[row * 5 + 1] = bad;
      const Result<float> got = run<float, float>(p, view, {});
      for (int64_t b = 0; b < 4; ++b) CHECK(b == row ? std::isnan(got.nll[b]) : got.nll[b] == clean.nll[b]);
      const float* gradient = reinterpret_cast<const float*>(got.emissions.data());
      const bool spoils = row != 3;
      for (int64_t n = 0; n < 5 * 4; ++n)
        CHECK(spoils && n / 4 != 2 ? std::isnan(gradient[row * 20 + n]) : gradient[row * 20 + n] == 0);
      CHECK(all(got.transitions, spoils ? +is_nan : +is_finite) &&
            all(got.start, spoils ? +is_nan : +is_finite));
      CHECK(all(got.end, spoils ? +is_nan : +is_finite) && all(got.total, spoils ? +is_nan : +is_finite));
    }
  }
}

// Nothing at all: no rows, no positions, no marks, no shares.
void test_nothing() {
  context() = "nothing";
  for (const Size& size : {Size{0, 5, 3}, {3, 0, 3}, {0, 0, 1}}) {
    const Problem p(size.B, size.T, size.K, Mask::none, 1);
    test_as(Type::f64, p, {});
    test_as(Type::f16, p, {.off = Off::mask});
  }
  Problem p(3, 4, 3, Mask::none, 1);
  p.weights = {0, 0, 0};  // of the total, which nobody has written
  test_as(Type::f32, p, {.marks = std::vector<uint8_t>(6, 0)});
}

}  // namespace

int main() {
  test_random();
  test_grids();
  test_long();
  test_impossible();
  test_lost_path();
  test_poison();
  test_bad_tags();
  test_nothing();
  return summary("crf_cuda_exact");
}
