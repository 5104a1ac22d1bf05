// sample.cpp, nbest.cpp and viterbi.cpp against their definitions: every path of many small random batches is
// listed, in every type of emissions, with holes, empty rows, -inf, NaN and ties.
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

// ---- samples ----------------------------------------------------------------------------------------------

// The path must be the inverse of the distribution function, tag by tag from the last, at u (away from its
// jumps).
template <class R>
void check_sample(const Oracle<R>& oracle, const R* u, const int64_t* path) {
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
    CHECK(tag >= 0 && tag < oracle.batch.K);
    if (tag < 0 || tag >= oracle.batch.K) return;
    for (int64_t k = 0; k < tag; ++k) below += weights[k];
    const double target = u[position[l]] * total, slack = 1e-9 * total;
    CHECK(weights[tag] > 0 && below <= target + slack && target < below + weights[tag] + slack);
  }
}

template <class R>
void test_sample(const Batch<R>& batch, std::mt19937& random) {
  const int64_t N = 5, B = batch.B, T = batch.T;
  std::vector<R> u(N * B * T);
  for (R& value : u) value = static_cast<R>((random() >> 8) * 0x1p-24);
  u[0] = 0;
  u.back() = std::nextafter(R{1}, R{0});
  std::vector<int64_t> got(N * B * T), again(N * B * T);
  FASTSEQ_SELECT(sample<R>)(batch.model(), u.data(), N, got.data(), serial_for);
  FASTSEQ_SELECT(sample<R>)(batch.model(), u.data(), N, again.data(), threads(3));
  CHECK(got == again);
  for (int64_t b = 0; b < B; ++b) {
    const Oracle<R> oracle(batch, b);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t* path = got.data() + (n * B + b) * T;
      const bool dead = oracle.log_z == -kInf;
      if (!dead) check_sample(oracle, u.data() + (n * B + b) * T, path);
      for (int64_t t = 0; t < T; ++t) CHECK((path[t] == -100) == (dead || batch.tags[b * T + t] == -100));
    }
  }
}

// ---- nbest ------------------------------------------------------------------------------------------------

