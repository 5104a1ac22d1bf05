// The CRF kernels against plain double-precision recursions, for every layout, type and kind of mask; and the
// same bits from any number of threads. Run once per instruction set; under the sanitizers the buffers have
// no slack to hide in.
#include "crf/crf.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>

#include "common/half.h"
#include "crf/kernels.h"
#include "testing/check.h"

using namespace fastseq;
using namespace fastseq::crf;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

enum class Mask { full, right, holes };

struct Problem {
  int64_t B, T, K;
  std::vector<float> x, transitions, start, end, weights;
  std::vector<int64_t> tags;
  Rows rows;

  Problem(int64_t B, int64_t T, int64_t K, Mask mask, bool hazards) : B(B), T(T), K(K) {
    std::mt19937 random(unsigned(B * 1000003 + T * 1009 + K));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& v, int64_t n) {
      v.resize(n);
      for (float& value : v) value = normal(random);
    };
    fill(x, B * T * K);
    fill(transitions, K * K);
    fill(start, K);
    fill(end, K);
    fill(weights, B);
    if (hazards)  // forbidden edges, and some that are as good as that; the diagonal stays, so that paths
                  // exist
      for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < K; ++j)
          if (i != j && random() % 3 == 0) transitions[i * K + j] = random() % 2 ? -INFINITY : -1e4f;
    tags.assign(B * T, -100);
    rows.offset.push_back(0);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t length = mask == Mask::right ? int64_t(random() % (T + 1)) : T;  // 0: an empty row
      const auto tag = int64_t(random() % K);
      for (int64_t t = 0; t < length; ++t) {
        if (mask == Mask::holes && random() % 3 == 0) continue;
        rows.positions.push_back(int32_t(t));
        tags[b * T + t] = hazards ? tag : int64_t(random() % K);
      }
      rows.offset.push_back(int64_t(rows.positions.size()));
    }
  }
};

// What one row should give, by the definition.
struct Truth {
  double log_z = 0, gold = 0, best = 0, entropy = 0;
  std::vector<double> unary, pairs;  // expected counts: (T,K), (K,K)
};

double log_add(double a, double b) {
  if (a < b) std::swap(a, b);
  return b == -kInf ? a : a + std::log1p(std::exp(b - a));
}

Truth truth(const Problem& p, const std::vector<double>& x, int64_t b) {
  const int64_t L = p.rows.length(b), K = p.K;
  const int32_t* at = p.rows.of(b);
  Truth out;
  out.unary.assign(p.T * K, 0);
  out.pairs.assign(K * K, 0);
  if (L == 0) return out;
  const auto e = [&](int64_t i, int64_t k) { return x[(b * p.T + at[i]) * K + k]; };
  std::vector<double> alpha(L * K, -kInf), best(L * K, -kInf), beta(L * K, -kInf);
  for (int64_t k = 0; k < K; ++k) alpha[k] = best[k] = p.start[k] + e(0, k);
  for (int64_t i = 1; i < L; ++i)
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < K; ++j) {
        alpha[i * K + k] = log_add(alpha[i * K + k], alpha[(i - 1) * K + j] + p.transitions[j * K + k]);
        best[i * K + k] = std::max(best[i * K + k], best[(i - 1) * K + j] + p.transitions[j * K + k]);
      }
      alpha[i * K + k] += e(i, k);
      best[i * K + k] += e(i, k);
    }
  out.log_z = out.best = -kInf;
  for (int64_t k = 0; k < K; ++k) {
    beta[(L - 1) * K + k] = p.end[k];
    out.log_z = log_add(out.log_z, alpha[(L - 1) * K + k] + p.end[k]);
    out.best = std::max(out.best, best[(L - 1) * K + k] + p.end[k]);
  }
  out.entropy = out.log_z;
  const auto count = [&](double log_weight, double score, double& into) {
    const double probability = std::exp(log_weight - out.log_z);
    into += probability;
    if (probability > 0) out.entropy -= probability * score;
  };
  for (int64_t i = L - 1; i >= 0; --i)
    for (int64_t j = 0; j < K; ++j) {
      if (i + 1 < L)
        for (int64_t k = 0; k < K; ++k) {
          const double rest = p.transitions[j * K + k] + e(i + 1, k) + beta[(i + 1) * K + k];
          beta[i * K + j] = log_add(beta[i * K + j], rest);
          count(alpha[i * K + j] + rest, p.transitions[j * K + k], out.pairs[j * K + k]);
        }
      const double ends = e(i, j) + (i == 0 ? p.start[j] : 0.) + (i == L - 1 ? p.end[j] : 0.);
      count(alpha[i * K + j] + beta[i * K + j], ends, out.unary[at[i] * K + j]);
    }
  for (int64_t i = 0; i < L; ++i) {
    const int64_t y = p.tags[b * p.T + at[i]];
    out.gold += e(i, y) + (i == 0 ? p.start[y] : p.transitions[p.tags[b * p.T + at[i - 1]] * K + y]);
  }
  out.gold += p.end[p.tags[b * p.T + at[L - 1]]];
  return out;
}

