// The pointer-generator's loss: float64 against the definition (each p(v) of the extended vocabulary, in
// plain loops) and its differences; the other types against float64 on the same numbers; what may go wrong in
// float32; and the same bits from any number of threads. Run once per instruction set. Every buffer ends
// where memory ends.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "pointer/nll.h"
#include "testing/check.h"
#include "testing/numbers.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;
using pointer::Nll;
using pointer::NllGradients;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kIgnored = -100;

struct Case {
  int64_t B, T, S, V, H;
  bool gate = true, bias = true;
  double smoothing = 0, z_loss = 0;
  std::vector<double> hidden, weight, biases, copy, gates, weights;
  std::vector<int64_t> source, target;

  Case(int64_t B, int64_t T, int64_t S, int64_t V, int64_t H, unsigned seed) : B(B), T(T), S(S), V(V), H(H) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>& v, int64_t n, double scale) {
      for (int64_t i = 0; i < n; ++i) v.push_back(float_to_bf16(float(normal(random) * scale)));
      for (double& x : v) x = bf16_to_float(uint16_t(x));  // a number of every type
    };
    fill(hidden, B * T * H, 1), fill(weight, V * H, 1 / std::sqrt(double(H))), fill(biases, V, 1);
    fill(copy, B * T * S, 1), fill(gates, B * T, 1), fill(weights, B * T, 1);
    for (double& a : copy) a = std::fabs(a) / double(S);
    for (int64_t i = 0; i < B * S; ++i) source.push_back(int64_t(random() % (V + 3)) - 1);
    for (int64_t b = 0; b < B && S > 2; ++b) source[b * S + 2] = source[b * S];
    for (int64_t i = 0; i < B * T; ++i) {
      const int64_t b = i / T;
      target.push_back(S && random() % 2 ? std::max<int64_t>(0, source[b * S + int64_t(random() % S)])
                                         : int64_t(random() % (V + 1)));
      if (random() % 7 == 0) target[i] = kIgnored;
      if (random() % 7 == 0) weights[i] = 0;
    }
  }
};

// -log p(y) and the terms of smoothing and z-loss of one row, from the definition.
double defined_value(const Case& c, int64_t b, int64_t t) {
  const int64_t row = b * c.T + t, y = c.target[row];
  std::vector<double> z(c.V);
  double lse = 0, top = -kInfinity;
  for (int64_t v = 0; v < c.V; ++v) {
    z[v] = c.bias ? c.biases[v] : 0;
    for (int64_t h = 0; h < c.H; ++h) z[v] += c.weight[v * c.H + h] * c.hidden[row * c.H + h];
    top = std::max(top, z[v]);
  }
  for (const double x : z) lse += std::exp(x - top);
  lse = top + std::log(lse);
  double everything = std::exp(lse);
  for (int64_t s = 0; s < c.S; ++s)
    if (c.source[b * c.S + s] >= 0) everything += std::exp(c.copy[row * c.S + s]);
  const double generate = 1 / (1 + std::exp(-c.gates[row])), keep = 1 / (1 + std::exp(c.gates[row]));
  const auto p = [&](int64_t word) {
    double sum = word >= c.V ? 0
                 : c.gate    ? generate * std::exp(z[word] - lse)
                             : std::exp(z[word]) / everything;
    for (int64_t s = 0; s < c.S; ++s) {
      const double copy = c.copy[row * c.S + s];
      if (c.source[b * c.S + s] == word) sum += c.gate ? keep * copy : std::exp(copy) / everything;
    }
    return sum;
  };
  double value = -(1 - c.smoothing) * std::log(p(y));
  for (int64_t v = 0; v < c.V && c.smoothing != 0; ++v) value -= c.smoothing / double(c.V) * std::log(p(v));
  return value + (c.z_loss != 0 ? c.z_loss * lse * lse : 0);
}

double defined_total(const Case& c) {
  double total = 0;
  for (int64_t i = 0; i < c.B * c.T; ++i)
    if (c.target[i] != kIgnored && c.weights[i] != 0)
      total += c.weights[i] * defined_value(c, i / c.T, i % c.T);
  return total;
}

