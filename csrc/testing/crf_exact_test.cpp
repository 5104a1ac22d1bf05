// Tests exact.cpp, nbest.cpp and half.h against their definitions: every path of many small random batches is
// listed, in every type of emissions, with holes, empty rows, -inf, NaN and ties. Returns the number of
// failures, at most 1. Cost: about 400 batches of at most 4 rows of 4^4 paths; under a second without
// sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "../common/half.h"
#include "../crf/crf.h"

namespace {

using namespace fastseq;
using namespace fastseq::crf;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

int failures = 0;

void check(bool ok, const char* what, const char* where) {
  if (!ok && ++failures <= 20) std::printf("FAILED: %s (%s)\n", what, where);
}

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::abs(a - b) <= tolerance * std::max({1.0, std::abs(a), std::abs(b)});
}

ParallelFor threads(int count) {
  return [count](int64_t n, const std::function<void(int64_t, int64_t)>& f) {
    std::vector<std::thread> pool;
    for (int i = 0; i < count; ++i) pool.emplace_back([&, i] { f(n * i / count, n * (i + 1) / count); });
    for (std::thread& thread : pool) thread.join();
  };
}

// ---- a random batch ---------------------------------------------------------------------------------------

enum class Values { smooth, ties, forbidden, everything_forbidden };

int64_t bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

template <class R>
struct Batch {
  int64_t B, T, K, stride_t, stride_b;
  Type type;
  std::vector<char> memory;
  std::vector<R> transitions, start, end, weights;
  std::vector<int64_t> tags, which;
  Rows rows;

  Batch(std::mt19937& random, Type type, Values values, int64_t B, int64_t T, int64_t K)
      : B(B),
        T(T),
        K(K),
        stride_t(K + 1),
        stride_b(T * stride_t + 3),
        type(type),
        memory(B * stride_b * bytes(type)) {
    std::normal_distribution<double> normal(0, 2);
    const auto draw = [&] {
      if (values == Values::ties) return 0.5 * static_cast<int>(random() % 4);
      const bool never = values == Values::everything_forbidden && random() % 3 > 0;
      return never || (values == Values::forbidden && random() % 4 == 0) ? -kInf : normal(random);
    };
    const auto fill = [&](std::vector<R>& out, int64_t n) {
      for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<R>(draw()));
    };
    fill(transitions, K * K), fill(start, K), fill(end, K);
    for (int64_t i = 0; i < B * stride_b; ++i) put(i, draw());
    rows.offset = {0};
    for (int64_t b = 0; b < B; ++b) {
      weights.push_back(static_cast<R>(normal(random)));
      const bool empty = random() % 5 == 0;
      for (int64_t t = 0; t < T; ++t) {
        const bool on = !empty && random() % 4 != 0;
        if (on) rows.positions.push_back(static_cast<int32_t>(t));
        tags.push_back(on ? static_cast<int64_t>(random() % K) : -100);
      }
      rows.offset.push_back(static_cast<int64_t>(rows.positions.size()));
      if (random() % 6 != 0) which.push_back(b);
    }
    std::shuffle(which.begin(), which.end(), random);
  }

  void put(int64_t at, double value) { store_row(type, memory.data(), at, 1, &value); }
  Emissions emissions() const { return {memory.data(), type, B, T, K, stride_b, stride_t}; }
  Model<R> model() const { return {emissions(), rows, transitions.data(), start.data(), end.data()}; }
  double x(int64_t b, int64_t t, int64_t k) const {
    std::vector<double> row(K);
    load_row(emissions(), b, t, row.data());
    return row[k];
  }
};

// ---- the oracle: all paths of a row -----------------------------------------------------------------------

template <class R>
struct Oracle {
  const Batch<R>& batch;
  int64_t b, L;
  std::vector<std::vector<int64_t>> paths;
  std::vector<double> scores;
  double log_z = 0, entropy = 0;