// n ranges on n threads, as different from the serial order as can be.
void threaded_for(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t parts = std::min<int64_t>(n, 4);
  std::vector<std::thread> threads;
  for (int64_t i = parts - 1; i >= 0; --i)
    threads.emplace_back([=, &f] { f(n * i / parts, n * (i + 1) / parts); });
  for (std::thread& thread : threads) thread.join();
}

// The problem in the types of a kernel: R for parameters and results, the emissions as given.
template <class R>
struct Call {
  const Problem& p;
  std::vector<R> transitions, start, end, weights;
  Model<R> model;

  Call(const Problem& p, const void* x, Type type)
      : p(p),
        transitions(p.transitions.begin(), p.transitions.end()),
        start(p.start.begin(), p.start.end()),
        end(p.end.begin(), p.end.end()),
        weights(p.weights.begin(), p.weights.end()),
        model{
            {x, type, p.B, p.T, p.K, p.T * p.K, p.K}, p.rows, transitions.data(), start.data(), end.data()} {}
};

template <class R>
struct Result {
  std::vector<R> nll, transitions, start, end;
  std::vector<unsigned char> emissions;
  bool operator==(const Result&) const = default;
};

template <class R>
Result<R> run_nll(const Call<R>& call, size_t element, const ParallelFor& parallel_for) {
  const Problem& p = call.p;
  Result<R> out;
  out.nll.assign(p.B, 7);
  out.transitions.assign(p.K * p.K, 7);
  out.start.assign(p.K, 7);
  out.end.assign(p.K, 7);
  out.emissions.assign(p.x.size() * element, 0x77);
  const Gradients<R> gradient{out.emissions.data(),   p.T * p.K,        p.K,
                              out.transitions.data(), out.start.data(), out.end.data()};
  const Tags tags{p.tags.data(), p.T, 1};
  nll<R>(call.model, tags, call.weights.data(), 0.5, out.nll.data(), &gradient, parallel_for);
  return out;
}

template <class R, class X, class Read>
void check_nll(const Problem& p, const std::vector<X>& x, Type type, const Read& read, double tolerance,
               double emission_tolerance) {
  const Call<R> call(p, x.data(), type);
  const Result<R> out = run_nll(call, sizeof(X), serial_for);
  CHECK(out == run_nll(call, sizeof(X), threaded_for));

  std::vector<double> exact(x.size());
  for (size_t i = 0; i < x.size(); ++i) exact[i] = read(x[i]);
  std::vector<double> transitions(p.K * p.K, 0), start(p.K, 0), end(p.K, 0);
  const X* gradient = reinterpret_cast<const X*>(out.emissions.data());
  for (int64_t b = 0; b < p.B; ++b) {
    const Truth want = truth(p, exact, b);
    const double w = 0.5 * p.weights[b];
    const int64_t L = p.rows.length(b);
    CHECK_CLOSE(out.nll[b], want.log_z - want.gold, tolerance);
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t k = 0; k < p.K; ++k) {
        const double observed = p.tags[b * p.T + t] == k;
        CHECK_CLOSE(read(gradient[(b * p.T + t) * p.K + k]), w * (want.unary[t * p.K + k] - observed),
                    emission_tolerance);
      }
    if (L == 0) continue;
    const int64_t first = p.rows.of(b)[0], last = p.rows.of(b)[L - 1];
    for (int64_t k = 0; k < p.K; ++k) {
      start[k] += w * (want.unary[first * p.K + k] - (p.tags[b * p.T + first] == k));
      end[k] += w * (want.unary[last * p.K + k] - (p.tags[b * p.T + last] == k));
    }
    for (int64_t i = 0; i < p.K * p.K; ++i) transitions[i] += w * want.pairs[i];
    for (int64_t i = 1; i < L; ++i) {
      const int64_t from = p.tags[b * p.T + p.rows.of(b)[i - 1]], to = p.tags[b * p.T + p.rows.of(b)[i]];
      transitions[from * p.K + to] -= w;
    }
  }
  for (int64_t i = 0; i < p.K * p.K; ++i) CHECK_CLOSE(out.transitions[i], transitions[i], 4 * tolerance);
  for (int64_t k = 0; k < p.K; ++k) {
    CHECK_CLOSE(out.start[k], start[k], 4 * tolerance);
    CHECK_CLOSE(out.end[k], end[k], 4 * tolerance);
  }
}