// ---- running the kernels ---------------------------------------------------------------------------------

struct Types {
  Type hidden, weight;
};

template <class R>
struct Results {
  Memory<R> values, total, bias, copy, gate;
  Memory<char> hidden, weight;
  Results(const Case& c, Types types)
      : values(c.B * c.T),
        total(1),
        bias(c.bias ? c.V : 0),
        copy(c.B * c.T * c.S),
        gate(c.gate ? c.B * c.T : 0),
        hidden(c.B * c.T * c.H * bytes(types.hidden)),
        weight(c.V * c.H * bytes(types.weight)) {}
};

template <class R>
bool same(const Results<R>& a, const Results<R>& b) {
  return same_bits(a.values, b.values) && same_bits(a.total, b.total) && same_bits(a.bias, b.bias) &&
         same_bits(a.copy, b.copy) && same_bits(a.gate, b.gate) && same_bits(a.hidden, b.hidden) &&
         same_bits(a.weight, b.weight);
}

template <class R>
Results<R> run(const Case& c, Types types, const ParallelFor& parallel) {
  const Memory<char> hidden = stored(c.hidden, types.hidden), weight = stored(c.weight, types.weight);
  const Memory<R> bias(c.biases), copy(c.copy), gates(c.gates), weights(c.weights);
  const Memory<int64_t> source(c.source), target(c.target);
  const Nll<R> problem{c.B,
                       c.T,
                       c.S,
                       c.V,
                       c.H,
                       hidden.data(),
                       types.hidden,
                       c.T * c.H,
                       c.H,
                       weight.data(),
                       types.weight,
                       c.bias ? bias.data() : nullptr,
                       copy.data(),
                       c.T * c.S,
                       c.S,
                       c.gate ? gates.data() : nullptr,
                       c.T,
                       1,
                       source.data(),
                       c.S,
                       1,
                       target.data(),
                       c.T,
                       1,
                       kIgnored,
                       c.smoothing,
                       c.z_loss};
  Results<R> out(c, types);
  pointer::nll<R>(problem, out.values.data(), parallel);
  pointer::nll_grad<R>(problem,
                       {weights.data(), out.total.data(), out.hidden.data(), out.weight.data(),
                        out.bias.data(), out.copy.data(), out.gate.data()},
                       parallel);
  return out;
}

void name_case(const std::string& what, const Case& c) {
  context() = what + ": B " + std::to_string(c.B) + ", T " + std::to_string(c.T) + ", S " +
              std::to_string(c.S) + ", V " + std::to_string(c.V) + ", H " + std::to_string(c.H) +
              (c.gate ? "" : ", CopyNet") + (c.bias ? "" : ", no bias") +
              (c.smoothing != 0 ? ", smoothing" : "") + (c.z_loss != 0 ? ", z-loss" : "");
}

// ---- float64 against the definition ----------------------------------------------------------------------

void check_definition(Case c) {
  name_case("definition", c);
  const Results<double> got = run<double>(c, {Type::f64, Type::f64}, serial_for);
  for (int64_t i = 0; i < c.B * c.T; ++i)
    CHECK_CLOSE(got.values[i], c.target[i] == kIgnored ? 0 : defined_value(c, i / c.T, i % c.T), 1e-12);
  if (std::isinf(*got.total.data())) return;
  CHECK_CLOSE(*got.total.data(), defined_total(c), 1e-12);
  const auto check = [&](std::vector<double>& input, const double* gradient, int64_t n) {
    for (int64_t i = 0; i < n; i += 1 + n / 20) {
      const double x = input[i], step = 1e-5;
      input[i] = x + step;
      const double above = defined_total(c);
      input[i] = x - step;
      const double below = defined_total(c);
      input[i] = x;
      CHECK_CLOSE(gradient[i], (above - below) / (2 * step), 1e-7);
    }
  };
  std::vector<double> hidden = loaded(got.hidden, Type::f64), weight = loaded(got.weight, Type::f64);
  check(c.hidden, hidden.data(), int64_t(hidden.size()));
  check(c.weight, weight.data(), int64_t(weight.size()));
  check(c.copy, got.copy.data(), got.copy.size());
  check(c.gates, got.gate.data(), got.gate.size());
  check(c.biases, got.bias.data(), got.bias.size());
}

