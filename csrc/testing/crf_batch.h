// Small random batches, and what their results are by definition: all paths of a row, listed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/half.h"
#include "crf/crf.h"
#include "testing/check.h"

namespace fastseq::testing {

using namespace fastseq::crf;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

enum class Values { smooth, ties, forbidden, everything_forbidden };

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

// All paths of a row: K^L of them.
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

  // In the order in which Viterbi adds up, rounded to S after each addition.
  template <class S>
  S score(const std::vector<int64_t>& path) const {
    return L == 0 ? 0 : prefix<S>(path, L - 1) + static_cast<S>(batch.end[path[L - 1]]);
  }
  // The score of path[0..last], without the end.
  template <class S>
  S prefix(const std::vector<int64_t>& path, int64_t last) const {
    S s = static_cast<S>(batch.start[path[0]]) + static_cast<S>(x(0, path[0]));
    for (int64_t l = 1; l <= last; ++l) {
      s = s + static_cast<S>(batch.transitions[path[l - 1] * batch.K + path[l]]);
      s = s + static_cast<S>(x(l, path[l]));
    }
    return s;
  }
  double x(int64_t l, int64_t k) const { return batch.x(b, batch.rows.of(b)[l], k); }
  double probability(size_t path) const { return log_z == -kInf ? 0 : std::exp(scores[path] - log_z); }
};

// Calls f(batch, repeat, random) with 25 batches of each type and each kind of values, and says which it is.
template <class F>
void for_batches(const F& f) {
  const auto of_type = [&](auto zero, Type type, Values values) {
    std::mt19937 random(static_cast<unsigned>(type) * 10 + static_cast<unsigned>(values));
    for (int repeat = 0; repeat < 25; ++repeat) {
      const int64_t B = 1 + random() % 4, T = 1 + random() % 4, K = 1 + random() % 4;
      context() = "type " + std::to_string(static_cast<int>(type)) + ", values " +
                  std::to_string(static_cast<int>(values)) + ", repeat " + std::to_string(repeat);
      f(Batch<decltype(zero)>(random, type, values, B, T, K), repeat, random);
    }
  };
  for (Values values : {Values::smooth, Values::ties, Values::forbidden, Values::everything_forbidden}) {
    of_type(double{}, Type::f64, values);
    for (Type type : {Type::f32, Type::bf16, Type::f16}) of_type(float{}, type, values);
  }
}

}  // namespace fastseq::testing
