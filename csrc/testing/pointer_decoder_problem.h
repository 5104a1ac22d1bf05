// Random problems for the tests of the pointer-generator's decoder, and the decoder itself as a plain loop in
// float64: what the kernels must give. What their gradient must be are the loop's differences.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "pointer/cuda/decoder.h"

namespace fastseq::testing {

using Sizes = pointer::cuda::DecoderSizes;
using Vector = std::vector<double>;

// The inputs, in the order of the op; the last two are zeros that are added to gates and queries, so that
// their gradients are differences, too.
enum Input {
  kInputs,
  kMemory,
  kFeatures,
  kHidden,
  kCell,
  kContext,
  kCoverage,
  kWContext,
  kWIh,
  kWHh,
  kBias,
  kWQuery,
  kBQuery,
  kWCoverage,
  kV,
  kGatesAdded,
  kQueryAdded,
  kInputCount
};
enum Output { kX, kHiddens, kCells, kContexts, kAttention, kCoverageOut, kCoverageLoss, kOutputCount };
using Outputs = std::array<Vector, kOutputCount>;

// What gradient number g of the op is the gradient of.
constexpr Input kGradientOf[] = {kInputs, kGatesAdded, kQueryAdded, kMemory,    kFeatures, kHidden,
                                 kCell,   kContext,    kCoverage,   kWCoverage, kV};
constexpr int kGradients = 11;

enum class Mask { none, right, holes, one_empty };

struct DecoderProblem {
  Sizes n;
  std::array<Vector, kInputCount> in;
  Outputs arriving;                          // gradients of the outputs
  std::array<bool, kOutputCount> arrives{};  // else they are null, and zeros here
  std::vector<uint8_t> mask;                 // (Bm,S)
  bool masked, covered = true;

  DecoderProblem(const Sizes& sizes, Mask kind, unsigned seed, unsigned absent = 0)
      : n(sizes), mask(size_t(sizes.Bm) * sizes.S, 1), masked(kind != Mask::none), random_(seed) {
    for (int i = 0; i < kInputCount; ++i) in[i] = normal(size_of(Input(i)), scale_of(Input(i)));
    for (double& x : in[kCoverage]) x = std::fabs(x);
    in[kGatesAdded].assign(in[kGatesAdded].size(), 0);
    in[kQueryAdded].assign(in[kQueryAdded].size(), 0);
    const Outputs shapes = empty_outputs();
    for (int o = 0; o < kOutputCount; ++o) {
      arrives[o] = !(absent >> o & 1);
      arriving[o] = normal(shapes[o].size(), arrives[o] ? 1 : 0);
    }
    for (int b = 0; b < n.Bm; ++b)
      for (int i = 0; i < n.S; ++i)
        if (is_off(kind, b, i)) turn_off(b, i);
  }

  bool on(int b, int i) const { return mask[size_t(n.source(b)) * n.S + i]; }

  // Whether an input has a part of its own for each row of the batch.
  static bool of_row(Input i) { return i < kWContext || i >= kGatesAdded; }

  Outputs empty_outputs() const {
    const size_t steps = size_t(n.B) * n.T;
    return {Vector(steps * n.E), Vector(steps * n.H),       Vector(steps * n.H), Vector(steps * n.M),
            Vector(steps * n.S), Vector(size_t(n.B) * n.S), Vector(steps)};
  }

  Outputs forward() const {
    Outputs out = empty_outputs();
    for (int b = 0; b < n.B; ++b) forward(b, out);
    return out;
  }

  // All steps of row b.
  void forward(int b, Outputs& out) const {
    Vector h = part(kHidden, b, n.H), c = part(kCell, b, n.H), context = part(kContext, b, n.M),
           coverage = part(kCoverage, b, n.S);
    for (int t = 0; t < n.T; ++t) {
      const size_t step = size_t(b) * n.T + t;
      Vector x = part(kInputs, step, n.E);
      add_product(x, in[kWContext], context);
      recur(step, x, h, c);
      const Vector a = attend(b, ask(step, h, c), coverage);
      read(b, a, context);
      double loss = 0;
      for (int i = 0; i < n.S; ++i)
        if (on(b, i)) loss += a[i] <= coverage[i] ? a[i] : coverage[i], coverage[i] += a[i];
      out[kCoverageLoss][step] = loss;
      put(out[kX], x, step), put(out[kHiddens], h, step), put(out[kCells], c, step);
      put(out[kContexts], context, step), put(out[kAttention], a, step);
    }
    put(out[kCoverageOut], coverage, b);
  }

  // The sum of row b's outputs, weighted by the gradients that arrive at them.
  double objective(int b) const {
    Outputs out = empty_outputs();
    forward(b, out);
    double sum = 0;
    for (int o = 0; o < kOutputCount; ++o) {
      const size_t length = out[o].size() / n.B;
      for (size_t k = b * length; k < (b + 1) * length; ++k) sum += out[o][k] * arriving[o][k];
    }
    return sum;
  }