  Oracle(const Batch<R>& batch, int64_t b) : batch(batch), b(b), L(batch.rows.length(b)), paths(1) {
    for (int64_t l = 0; l < L; ++l) {
      std::vector<std::vector<int64_t>> longer;
      for (const auto& path : paths) {
        for (int64_t k = 0; k < batch.K; ++k) longer.push_back(path), longer.back().push_back(k);
      }
      paths = longer;
    }
    double best = -kInf, sum = 0;
    for (const auto& path : paths)
      scores.push_back(score<double>(path)), best = std::max(best, scores.back());
    if (best == -kInf) {
      log_z = -kInf;
      return;
    }
    for (double s : scores) sum += std::exp(s - best);
    log_z = best + std::log(sum);
    for (double s : scores) entropy -= s == -kInf ? 0 : std::exp(s - log_z) * (s - log_z);
  }

  // In the order in which Viterbi adds up.
  template <class S>
  S score(const std::vector<int64_t>& path) const {
    if (L == 0) return 0;
    S s = 0;
    for (int64_t l = 0; l < L; ++l) s = prefix<S>(path, l) + static_cast<S>(x(l, path[l]));
    return s + static_cast<S>(batch.end[path[L - 1]]);
  }
  // The score of path[0..l], without the emission of l.
  template <class S>
  S prefix(const std::vector<int64_t>& path, int64_t last) const {
    S s = static_cast<S>(batch.start[path[0]]);
    for (int64_t l = 1; l <= last; ++l) {
      s = s + static_cast<S>(x(l - 1, path[l - 1]));
      s = s + static_cast<S>(batch.transitions[path[l - 1] * batch.K + path[l]]);
    }
    return s;
  }
  double x(int64_t l, int64_t k) const { return batch.x(b, batch.rows.of(b)[l], k); }
  double probability(size_t path) const { return log_z == -kInf ? 0 : std::exp(scores[path] - log_z); }
};

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
  exact_nll<R>(batch.model(), tags, batch.which, weighted ? batch.weights.data() : nullptr, kScale,
               out.nll.data(), &grad, out.sums.data(), parallel_for);
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
void test_nll(const Batch<R>& batch, bool tagged, bool weighted, const char* where) {
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
    check(close(got.nll[b], want, std::is_same_v<R, float> ? 1e-6 : 1e-12), "nll", where);
    const Emissions written{got.emissions.data(), batch.type, batch.B, T, K, batch.stride_b, batch.stride_t};
    for (int64_t t = 0; t < T; ++t) {
      load_row(written, b, t, row.data());
      for (int64_t k = 0; k < K; ++k)
        check(close(row[k], emissions[t * K + k], tolerance<R>(batch.type)), "gradient of an emission",
              where);
    }
  }
  for (size_t i = 0; i < sums.size(); ++i)
    check(close(got.sums[i], sums[i], 1e-11), "gradient of a parameter", where);
  const Tags tags{tagged ? batch.tags.data() : nullptr, T, 1};
  exact_nll<R>(batch.model(), tags, batch.which, nullptr, 1.0, values.data(), nullptr, nullptr, serial_for);
  check(values == got.nll, "nll without gradients", where);
  for (int count : {2, 5})
    check(run_nll(batch, tagged, weighted, threads(count)) == got, "nll: threads", where);
}

// ---- entropy and samples ----------------------------------------------------------------------------------

template <class R>
void test_entropy(const Batch<R>& batch, const char* where) {
  std::vector<R> got(batch.B), again(batch.B);
  entropy<R>(batch.model(), got.data(), serial_for);
  entropy<R>(batch.model(), again.data(), threads(3));
  check(got == again, "entropy: threads", where);
  for (int64_t b = 0; b < batch.B; ++b)
    check(close(got[b], Oracle<R>(batch, b).entropy, std::is_same_v<R, float> ? 1e-6 : 1e-12), "entropy",
          where);
}

// The path must be the inverse of the distribution function, tag by tag from the last, at u (away from its
// jumps).
template <class R>
void check_sample(const Oracle<R>& oracle, const R* u, const int64_t* path, const char* where) {
  const int32_t* position = oracle.batch.rows.of(oracle.b);
  for (int64_t l = oracle.L - 1; l >= 0; --l) {
    std::vector<double> weights(oracle.batch.K, 0.0);
    for (size_t i = 0; i < oracle.paths.size(); ++i) {
      bool agrees = true;
      for (int64_t m = l + 1; m < oracle.L; ++m) agrees &= oracle.paths[i][m] == path[position[m]];
      if (agrees) weights[oracle.paths[i][l]] += oracle.probability(i);
    }
    double total = 0, below = 0;
    for (double w : weights) total += w;
    const int64_t tag = path[position[l]];
    if (tag < 0 || tag >= oracle.batch.K) return check(false, "sample: no tag", where);
    for (int64_t k = 0; k < tag; ++k) below += weights[k];
    const double target = u[position[l]] * total, slack = 1e-9 * total;
    check(weights[tag] > 0 && below <= target + slack && target < below + weights[tag] + slack, "sample",
          where);
  }
}

