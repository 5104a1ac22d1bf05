// Random CRF problems of any size for the tests of the float32 kernels, and how they may lie in memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "common/half.h"
#include "crf/kernels.h"
#include "testing/memory.h"

namespace fastseq::testing {

using namespace fastseq::crf;

enum class Mask { none, right, holes, holes_and_empty };

struct Problem {
  int64_t B, T, K;
  std::vector<float> x, transitions, start, end, weights;  // x (B,T,K)
  std::vector<int64_t> tags;
  Rows rows;
  bool tagged = true, weighted = true;

  Problem(int64_t B, int64_t T, int64_t K, Mask mask, unsigned seed) : B(B), T(T), K(K), random_(seed) {
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& v, int64_t n) {
      for (int64_t i = 0; i < n; ++i) v.push_back(normal(random_));
    };
    fill(x, B * T * K), fill(transitions, K * K), fill(start, K), fill(end, K), fill(weights, B);
    for (int64_t b = 3; b < B; b += 5) weights[b] = 0;
    std::vector<int64_t> length(B, T);
    for (int64_t& l : length) l = mask == Mask::none ? T : int64_t(random_() % (T + 1));
    keep([&](int64_t b, int64_t t) {
      if (mask == Mask::holes) return random_() % 3 != 0;
      if (mask == Mask::holes_and_empty) return t < length[b] && random_() % 3 != 0;
      return t < length[b];
    });
  }

  // Which positions are on; the rest have no tag.
  template <class On>
  void keep(const On& on) {
    rows.offset = {0};
    rows.positions.clear();
    tags.assign(B * T, -100);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < T; ++t) {
        if (!on(b, t)) continue;
        rows.positions.push_back(int32_t(t));
        tags[b * T + t] = int64_t(random_() % K);
      }
      rows.offset.push_back(int64_t(rows.positions.size()));
    }
  }

  void forbid_some_edges() {
    for (float& a : transitions)
      if (random_() % 3 == 0) a = random_() % 2 ? -1e4f : -std::numeric_limits<float>::infinity();
  }

  // The emission of row b's l-th position that is on.
  float& at(int64_t b, int64_t l, int64_t k) { return x[(b * T + rows.of(b)[l]) * K + k]; }
  Tags gold() const { return {tags.data(), T, 1}; }

 private:
  std::mt19937 random_;
};

enum class Layout { dense, padded, transposed, transposed_and_padded };

// The emissions of a problem in memory: of some type, with some strides.
struct View {
  Type type;
  int64_t stride_b, stride_t;
  Memory<char> memory{0};

  View(const Problem& p, Type type, Layout layout) : type(type) {
    stride_t = layout == Layout::padded ? p.K + 5 : p.K;
    stride_b = p.T * stride_t + (layout == Layout::padded ? 3 : 0);
    if (layout == Layout::transposed) stride_b = p.K, stride_t = p.B * p.K;
    if (layout == Layout::transposed_and_padded) stride_b = p.K + 1, stride_t = p.B * (p.K + 1) + 1;
    memory = Memory<char>(extent(p) * bytes(type));
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t t = 0; t < p.T; ++t) store(b, t, p.K, p.x.data() + (b * p.T + t) * p.K);
  }

  // The same numbers, as rounded to this type, in float64.
  View exactly(const Problem& p) const {
    View out(p, Type::f64, Layout::dense);
    std::vector<double> row(p.K);
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t t = 0; t < p.T; ++t) {
        load_row(emissions(p, memory.data()), b, t, row.data());
        out.store(b, t, p.K, row.data());
      }
    }
    return out;
  }

  int64_t extent(const Problem& p) const {
    return p.B && p.T ? (p.B - 1) * stride_b + (p.T - 1) * stride_t + p.K : 0;
  }
  Emissions emissions(const Problem& p, const void* data) const {
    return {data, type, p.B, p.T, p.K, stride_b, stride_t};
  }

 private:
  template <class R>
  void store(int64_t b, int64_t t, int64_t K, const R* row) {
    store_row(type, memory.data(), b * stride_b + t * stride_t, K, row);
  }
};

template <class R>
struct Parameters {
  Memory<R> transitions, start, end;
  explicit Parameters(const Problem& p) : transitions(p.transitions), start(p.start), end(p.end) {}
  Model<R> model(const Problem& p, const View& view) const {
    return {view.emissions(p, view.memory.data()), p.rows, transitions.data(), start.data(), end.data()};
  }
};

}  // namespace fastseq::testing