  // d objective / d element k of an input, summed over the rows that read it.
  double difference(Input i, size_t k) {
    const double step = 1e-5, before = in[i][k];
    double sums[2] = {};
    for (int side = 0; side < 2; ++side) {
      in[i][k] = side ? before - step : before + step;
      const int row = of_row(i) ? int(k / (in[i].size() / n.B)) : -1;
      for (int b = 0; b < n.B; ++b)
        if (row < 0 || row == b) sums[side] += objective(b);
    }
    in[i][k] = before;
    return (sums[0] - sums[1]) / (2 * step);
  }

 private:
  size_t size_of(Input i) const {
    const size_t B = n.B, Bm = n.Bm, T = n.T, S = n.S, E = n.E, H = n.H, M = n.M, A = n.A;
    const size_t sizes[kInputCount] = {B * T * E, Bm * S * M, Bm * S * A, B * H,         B * H,    B * M,
                                       B * S,     E * M,      4 * H * E,  4 * H * H,     4 * H,    2 * A * H,
                                       A,         A,          A,          B * T * 4 * H, B * T * A};
    return sizes[i];
  }
  // Sums of products stay near 1, so that no gate saturates.
  double scale_of(Input i) const {
    return i == kWContext                           ? 1 / std::sqrt(n.M)
           : i == kWIh || i == kWHh || i == kWQuery ? 1 / std::sqrt(n.H + n.E)
                                                    : 1;
  }
  static bool is_off(Mask kind, int b, int i) {
    if (kind == Mask::right) return i > 2 * b + 1;
    if (kind == Mask::holes) return (i * 7 + b) % 3 == 0;
    return kind == Mask::one_empty && (b == 1 || i == 0);
  }
  void turn_off(int b, int i) {
    mask[size_t(b) * n.S + i] = 0;
    const size_t place = size_t(b) * n.S + i;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(in[kMemory].begin() + place * n.M, n.M, nan);
    std::fill_n(in[kFeatures].begin() + place * n.A, n.A, nan);
  }
  Vector normal(size_t size, double scale) {
    Vector out(size);
    std::normal_distribution<double> distribution(0, 1);
    for (double& x : out) x = double(float(scale * distribution(random_)));  // the same as float
    return out;
  }
  Vector part(Input i, size_t row, size_t size) const {
    return {in[i].begin() + row * size, in[i].begin() + (row + 1) * size};
  }
  static void put(Vector& to, const Vector& from, size_t row) {
    std::copy(from.begin(), from.end(), to.begin() + row * from.size());
  }
  // to += matrix from
  static void add_product(Vector& to, const Vector& matrix, const Vector& from) {
    for (size_t r = 0; r < to.size(); ++r)
      for (size_t k = 0; k < from.size(); ++k) to[r] += matrix[r * from.size() + k] * from[k];
  }
  void recur(size_t step, const Vector& x, Vector& h, Vector& c) const {
    Vector gates = part(kGatesAdded, step, size_t(4) * n.H);
    for (int r = 0; r < 4 * n.H; ++r) gates[r] += in[kBias][r];
    add_product(gates, in[kWIh], x);
    add_product(gates, in[kWHh], h);
    const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
    for (int j = 0; j < n.H; ++j) {
      c[j] = sigmoid(gates[n.H + j]) * c[j] + sigmoid(gates[j]) * std::tanh(gates[2 * n.H + j]);
      h[j] = sigmoid(gates[3 * n.H + j]) * std::tanh(c[j]);
    }
  }
  Vector ask(size_t step, const Vector& h, const Vector& c) const {
    Vector query = part(kQueryAdded, step, n.A), state = h;
    for (int k = 0; k < n.A; ++k) query[k] += in[kBQuery][k];
    state.insert(state.end(), c.begin(), c.end());
    add_product(query, in[kWQuery], state);
    return query;
  }
  Vector attend(int b, const Vector& query, const Vector& coverage) const {
    Vector a(n.S, 0);
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int i = 0; i < n.S; ++i) {
      if (!on(b, i)) continue;
      const double* feature = &in[kFeatures][(size_t(n.source(b)) * n.S + i) * n.A];
      for (int k = 0; k < n.A; ++k) {
        const double of_coverage = covered ? in[kWCoverage][k] * coverage[i] : 0;
        a[i] += in[kV][k] * std::tanh(feature[k] + query[k] + of_coverage);
      }
      most = std::max(most, a[i]);
    }
    for (int i = 0; i < n.S; ++i)
      if (on(b, i)) sum += a[i] = std::exp(a[i] - most);
    for (int i = 0; i < n.S; ++i)
      if (on(b, i)) a[i] /= sum;
    return a;
  }
  void read(int b, const Vector& a, Vector& context) const {
    context.assign(n.M, 0);
    for (int i = 0; i < n.S; ++i)
      for (int m = 0; on(b, i) && m < n.M; ++m)
        context[m] += a[i] * in[kMemory][(size_t(n.source(b)) * n.S + i) * n.M + m];
  }

  std::mt19937 random_;
};

}  // namespace fastseq::testing