template <class R>
void test_sample(const Batch<R>& batch, std::mt19937& random, const char* where) {
  const int64_t N = 5, B = batch.B, T = batch.T;
  std::vector<R> u(N * B * T);
  for (R& value : u) value = static_cast<R>((random() >> 8) * 0x1p-24);
  u[0] = 0;
  u.back() = std::nextafter(R{1}, R{0});
  std::vector<int64_t> got(N * B * T), again(N * B * T);
  sample<R>(batch.model(), u.data(), N, got.data(), serial_for);
  sample<R>(batch.model(), u.data(), N, again.data(), threads(3));
  check(got == again, "sample: threads", where);
  for (int64_t b = 0; b < B; ++b) {
    const Oracle<R> oracle(batch, b);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t* path = got.data() + (n * B + b) * T;
      const bool dead = oracle.log_z == -kInf;
      if (!dead) check_sample(oracle, u.data() + (n * B + b) * T, path, where);
      for (int64_t t = 0; t < T; ++t)
        check((path[t] == -100) == (dead || batch.tags[b * T + t] == -100), "sample: which are off", where);
    }
  }
}

// ---- nbest ------------------------------------------------------------------------------------------------

// Whether path p comes before q: by score, then, from the last tag to the first, by tag and by score of the
// prefix.
template <class R>
bool ahead(const Oracle<R>& oracle, const std::vector<int64_t>& p, const std::vector<int64_t>& q) {
  const R a = oracle.template score<R>(p), b = oracle.template score<R>(q);
  if (a != b) return a > b;
  for (int64_t l = oracle.L - 1; l >= 0; --l) {
    if (p[l] != q[l]) return p[l] < q[l];
    const R c = oracle.template prefix<R>(p, l), d = oracle.template prefix<R>(q, l);
    if (c != d) return c > d;
  }
  return false;
}

template <class R>
void test_nbest(const Batch<R>& batch, int64_t n, const char* where) {
  const int64_t B = batch.B, T = batch.T;
  std::vector<int64_t> paths(B * n * T), again(B * n * T);
  std::vector<R> scores(B * n), scores_again(B * n);
  nbest<R>(batch.model(), n, paths.data(), scores.data(), serial_for);
  nbest<R>(batch.model(), n, again.data(), scores_again.data(), threads(3));
  check(paths == again && scores == scores_again, "nbest: threads", where);
  for (int64_t b = 0; b < B; ++b) {
    const Oracle<R> oracle(batch, b);
    std::vector<std::vector<int64_t>> want;
    for (const auto& path : oracle.paths)
      if (oracle.template score<R>(path) > -kInf) want.push_back(path);
    std::sort(want.begin(), want.end(), [&](const auto& p, const auto& q) { return ahead(oracle, p, q); });
    for (int64_t rank = 0; rank < n; ++rank) {
      const bool exists = rank < static_cast<int64_t>(want.size());
      const R score = exists ? oracle.template score<R>(want[rank]) : static_cast<R>(-kInf);
      check(scores[b * n + rank] == score, "nbest: score", where);
      std::vector<int64_t> path(T, -100);
      for (int64_t l = 0; exists && l < oracle.L; ++l) path[batch.rows.of(b)[l]] = want[rank][l];
      check(std::equal(path.begin(), path.end(), paths.begin() + (b * n + rank) * T), "nbest: path", where);
    }
  }
}

