// The attention decoder against plain loops in double: forward for every option, backward against differences
// of the forward loops, and the same bits for any number of threads.
#include <cstring>
#include <functional>
#include <random>

#include "pointer/decoder.h"
#include "testing/check.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::pointer;

enum Input {
  inputs,
  memory,
  features,
  hidden,
  cell,
  context,
  coverage,
  w_context,
  w_ih,
  w_hh,
  bias,
  w_query,
  b_query,
  w_coverage,
  v,
  kInputs
};
enum Output { x, hiddens, cells, contexts, attention, coverage_out, loss, kOutputs };

template <class R>
using Arrays = std::vector<std::vector<R>>;

struct Problem {
  int64_t B, Bm, T, S, E, H, M, A;
  bool covers;
  SourcePositions on;
  Arrays<double> in;

  // Every third memory has no position on where there are holes; the features of the others hold NaN there.
  Problem(std::vector<int64_t> n, bool covers_, bool holes, unsigned seed)
      : B(n[0]),
        Bm(n[1]),
        T(n[2]),
        S(n[3]),
        E(n[4]),
        H(n[5]),
        M(n[6]),
        A(n[7]),
        covers(covers_),
        in(kInputs) {
    std::mt19937 random(seed);
    const int64_t sizes[kInputs] = {B * T * E, Bm * S * M, Bm * S * A, B * H,     B * H, B * M, B * S, E * M,
                                    4 * H * E, 4 * H * H,  4 * H,      A * 2 * H, A,     A,     A};
    for (int k = 0; k < kInputs; ++k)
      for (int64_t i = 0; i < sizes[k]; ++i) {
        const double u = double(random()) / 4294967296.0;
        in[k].push_back(double(float(k == coverage ? 0.1 * u : 0.8 * (2 * u - 1))));
      }
    on.offset.push_back(0);
    for (int64_t m = 0; m < Bm; ++m) {
      for (int64_t s = 0; s < S; ++s)
        if (!holes || (m % 3 != 1 && random() % 3))
          on.positions.push_back(int32_t(s));
        else
          in[features][(m * S + s) * A] = in[memory][(m * S + s) * M] = NAN;
      on.offset.push_back(int64_t(on.positions.size()));
    }
  }
  std::vector<int64_t> output_sizes() const {
    return {B * T * E, B * T * H, B * T * H, B * T * M, B * T * S, B * S, B * T};
  }
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

Arrays<double> plain(const Problem& p, const Arrays<double>& in) {
  Arrays<double> out;
  for (const int64_t size : p.output_sizes()) out.emplace_back(size, 0.0);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t m = b / (p.B / p.Bm);
    const auto row = [&](int k, int64_t size) {
      return std::vector<double>(in[k].data() + b * size, in[k].data() + (b + 1) * size);
    };
    auto h = row(hidden, p.H), c = row(cell, p.H), ctx = row(context, p.M), cov = row(coverage, p.S);
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t bt = b * p.T + t;
      std::vector<double> gates(in[bias]), q(in[b_query]), e;
      for (int64_t n = 0; n < p.E; ++n) {
        double sum = in[inputs][bt * p.E + n];
        for (int64_t k = 0; k < p.M; ++k) sum += in[w_context][n * p.M + k] * ctx[k];
        out[x][bt * p.E + n] = sum;
      }
      for (int64_t n = 0; n < 4 * p.H; ++n) {
        for (int64_t k = 0; k < p.E; ++k) gates[n] += in[w_ih][n * p.E + k] * out[x][bt * p.E + k];
        for (int64_t k = 0; k < p.H; ++k) gates[n] += in[w_hh][n * p.H + k] * h[k];
      }
      for (int64_t j = 0; j < p.H; ++j) {
        c[j] = sigmoid(gates[p.H + j]) * c[j] + sigmoid(gates[j]) * std::tanh(gates[2 * p.H + j]);
        h[j] = sigmoid(gates[3 * p.H + j]) * std::tanh(c[j]);
        out[hiddens][bt * p.H + j] = h[j], out[cells][bt * p.H + j] = c[j];
      }
      for (int64_t n = 0; n < p.A; ++n)
        for (int64_t k = 0; k < p.H; ++k)
          q[n] += in[w_query][n * 2 * p.H + k] * h[k] + in[w_query][n * 2 * p.H + p.H + k] * c[k];
      double total = 0;
      std::fill(ctx.begin(), ctx.end(), 0.0);
      const int64_t n_on = p.on.count(m);
      for (int64_t i = 0; i < n_on; ++i) {
        const int64_t s = p.on.of(m)[i];
        double score = 0;
        for (int64_t k = 0; k < p.A; ++k)
          score += in[v][k] * std::tanh(in[features][(m * p.S + s) * p.A + k] + q[k] +
                                        (p.covers ? in[w_coverage][k] * cov[s] : 0));
        e.push_back(std::exp(score));
        total += e.back();
      }
      for (int64_t i = 0; i < n_on; ++i) {
        const int64_t s = p.on.of(m)[i];
        const double a = e[i] / total;
        out[attention][bt * p.S + s] = a;
        out[loss][bt] += std::min(a, cov[s]);
        cov[s] += a;
        for (int64_t k = 0; k < p.M; ++k) ctx[k] += a * in[memory][(m * p.S + s) * p.M + k];
      }
      std::copy(ctx.begin(), ctx.end(), out[contexts].data() + bt * p.M);
    }
    std::copy(cov.begin(), cov.end(), out[coverage_out].data() + b * p.S);
  }
  return out;
}

