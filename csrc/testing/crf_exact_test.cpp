// exact.cpp and entropy.cpp against their definitions: every path of many small random batches is listed, in
// every type of emissions, with holes, empty rows, -inf, NaN and ties. About 400 batches of at most 4 rows of
// 4^4 paths.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "crf/kernels.h"
#include "testing/check.h"
#include "testing/crf_batch.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

// ---- exact_nll --------------------------------------------------------------------------------------------

template <class R>
struct NllResult {
  std::vector<R> nll;
  std::vector<char> emissions;
  std::vector<double> sums;
  bool operator==(const NllResult&) const = default;
};

constexpr double kScale = 0.75;

template <class R>
NllResult<R> run_nll(const Batch<R>& batch, bool tagged, bool weighted, const ParallelFor& parallel_for) {
  const int64_t K = batch.K;
  NllResult<R> out{std::vector<R>(batch.B, 77), std::vector<char>(batch.memory.size(), 0),
                   std::vector<double>(K * K + 2 * K, 1.0)};
  const Tags tags{tagged ? batch.tags.data() : nullptr, batch.T, 1};
  const Gradients<R> grad{out.emissions.data(), batch.stride_b, batch.stride_t, nullptr, nullptr, nullptr};
  FASTSEQ_SELECT(exact_nll<R>)(batch.model(), tags, batch.which, weighted ? batch.weights.data() : nullptr,
                               kScale, out.nll.data(), &grad, out.sums.data(), parallel_for);
  return out;
}

// The gradient of one row by enumeration: weight * p(path) on each path, and -weight on the tags.
template <class R>
void add_gradient(const Oracle<R>& oracle, const std::vector<int64_t>& path, double p,
                  std::vector<double>& emissions, std::vector<double>& sums) {
  const int64_t K = oracle.batch.K;
  if (oracle.L == 0) return;
  for (int64_t l = 0; l < oracle.L; ++l) {
    emissions[oracle.batch.rows.of(oracle.b)[l] * K + path[l]] += p;
    if (l > 0) sums[path[l - 1] * K + path[l]] += p;
  }
  sums[K * K + path[0]] += p;
  sums[K * K + K + path.back()] += p;
}

template <class R>
double tolerance(Type type) {
  return type == Type::bf16 ? 5e-3 : type == Type::f16 ? 1e-3 : std::is_same_v<R, float> ? 1e-6 : 1e-12;
}