// Whether path p comes before q: by score, then, from the last tag to the first, by tag and by score of the
// prefix that ends there.
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
void test_nbest(const Batch<R>& batch, int64_t n) {
  const int64_t B = batch.B, T = batch.T;
  std::vector<int64_t> paths(B * n * T), again(B * n * T);
  std::vector<R> scores(B * n), scores_again(B * n);
  FASTSEQ_SELECT(nbest<R>)(batch.model(), n, paths.data(), scores.data(), serial_for);
  FASTSEQ_SELECT(nbest<R>)(batch.model(), n, again.data(), scores_again.data(), threads(3));
  CHECK(paths == again && scores == scores_again);
  for (int64_t b = 0; b < B; ++b) {
    const Oracle<R> oracle(batch, b);
    std::vector<std::vector<int64_t>> want;
    for (const auto& path : oracle.paths)
      if (oracle.template score<R>(path) > -kInf) want.push_back(path);
    std::sort(want.begin(), want.end(), [&](const auto& p, const auto& q) { return ahead(oracle, p, q); });
    for (int64_t rank = 0; rank < n; ++rank) {
      const bool exists = rank < static_cast<int64_t>(want.size());
      const R score = exists ? oracle.template score<R>(want[rank]) : static_cast<R>(-kInf);
      CHECK(scores[b * n + rank] == score);
      std::vector<int64_t> path(T, -100);
      for (int64_t l = 0; exists && l < oracle.L; ++l) path[batch.rows.of(b)[l]] = want[rank][l];
      CHECK(std::equal(path.begin(), path.end(), paths.begin() + (b * n + rank) * T));
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
  FASTSEQ_SELECT(nbest<float>)(batch.model(), n, paths.data(), scores.data(), serial_for);
  FASTSEQ_SELECT(nbest<float>)(batch.model(), 9, few.data(), few_scores.data(), serial_for);
  CHECK(std::equal(few.begin(), few.end(), paths.begin()));
  CHECK(std::is_sorted(scores.rbegin(), scores.rend()));
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
    CHECK(s + batch.end[seen.back()[batch.rows.of(0)[L - 1]]] == scores[i]);
  }
  std::sort(seen.begin(), seen.end());
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
}

// ---- viterbi ----------------------------------------------------------------------------------------------

// The path that comes first of all, -inf or not, and the one that is first of the n best.
template <class R>
void test_viterbi(const Batch<R>& batch) {
  const int64_t B = batch.B, T = batch.T;
  std::vector<int64_t> paths(B * T), again(B * T);
  std::vector<R> scores(B), scores_again(B);
  FASTSEQ_SELECT(viterbi_exact<R>)(batch.model(), paths.data(), scores.data(), serial_for);
  FASTSEQ_SELECT(viterbi_exact<R>)(batch.model(), again.data(), scores_again.data(), threads(3));
  CHECK(paths == again && scores == scores_again);
  for (int64_t b = 0; b < B; ++b) {
    const Oracle<R> oracle(batch, b);
    const auto& want = *std::min_element(oracle.paths.begin(), oracle.paths.end(),
                                         [&](const auto& p, const auto& q) { return ahead(oracle, p, q); });
    CHECK(scores[b] == oracle.template score<R>(want));
    std::vector<int64_t> path(T, -100);
    for (int64_t l = 0; l < oracle.L; ++l) path[batch.rows.of(b)[l]] = want[l];
    CHECK(std::equal(path.begin(), path.end(), paths.begin() + b * T));
  }
  if constexpr (std::is_same_v<R, float>) {
    FASTSEQ_SELECT(viterbi)(batch.model(), again.data(), scores_again.data(), serial_for);
    CHECK(paths == again && scores == scores_again);
  }
}

// ---- NaN and infinity -------------------------------------------------------------------------------------

// One poisoned position of row 0 must spoil row 0 and the sums, whatever else is forbidden, and no other row.
template <class R>
void test_poison(double poison, Values values) {
  std::mt19937 random(11);
  for (int repeat = 0; repeat < 50; ++repeat) {
    Batch<R> batch(random, sizeof(R) == 8 ? Type::f64 : Type::f32, values, 3, 4, 3);
    if (batch.rows.length(0) == 0) continue;
    const int64_t l = random() % batch.rows.length(0);
    batch.put(batch.rows.of(0)[l] * batch.stride_t + random() % 3, poison);
    std::vector<R> best(3), u(12, R{0.5}), scores(6);
    std::vector<int64_t> path(12), paths(24);
    FASTSEQ_SELECT(sample<R>)(batch.model(), u.data(), 1, path.data(), serial_for);
    CHECK(std::count(path.begin(), path.begin() + 4, -100) == 4);
    FASTSEQ_SELECT(nbest<R>)(batch.model(), 2, paths.data(), scores.data(), serial_for);
    CHECK(std::isnan(scores[0]) && std::isnan(scores[1]) && !std::isnan(scores[2]));
    FASTSEQ_SELECT(viterbi_exact<R>)(batch.model(), path.data(), best.data(), serial_for);
    CHECK(std::isnan(best[0]) && !std::isnan(best[1]) && !std::isnan(best[2]));
    for (int64_t t = 0; t < 4; ++t)
      CHECK(batch.tags[t] == -100 ? path[t] == -100 : path[t] >= 0 && path[t] < 3);
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
    std::vector<R> best(4), scores(8);
    std::vector<int64_t> paths(32);
    FASTSEQ_SELECT(viterbi_exact<R>)(batch.model(), paths.data(), best.data(), serial_for);
    FASTSEQ_SELECT(nbest<R>)(batch.model(), 2, paths.data(), scores.data(), serial_for);
    for (int64_t b = 0; b < 4; ++b) {
      const bool used = batch.rows.length(b) > (repeat % 3 == 0);
      CHECK(std::isnan(scores[2 * b]) == used);
      CHECK(std::isnan(best[b]) == used);
    }
  }
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  for_batches([](const auto& batch, int, std::mt19937& random) {
    test_sample(batch, random);
    for (int64_t n : {1, 2, 5, 20, 300}) test_nbest(batch, n);
    test_viterbi(batch);
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
  context() = "long";
  test_nbest_long();
  return summary("crf_paths");
}