double path_score(const Problem& p, int64_t b, const int64_t* path) {
  const int64_t L = p.rows.length(b);
  const int32_t* at = p.rows.of(b);
  for (int64_t t = 0, i = 0; t < p.T; ++t) {
    const bool on = i < L && at[i] == t;
    if (on) ++i;
    CHECK(on ? path[t] >= 0 && path[t] < p.K : path[t] == -100);
  }
  double score = 0;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t y = path[at[i]];
    score +=
        p.x[(b * p.T + at[i]) * p.K + y] + (i == 0 ? p.start[y] : p.transitions[path[at[i - 1]] * p.K + y]);
    if (i == L - 1) score += p.end[y];
  }
  return score;
}

void check_decoders(const Problem& p) {
  const Call<float> call(p, p.x.data(), Type::f32);
  std::vector<int64_t> paths(p.B * p.T, 7), again(p.B * p.T, 7);
  std::vector<float> scores(p.B, 7), scores_again(p.B, 7);
  FASTSEQ_SELECT(viterbi)(call.model, paths.data(), scores.data(), serial_for);
  FASTSEQ_SELECT(viterbi)(call.model, again.data(), scores_again.data(), threaded_for);
  CHECK(paths == again && scores == scores_again);

  const int64_t n = 3;
  std::vector<int64_t> best(p.B * n * p.T, 7);
  std::vector<float> best_scores(p.B * n, 7), entropies(p.B, 7);
  nbest(call.model, n, best.data(), best_scores.data(), threaded_for);
  entropy(call.model, entropies.data(), threaded_for);
  std::vector<float> uniforms(2 * p.B * p.T);
  std::mt19937 random(1);
  for (float& u : uniforms) u = std::uniform_real_distribution<float>(0, 1)(random);
  std::vector<int64_t> samples(uniforms.size(), 7);
  sample(call.model, uniforms.data(), 2, samples.data(), threaded_for);

  const std::vector<double> x(p.x.begin(), p.x.end());
  for (int64_t b = 0; b < p.B; ++b) {
    const Truth want = truth(p, x, b);
    CHECK_CLOSE(scores[b], want.best, 1e-5);
    CHECK_CLOSE(path_score(p, b, &paths[b * p.T]), want.best, 1e-5);
    CHECK_CLOSE(best_scores[b * n], want.best, 1e-5);
    CHECK_CLOSE(entropies[b], want.entropy, 1e-4);
    for (int64_t i = 0; i < n; ++i) {
      if (best_scores[b * n + i] == -INFINITY) continue;
      CHECK_CLOSE(path_score(p, b, &best[(b * n + i) * p.T]), best_scores[b * n + i], 1e-5);
      CHECK(i == 0 || best_scores[b * n + i] <= best_scores[b * n + i - 1]);
    }
    for (int64_t i = 0; i < 2; ++i) CHECK(path_score(p, b, &samples[(i * p.B + b) * p.T]) > -INFINITY);
  }
}

void check(const Problem& p) {
  const auto same = [](auto v) { return double(v); };
  check_nll<float>(p, p.x, Type::f32, same, 2e-5, 2e-5);
  check_nll<double>(p, std::vector<double>(p.x.begin(), p.x.end()), Type::f64, same, 1e-11, 1e-11);
  std::vector<uint16_t> half(p.x.size());
  std::transform(p.x.begin(), p.x.end(), half.begin(), float_to_bf16);
  check_nll<float>(p, half, Type::bf16, bf16_to_float, 2e-5, 1e-2);
  std::transform(p.x.begin(), p.x.end(), half.begin(), float_to_half);
  check_nll<float>(p, half, Type::f16, half_to_float, 2e-5, 1e-3);
  check_decoders(p);
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  for (int64_t K : {1, 2, 9, 16, 17, 25, 33, 64, 130})
    for (int64_t B : {1, 5, 33})
      for (int64_t T : {1, 2, 13}) {
        if (K > 64 && B > 5) continue;
        check(Problem(B, T, K, Mask::full, false));
        check(Problem(B, T, K, Mask::right, true));
        check(Problem(B, T, K, Mask::holes, false));
        check(Problem(B, T, K, Mask::holes, true));
      }
  check(Problem(2, 400, 9, Mask::right, true));
  check(Problem(2, 400, 40, Mask::full, false));
  return fastseq::testing::summary("crf");
}