template <class R>
Arrays<R> converted(const Arrays<double>& from) {
  Arrays<R> to;
  for (const auto& a : from) to.emplace_back(a.begin(), a.end());
  return to;
}

template <class R>
Decoder<R> decoder_of(const Problem& p, const Arrays<R>& in) {
  const auto at = [&](int k) { return in[k].data(); };
  return {p.B,
          p.Bm,
          p.T,
          p.S,
          p.E,
          p.H,
          p.M,
          p.A,
          p.on,
          at(0),
          at(1),
          at(2),
          at(3),
          at(4),
          at(5),
          at(6),
          at(7),
          at(8),
          at(9),
          at(10),
          at(11),
          at(12),
          p.covers ? at(13) : nullptr,
          at(14)};
}

template <class R>
Arrays<R> forward(const Problem& p, const Arrays<R>& in, const ParallelFor& parallel) {
  Arrays<R> out;
  for (const int64_t size : p.output_sizes()) out.emplace_back(size, R(NAN));
  const auto at = [&](int k) { return out[k].data(); };
  FASTSEQ_SELECT(decoder_forward<R>)
  (decoder_of(p, in), {at(0), at(1), at(2), at(3), at(4), at(5), at(6)}, parallel);
  return out;
}

// In the order of DecoderGradients.
template <class R>
Arrays<R> backward(const Problem& p, const Arrays<R>& in, const Arrays<R>& out, const Arrays<R>& grads,
                   const ParallelFor& parallel) {
  Arrays<R> d;
  for (const int64_t size : {p.B * p.T * p.E, p.B * p.T * 4 * p.H, p.B * p.T * p.A, p.B * p.S * p.M,
                             p.B * p.S * p.A, p.B * p.H, p.B * p.H, p.B * p.M, p.B * p.S, p.A, p.A})
    d.emplace_back(size, R(NAN));
  const auto g = [&](int k) { return grads[k].empty() ? nullptr : grads[k].data(); };
  const auto o = [&](int k) { return out[k].data(); };
  const auto to = [&](int k) { return d[k].data(); };
  FASTSEQ_SELECT(decoder_backward<R>)
  (decoder_of(p, in), {g(0), g(1), g(2), g(3), g(4), g(5), g(6), o(0), o(1), o(2), o(3), o(4)},
   {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8), p.covers ? to(9) : nullptr, to(10)},
   parallel);
  return d;
}

template <class R>
void test_forward(const Problem& p, double tolerance) {
  const Arrays<double> want = plain(p, p.in);
  const Arrays<R> got = forward<R>(p, converted<R>(p.in), serial_for);
  for (int k = 0; k < kOutputs; ++k)
    for (size_t i = 0; i < got[k].size(); ++i) CHECK_CLOSE(got[k][i], want[k][i], tolerance);
}