// Many paths: in order, all different, their scores what they say, and the shorter list a beginning of the
// longer.
void test_nbest_long() {
  std::mt19937 random(7);
  const int64_t n = 1000, T = 12, K = 70;  // n*K needs the wide links
  Batch<float> batch(random, Type::f32, Values::smooth, 1, T, K);
  const int64_t L = batch.rows.length(0);
  for (int64_t l = L - 2; l < L; ++l)
    batch.put(batch.rows.of(0)[l] * batch.stride_t + 3, 50);  // all end in 3 3: high ranks
  std::vector<int64_t> paths(n * T), few(9 * T);
  std::vector<float> scores(n), few_scores(9);
  nbest<float>(batch.model(), n, paths.data(), scores.data(), serial_for);
  nbest<float>(batch.model(), 9, few.data(), few_scores.data(), serial_for);
  check(std::equal(few.begin(), few.end(), paths.begin()), "the 9 best are the first of the 1000 best",
        "long");
  check(std::is_sorted(scores.rbegin(), scores.rend()), "1000 best: order", "long");
  std::vector<std::vector<int64_t>> seen;
  for (int64_t i = 0; i < n; ++i) {
    seen.emplace_back(paths.begin() + i * T, paths.begin() + (i + 1) * T);
    float s = 0;
    for (int64_t l = 0, before = -1; l < L; ++l) {
      const int64_t t = batch.rows.of(0)[l], tag = seen.back()[t];
      s = (l == 0 ? batch.start[tag] : s + batch.transitions[before * K + tag]) +
          static_cast<float>(batch.x(0, t, tag));
      before = tag;
    }
    check(s + batch.end[seen.back()[batch.rows.of(0)[L - 1]]] == scores[i], "1000 best: score", "long");
  }
  std::sort(seen.begin(), seen.end());
  check(std::adjacent_find(seen.begin(), seen.end()) == seen.end(), "1000 best: all different", "long");
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
    check(std::isnan(got.nll[0]) && got.nll[1] == clean.nll[1] && got.nll[2] == clean.nll[2], "nll",
          "poison");
    check(all_nan(got.sums), "sums", "poison");
    std::vector<double> row(3);
    for (int64_t t = 0; t < 4; ++t) {
      load_row(Emissions{got.emissions.data(), batch.type, 3, 4, 3, batch.stride_b, batch.stride_t}, 0, t,
               row.data());
      check(batch.tags[t] == -100 ? row == std::vector<double>(3, 0.0) : all_nan(row), "gradient", "poison");
    }
    std::vector<R> out(3), u(12, R{0.5}), scores(6);
    std::vector<int64_t> path(12), paths(24);
    entropy<R>(batch.model(), out.data(), serial_for);
    check(std::isnan(out[0]) && !std::isnan(out[1]) && !std::isnan(out[2]), "entropy", "poison");
    sample<R>(batch.model(), u.data(), 1, path.data(), serial_for);
    check(std::count(path.begin(), path.begin() + 4, -100) == 4, "sample", "poison");
    nbest<R>(batch.model(), 2, paths.data(), scores.data(), serial_for);
    check(std::isnan(scores[0]) && std::isnan(scores[1]) && !std::isnan(scores[2]), "nbest", "poison");
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
    std::vector<R> entropies(4), scores(8);
    std::vector<int64_t> paths(32);
    entropy<R>(batch.model(), entropies.data(), serial_for);
    nbest<R>(batch.model(), 2, paths.data(), scores.data(), serial_for);
    for (int64_t b = 0; b < 4; ++b) {
      const bool used = batch.rows.length(b) > (repeat % 3 == 0);
      check(std::isnan(got.nll[b]) == used, "nll", "poisoned parameters");
      check(std::isnan(entropies[b]) == used, "entropy", "poisoned parameters");
      check(std::isnan(scores[2 * b]) == used, "nbest", "poisoned parameters");
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
    check(d > -708   ? std::abs(row[1] - want) <= slack
          : d < -709 ? row[1] == 0
                     : row[1] <= want * 1.1,
          "exp", "f64");
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
  check(run_nll(batch, false, false, threads(4)) == got, "threads", "long rows");
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
      check(close(sum, kScale, 1e-9), "marginals sum to 1", "long rows");
    }
  }
  for (int64_t i = 0; i < 17 * 17; ++i) pairs += got.sums[i] - 1;
  for (int64_t i = 0; i < 17; ++i) starts += got.sums[17 * 17 + i] - 1;
  check(close(pairs, want_pairs, 1e-9) && close(starts, want_starts, 1e-9), "pairs sum to L-1", "long rows");
}