// No target is without any probability: its value would be infinite, and have no differences.
void make_possible(Case& c) {
  for (int64_t& y : c.target)
    if (y >= c.V) y = c.V - 1;
}

// ---- the other types against float64 ---------------------------------------------------------------------

template <class R>
std::vector<double> plain(const Memory<R>& m) {
  return {m.data(), m.data() + m.size()};
}

void check_types(const Case& c) {
  const Results<double> want = run<double>(c, {Type::f64, Type::f64}, serial_for);
  const Types all[] = {{Type::f32, Type::f32},
                       {Type::bf16, Type::bf16},
                       {Type::bf16, Type::f32},
                       {Type::f16, Type::f16},
                       {Type::f16, Type::f32}};
  for (const Types types : all) {
    name_case("types " + std::to_string(int(types.hidden)) + " " + std::to_string(int(types.weight)), c);
    const Results<float> got = run<float>(c, types, serial_for);
    const double rounded = types.hidden == Type::bf16 ? 1e-2 : types.hidden == Type::f16 ? 1e-3 : 5e-6;
    check_near("values", plain(got.values), plain(want.values), 3e-6);
    check_near("gate", plain(got.gate), plain(want.gate), 5e-6);
    check_near("copy", plain(got.copy), plain(want.copy), 5e-6);
    check_near("bias", plain(got.bias), plain(want.bias), 5e-6);
    check_near("hidden", loaded(got.hidden, types.hidden), loaded(want.hidden, Type::f64), rounded);
    check_near("weight", loaded(got.weight, types.weight), loaded(want.weight, Type::f64), rounded);
    for (int count : {2, 5}) CHECK(same(got, run<float>(c, types, threads(count))));
  }
  name_case("threads", c);
  CHECK(same(want, run<double>(c, {Type::f64, Type::f64}, threads(3))));
}

// ---- what may go wrong -----------------------------------------------------------------------------------

void check_extremes() {
  for (const double gate : {-200., -60., 60., 200.}) {
    Case c(2, 9, 6, 70, 20, 5);
    for (double& g : c.gates) g = gate;
    for (double& x : c.hidden) x *= 128;
    check_types(c);
    for (double& x : c.hidden) x /= 128;
    make_possible(c);
    c.smoothing = 0.1, c.z_loss = 0.01;
    check_types(c);
  }
  Case forbidden(2, 9, 6, 70, 20, 6);
  for (int64_t v = 0; v < 70; v += 3) forbidden.biases[v] = -kInfinity;
  check_types(forbidden);
  forbidden.smoothing = 0.1;  // any word that is forbidden, and not in the source: infinite, and no gradient
  name_case("forbidden", forbidden);
  const Results<float> got = run<float>(forbidden, {Type::f32, Type::f32}, serial_for);
  for (int64_t i = 0; i < 18; ++i) CHECK(got.values[i] == (forbidden.target[i] == kIgnored ? 0.f : INFINITY));
  for (const double x : loaded(got.weight, Type::f32)) CHECK(x == 0);
  Case padding(2, 9, 6, 70, 20, 7);
  padding.gate = false;
  for (int64_t i = 0; i < 2 * 9 * 6; i += 2) padding.copy[i] = -kInfinity;
  check_types(padding);
  for (double& e : padding.copy) e = -kInfinity;
  check_types(padding);
}