template <class R>
void test_nll(const Batch<R>& batch, bool tagged, bool weighted) {
  const int64_t K = batch.K, T = batch.T;
  const NllResult<R> got = run_nll(batch, tagged, weighted, serial_for);
  std::vector<double> sums(K * K + 2 * K, 1.0);
  std::vector<R> values(batch.B, 77);
  for (int64_t b : batch.which) {
    const Oracle<R> oracle(batch, b);
    const double weight = kScale * (weighted ? batch.weights[b] : 1);
    std::vector<double> emissions(T * K, 0.0), row(K);
    std::vector<int64_t> gold;
    for (int64_t l = 0; l < oracle.L; ++l) gold.push_back(batch.tags[b * T + batch.rows.of(b)[l]]);
    if (oracle.log_z != -kInf) {
      for (size_t i = 0; i < oracle.paths.size(); ++i)
        add_gradient(oracle, oracle.paths[i], weight * oracle.probability(i), emissions, sums);
      if (tagged) add_gradient(oracle, gold, -weight, emissions, sums);
    }
    const double gold_score = oracle.template score<double>(gold);
    const double want = !tagged ? oracle.log_z : gold_score == -kInf ? kInf : oracle.log_z - gold_score;
    CHECK(close(got.nll[b], want, std::is_same_v<R, float> ? 1e-6 : 1e-12));
    const Emissions written{got.emissions.data(), batch.type, batch.B, T, K, batch.stride_b, batch.stride_t};
    for (int64_t t = 0; t < T; ++t) {
      load_row(written, b, t, row.data());
      for (int64_t k = 0; k < K; ++k) CHECK(close(row[k], emissions[t * K + k], tolerance<R>(batch.type)));
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) CHECK(close(got.sums[i], sums[i], 1e-11));
  const Tags tags{tagged ? batch.tags.data() : nullptr, T, 1};
  FASTSEQ_SELECT(exact_nll<R>)(batch.model(), tags, batch.which, nullptr, 1.0, values.data(), nullptr,
                               nullptr, serial_for);
  CHECK(values == got.nll);
  for (int count : {2, 5}) CHECK(run_nll(batch, tagged, weighted, threads(count)) == got);
}

// ---- entropy and samples ----------------------------------------------------------------------------------

template <class R>
void test_entropy(const Batch<R>& batch) {
  std::vector<R> got(batch.B), again(batch.B);
  FASTSEQ_SELECT(entropy<R>)(batch.model(), got.data(), serial_for);
  FASTSEQ_SELECT(entropy<R>)(batch.model(), again.data(), threads(3));
  CHECK(got == again);
  for (int64_t b = 0; b < batch.B; ++b)
    CHECK(close(got[b], Oracle<R>(batch, b).entropy, std::is_same_v<R, float> ? 1e-6 : 1e-12));
}

// ---- NaN, infinity, and sizes -----------------------------------------------------------------------------

template <class R>
bool all_nan(const std::vector<R>& v) {
  return std::all_of(v.begin(), v.end(), [](R x) { return std::isnan(x); });
}

// One poisoned position of row 0 must spoil row 0 and the sums, whatever else is forbidden, and no other row.
template <class R>
void test_poison(double poison, Values values) {
  std::mt19937 random(11);
  for (int repeat = 0; repeat < 50; ++repeat) {
    Batch<R> batch(random, sizeof(R) == 8 ? Type::f64 : Type::f32, values, 3, 4, 3);
    if (batch.rows.length(0) == 0) continue;
    batch.which = {2, 0, 1};
    const NllResult<R> clean = run_nll(batch, true, true, serial_for);
    const int64_t l = random() % batch.rows.length(0);
    batch.put(batch.rows.of(0)[l] * batch.stride_t + random() % 3, poison);
    const NllResult<R> got = run_nll(batch, true, true, serial_for);
    CHECK(std::isnan(got.nll[0]) && got.nll[1] == clean.nll[1] && got.nll[2] == clean.nll[2]);
    CHECK(all_nan(got.sums));
    std::vector<double> row(3);
    for (int64_t t = 0; t < 4; ++t) {
      load_row(Emissions{got.emissions.data(), batch.type, 3, 4, 3, batch.stride_b, batch.stride_t}, 0, t,
               row.data());
      CHECK(batch.tags[t] == -100 ? row == std::vector<double>(3, 0.0) : all_nan(row));
    }
    std::vector<R> out(3);
    FASTSEQ_SELECT(entropy<R>)(batch.model(), out.data(), serial_for);
    CHECK(std::isnan(out[0]) && !std::isnan(out[1]) && !std::isnan(out[2]));
  }
}

// NaN or +inf in a parameter spoils the rows that use it: start and end all but the empty, transitions all
// but the short.
template <class R>
void test_poisoned_parameters(R poison) {
  std::mt19937 random(13);
  for (int repeat = 0; repeat < 60; ++repeat) {
    Batch<R> batch(random, sizeof(R) == 8 ? Type::f64 : Type::f32, Values::forbidden, 4, 4, 3);
    std::vector<R>& parameter = std::vector{&batch.transitions, &batch.start, &batch.end}[repeat % 3][0];
    parameter[random() % parameter.size()] = poison;
    batch.which = {0, 1, 2, 3};
    const NllResult<R> got = run_nll(batch, false, false, serial_for);
    std::vector<R> entropies(4);
    FASTSEQ_SELECT(entropy<R>)(batch.model(), entropies.data(), serial_for);
    for (int64_t b = 0; b < 4; ++b) {
      const bool used = batch.rows.length(b) > (repeat % 3 == 0);
      CHECK(std::isnan(got.nll[b]) == used);
      CHECK(std::isnan(entropies[b]) == used);
    }
  }
}

// Two tags with log weights 0 and d: the marginal of the second is exp(d - log(1 + exp d)), to a few last
// places.
void test_exp() {
  std::mt19937 random(17);
  const int64_t B = 4000;
  Batch<double> batch(random, Type::f64, Values::smooth, B, 1, 2);
  batch.start = batch.end = {0, 0};
  batch.which.clear(), batch.rows.positions.assign(B, 0);
  const auto exponent = [](int64_t b) { return b < 2000 ? b * -0.0371 : (b - 2000) * -0.3581; };
  for (int64_t b = 0; b < B; ++b) {
    batch.which.push_back(b), batch.rows.offset[b + 1] = b + 1;
    batch.put(b * batch.stride_b, 0), batch.put(b * batch.stride_b + 1, exponent(b));
  }
  const NllResult<double> got = run_nll(batch, false, false, serial_for);
  const Emissions written{got.emissions.data(), Type::f64, B, 1, 2, batch.stride_b, batch.stride_t};
  for (int64_t b = 0; b < B; ++b) {
    double row[2];
    load_row(written, b, 0, row);
    const double d = exponent(b), want = kScale * std::exp(d - std::log1p(std::exp(d)));
    const double slack = (5 + 3 * std::min(-d, 40.0)) * 0x1p-53 * want;  // beyond 37, d is not rounded
    CHECK(d > -708 ? std::abs(row[1] - want) <= slack : d < -709 ? row[1] == 0 : row[1] <= want * 1.1);
  }
}

// Long rows with huge scores and strong constraints: Z overflows and underflows far beyond a double, and the
// marginals must still sum to 1; a slot holds many rows, and the sums do not depend on the threads.
void test_long_rows() {
  std::mt19937 random(5);
  Batch<double> batch(random, Type::f64, Values::smooth, 40, 200, 17);
  for (int64_t i = 0; i < batch.B * batch.stride_b; i += 3) batch.put(i, i % 2 ? 900.0 : -900.0);
  for (int64_t i = 0; i < 17 * 17; i += 5) batch.transitions[i] = i % 2 ? -kInf : -2e4;
  batch.which.clear();
  for (int64_t b = 0; b < batch.B; ++b) batch.which.push_back(b);
  const NllResult<double> got = run_nll(batch, false, false, serial_for);
  CHECK(run_nll(batch, false, false, threads(4)) == got);
  double pairs = 0, starts = 0, want_pairs = 0, want_starts = 0;
  std::vector<double> row(17);
  for (int64_t b = 0; b < batch.B; ++b) {
    const int64_t L = batch.rows.length(b);
    want_pairs += kScale * std::max<int64_t>(L - 1, 0), want_starts += kScale * (L > 0);
    for (int64_t l = 0; l < L; ++l) {
      load_row(Emissions{got.emissions.data(), Type::f64, 40, 200, 17, batch.stride_b, batch.stride_t}, b,
               batch.rows.of(b)[l], row.data());
      double sum = 0;
      for (double p : row) sum += p;
      CHECK(close(sum, kScale, 1e-9));
    }
  }
  for (int64_t i = 0; i < 17 * 17; ++i) pairs += got.sums[i] - 1;
  for (int64_t i = 0; i < 17; ++i) starts += got.sums[17 * 17 + i] - 1;
  CHECK(close(pairs, want_pairs, 1e-9) && close(starts, want_starts, 1e-9));
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  for_batches([](const auto& batch, int repeat, std::mt19937&) {
    test_nll(batch, repeat % 2 == 0, repeat % 3 == 0);
    test_entropy(batch);
  });
  context() = "poison";
  for (double poison : {kNaN, kInf}) {
    for (Values values : {Values::smooth, Values::forbidden, Values::everything_forbidden}) {
      test_poison<double>(poison, values);
      test_poison<float>(poison, values);
    }
    test_poisoned_parameters<double>(poison);
    test_poisoned_parameters<float>(static_cast<float>(poison));
  }
  context() = "sizes";
  test_exp();
  test_long_rows();
  return summary("crf_exact");
}