// ---- half types -------------------------------------------------------------------------------------------

double half_value(uint32_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? kNaN : sign * kInf;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// Nearest to f, and even between two: `next` is the value after the largest, had the exponent not ended.
template <class Value>
bool nearest_even(double f, uint16_t h, uint16_t infinity, double next, Value value) {
  const auto at = [&](uint32_t m) { return m >= infinity ? next : std::abs(value(m)); };
  const uint32_t m = h & 0x7FFF;
  if (m > infinity || std::signbit(f) != (h >> 15)) return false;
  const double a = std::min(std::abs(f), next), here = std::abs(a - at(m));
  const double down = m > 0 ? std::abs(a - at(m - 1)) : kInf,
               up = m < infinity ? std::abs(a - at(m + 1)) : kInf;
  return here <= down && here <= up && (m % 2 == 0 || (here < down && here < up));
}

void test_halves() {
  const auto bf16_value = [](uint32_t h) {
    return static_cast<double>(bf16_to_float(static_cast<uint16_t>(h)));
  };
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const double value = half_to_float(bits), want = half_value(h);
    check(std::isnan(want) ? std::isnan(value) : value == want && std::signbit(value) == (h >> 15), "from",
          "f16");
    if (!std::isnan(want)) check(float_to_half(half_to_float(bits)) == h, "round trip", "f16");
    if (!std::isnan(bf16_value(h))) check(float_to_bf16(bf16_to_float(bits)) == h, "round trip", "bf16");
    if (std::isnan(bf16_value(h)))
      check(std::isnan(bf16_value(float_to_bf16(bf16_to_float(bits)))), "NaN", "bf16");
  }
  std::mt19937 random(3);
  for (int i = 0; i < 300000; ++i) {
    uint32_t bits = random();
    if (i % 3 == 0) bits &= 0xFFFFE000u >> (i % 4);                       // exact values and halfway cases
    if (i % 2 == 0) bits = (bits & 0x81FFFFFF) | (0x37u + i % 18) << 24;  // the exponents of float16
    const float f = bits_as<float>(bits);
    if (std::isnan(f)) {
      check(std::isnan(half_to_float(float_to_half(f))) && std::isnan(bf16_to_float(float_to_bf16(f))), "NaN",
            "halves");
      continue;
    }
    check(nearest_even(f, float_to_half(f), 0x7C00, 65536.0, half_value), "rounding", "f16");
    check(nearest_even(f, float_to_bf16(f), 0x7F80, 0x1p128, bf16_value), "rounding", "bf16");
  }
}

// ---- all of it --------------------------------------------------------------------------------------------

template <class R>
void test_all(Type type, Values values, const char* where) {
  std::mt19937 random(static_cast<unsigned>(type) * 10 + static_cast<unsigned>(values));
  for (int repeat = 0; repeat < 25; ++repeat) {
    const int64_t B = 1 + random() % 4, T = 1 + random() % 4, K = 1 + random() % 4;
    const Batch<R> batch(random, type, values, B, T, K);
    test_nll(batch, repeat % 2 == 0, repeat % 3 == 0, where);
    test_entropy(batch, where);
    test_sample(batch, random, where);
    for (int64_t n : {1, 2, 5, 20, 300}) test_nbest(batch, n, where);
  }
}

}  // namespace

int main() {
  test_halves();
  for (Values values : {Values::smooth, Values::ties, Values::forbidden, Values::everything_forbidden}) {
    test_all<double>(Type::f64, values, "f64");
    test_all<float>(Type::f32, values, "f32");
    test_all<float>(Type::bf16, values, "bf16");
    test_all<float>(Type::f16, values, "f16");
  }
  for (double poison : {kNaN, kInf}) {
    for (Values values : {Values::smooth, Values::forbidden, Values::everything_forbidden}) {
      test_poison<double>(poison, values);
      test_poison<float>(poison, values);
    }
  }
  for (double poison : {kNaN, kInf}) {
    test_poisoned_parameters<double>(poison);
    test_poisoned_parameters<float>(static_cast<float>(poison));
  }
  test_exp();
  test_nbest_long();
  test_long_rows();
  std::printf("%d failures\n", failures);
  return failures > 0;
}