// A row's NaN stays in the row; a row that is ignored, or needs no vocabulary, is not read.
void check_poison() {
  for (const double poison : {double(NAN), kInfinity}) {
    Case c(2, 40, 6, 300, 20, 8);
    for (int64_t& y : c.target) y = std::min<int64_t>(std::max<int64_t>(y, 0), c.V - 1);
    for (double& w : c.weights) w = 1;
    c.target[3] = kIgnored, c.target[4] = c.V + 7, c.weights[5] = 0;
    const Results<float> clean = run<float>(c, {Type::f32, Type::f32}, serial_for);
    for (const int64_t row : {3, 4, 5}) c.hidden[row * c.H + 1] = poison;
    name_case("not read", c);
    Results<float> got = run<float>(c, {Type::f32, Type::f32}, serial_for);
    got.values[5] = clean.values[5];  // a value has no weight
    CHECK(same(got, clean));
    c.hidden[50 * c.H + 2] = poison;
    name_case("poison", c);
    got = run<float>(c, {Type::f32, Type::f32}, serial_for);
    const std::vector<double> hidden = loaded(got.hidden, Type::f32),
                              before = loaded(clean.hidden, Type::f32);
    for (int64_t i = 0; i < 80; ++i) {
      if (i == 5) continue;
      CHECK(i == 50 ? std::isnan(got.values[i]) : got.values[i] == clean.values[i]);
      for (int64_t h = 0; h < c.H; ++h)
        CHECK(i == 50 ? std::isnan(hidden[i * c.H + h]) : hidden[i * c.H + h] == before[i * c.H + h]);
    }
    CHECK(std::isnan(*got.total.data()) && std::isnan(loaded(got.weight, Type::f32)[7]));
  }
}

// p(y) = 0: infinite, and without a gradient.
void check_impossible() {
  for (const bool gate : {true, false}) {
    Case c(1, 3, 4, 30, 8, 9);
    c.gate = gate;
    c.target = {1000, 1000, kIgnored};
    c.weights = {1, 0, 1};
    name_case("impossible", c);
    const Results<float> got = run<float>(c, {Type::f32, Type::f32}, serial_for);
    CHECK(got.values[0] == INFINITY && got.values[2] == 0 && *got.total.data() == INFINITY);
    for (const Memory<float>* m : {&got.copy, &got.gate, &got.bias})
      for (int64_t i = 0; i < m->size(); ++i) CHECK((*m)[i] == 0);
    for (const double x : loaded(got.hidden, Type::f32)) CHECK(x == 0);
    for (const double x : loaded(got.weight, Type::f32)) CHECK(x == 0);
  }
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  unsigned seed = 0;
  const int64_t small[][5] = {{1, 1, 1, 1, 1}, {2, 5, 7, 11, 8}, {3, 4, 0, 13, 5},
                              {0, 3, 2, 4, 5}, {2, 0, 3, 4, 5},  {1, 8, 20, 9, 3}};
  for (const auto& s : small) {
    for (int way = 0; way < 6; ++way) {
      Case c(s[0], s[1], s[2], s[3], s[4], ++seed);
      c.gate = way < 4, c.bias = way % 2 == 0;
      if (way % 4 >= 2 && c.gate) c.smoothing = 0.125;
      if (way == 1 || way == 2) c.z_loss = 0.01;
      make_possible(c);
      check_definition(c);
    }
  }
  // Around the sizes of blocks, panels and tiles.
  const int64_t sizes[][5] = {{1, 1, 3, 95, 15},    {2, 33, 5, 96, 16},  {1, 64, 5, 97, 17},
                              {3, 21, 9, 193, 64},  {1, 65, 1, 385, 65}, {2, 257, 4, 30, 7},
                              {1, 12, 4, 1500, 129}};
  for (const auto& s : sizes) {
    for (int way = 0; way < 3; ++way) {
      Case c(s[0], s[1], s[2], s[3], s[4], ++seed);
      c.gate = way < 2, c.bias = seed % 3 != 0;
      if (way == 1) c.smoothing = 0.1, c.z_loss = 0.01, make_possible(c);
      check_types(c);
    }
  }
  check_extremes();
  check_poison();
  check_impossible();
  return summary("pointer nll");
}