// Of a random sum of outputs, differences of the plain loops at some elements of each input.
void test_backward(const Problem& p, bool some) {
  std::mt19937 random(5);
  Arrays<double> grads;
  for (const int64_t size : p.output_sizes()) {
    grads.emplace_back();
    const bool null = some && grads.size() % 2;
    for (int64_t i = 0; i < size && !null; ++i) grads.back().push_back(double(random()) / 4294967296.0 - 0.5);
  }
  const auto objective = [&](const Arrays<double>& in) {
    const Arrays<double> out = plain(p, in);
    double sum = 0;
    for (int k = 0; k < kOutputs; ++k)
      for (size_t i = 0; i < grads[k].size(); ++i) sum += grads[k][i] * out[k][i];
    return sum;
  };
  const Arrays<double> out = forward<double>(p, p.in, serial_for);
  const Arrays<double> d = backward<double>(p, p.in, out, grads, serial_for);
  const Arrays<float> d32 =
      backward<float>(p, converted<float>(p.in), converted<float>(out), converted<float>(grads), serial_for);
  // bias and b_query stand for all that is made of d_gates and d_query: their gradients are sums over steps.
  const std::pair<int, int> pairs[] = {{inputs, 0},   {bias, 1},       {b_query, 2}, {memory, 3},
                                       {features, 4}, {hidden, 5},     {cell, 6},    {context, 7},
                                       {coverage, 8}, {w_coverage, 9}, {v, 10}};
  for (const auto& [input, gradient] : pairs) {
    if (input == w_coverage && !p.covers) continue;
    const int64_t size = int64_t(p.in[input].size());
    for (int64_t n = 0; n < std::min<int64_t>(size, 12); ++n) {
      const int64_t i = size <= 12 ? n : int64_t(random() % uint32_t(size));
      double got = 0, got32 = 0;
      for (size_t k = size_t(i); k < d[gradient].size(); k += size_t(size))
        got += d[gradient][k], got32 += d32[gradient][k];
      Arrays<double> up = p.in, down = p.in;
      up[input][i] += 1e-5, down[input][i] -= 1e-5;
      const bool absent = std::isnan(p.in[input][i]);
      CHECK_CLOSE(got, absent ? 0 : (objective(up) - objective(down)) / 2e-5, 1e-6);
      CHECK_CLOSE(got32, got, 1e-4);
    }
  }
}

void test_threads(const Problem& p) {
  const Arrays<float> in = converted<float>(p.in);
  const Arrays<float> want = forward<float>(p, in, serial_for);
  const Arrays<float> d_want = backward<float>(p, in, want, want, serial_for);
  for (const int n : {2, 5}) {
    const Arrays<float> got = forward<float>(p, in, testing::threads(n));
    const Arrays<float> d_got = backward<float>(p, in, want, want, testing::threads(n));
    const auto same = [](const Arrays<float>& a, const Arrays<float>& b) {
      for (size_t k = 0; k < a.size(); ++k)
        if (!a[k].empty() && std::memcmp(a[k].data(), b[k].data(), a[k].size() * sizeof(float))) return false;
      return true;
    };
    CHECK(same(got, want) && same(d_got, d_want));
  }
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  const std::vector<int64_t> shapes[] = {{1, 1, 1, 1, 1, 1, 1, 1},      {3, 3, 4, 70, 5, 3, 6, 7},
                                         {5, 5, 3, 19, 17, 33, 35, 37}, {2, 2, 0, 3, 2, 2, 2, 2},
                                         {2, 2, 3, 0, 2, 2, 2, 2},      {6, 2, 3, 20, 4, 4, 8, 8}};
  for (const auto& shape : shapes)
    for (const bool covers : {true, false})
      for (const bool holes : {true, false}) {
        const Problem p(shape, covers, holes, 7);
        testing::context() = "shape " + std::to_string(&shape - shapes) + (covers ? " coverage" : "") +
                             (holes ? " holes" : "");
        test_forward<double>(p, 1e-12);
        test_forward<float>(p, 2e-6);
        if (p.B != p.Bm) continue;
        test_backward(p, false);
        test_backward(p, true);
        if (covers) test_threads(p);
      }
  return testing::summary("pointer decoder");
}
