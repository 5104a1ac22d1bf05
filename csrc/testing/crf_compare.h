// nll and its gradients as float32 kernels give them, on a CPU or in the emulator, against the float64 log
// domain on the same numbers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "testing/check.h"
#include "testing/crf_problem.h"

namespace fastseq::testing {

constexpr double kScale = 0.5;
constexpr float kNever = -std::numeric_limits<float>::infinity();

// ---- running ----------------------------------------------------------------------------------------------

template <class R>
struct Result {
  Memory<R> nll, transitions, start, end;
  Memory<char> emissions;
};

// By the CPU's kernels.
template <class R>
Result<R> run_nll(const Problem& p, const View& view, const ParallelFor& parallel_for, bool gradient = true) {
  const int64_t K = p.K;
  Result<R> out{Memory<R>(p.B), Memory<R>(K * K), Memory<R>(K), Memory<R>(K),
                Memory<char>(view.extent(p) * bytes(view.type))};
  const Parameters<R> parameters(p);
  const Gradients<R> to{out.emissions.data(),   view.stride_b,    view.stride_t,
                        out.transitions.data(), out.start.data(), out.end.data()};
  const Memory<R> weights(p.weights);
  nll<R>(parameters.model(p, view), p.tagged ? p.gold() : Tags{}, p.weighted ? weights.data() : nullptr,
         kScale, out.nll.data(), gradient ? &to : nullptr, parallel_for);
  return out;
}

template <class R>
bool same_bits(const Result<R>& a, const Result<R>& b) {
  return same_bits(a.nll, b.nll) && same_bits(a.transitions, b.transitions) && same_bits(a.start, b.start) &&
         same_bits(a.end, b.end) && same_bits(a.emissions, b.emissions);
}

// ---- comparing --------------------------------------------------------------------------------------------

// How far a value of the type may be from the number that was rounded to it, relative.
inline double rounding(Type type) {
  return type == Type::bf16 ? 0x1p-8 : type == Type::f16 ? 0x1p-11 : type == Type::f32 ? 0x1p-24 : 0x1p-53;
}

inline bool near(double got, double want, double tolerance) {
  if (std::isnan(want) || std::isinf(want)) return std::isnan(want) ? std::isnan(got) : got == want;
  return std::abs(got - want) <= tolerance;
}

// What a marginal, which is at most 1, may be wrong by.
template <class R>
constexpr double kError = std::is_same_v<R, double> ? 1e-11 : 1e-5;

// `count` is how many marginals were added up, weighted: what the sums' rounding is relative to, not what is
// left of them once the gold path is taken away.
template <class R>
void check_parameter(const char* what, const Memory<R>& got, const Memory<double>& want, double count) {
  for (int64_t i = 0; i < want.size(); ++i) {
    if (near(got[i], want[i], 2 * kError<R> * count)) continue;
    if (report(__FILE__, __LINE__))
      std::printf("gradient of %s[%d] is %.9g, wanted %.9g\n", what, int(i), double(got[i]), want[i]);
  }
}

// Every element of the gradient, and that nothing was written between them.
template <class R>
void check_emissions(const Problem& p, const View& view, const Result<R>& got, const View& exact_view,
                     const Result<double>& want) {
  std::vector<double> g(p.K), w(p.K);
  std::vector<bool> written(got.emissions.size());
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = 0; t < p.T; ++t) {
      load_row(view.emissions(p, got.emissions.data()), b, t, g.data());
      load_row(exact_view.emissions(p, want.emissions.data()), b, t, w.data());
      const int64_t at = (b * view.stride_b + t * view.stride_t) * bytes(view.type);
      std::fill_n(written.begin() + at, p.K * bytes(view.type), true);
      for (int64_t k = 0; k < p.K; ++k) {
        if (near(g[k], w[k], kError<R> + rounding(view.type) * std::abs(w[k]))) continue;
        if (report(__FILE__, __LINE__))
          std::printf("gradient of emissions[%d,%d,%d] is %.9g, wanted %.9g\n", int(b), int(t), int(k), g[k],
                      w[k]);
      }
    }
  }
  for (int64_t i = 0; i < got.emissions.size(); ++i) CHECK(written[i] || got.emissions[i] == kUntouched);
}

template <class R>
void check_values(const Memory<R>& got, const Memory<double>& want) {
  for (int64_t b = 0; b < want.size(); ++b) {
    if (near(got[b], want[b], kError<R> * (1 + 0.1 * std::abs(want[b])))) continue;
    if (report(__FILE__, __LINE__))
      std::printf("nll[%d] is %.9g, wanted %.9g\n", int(b), double(got[b]), want[b]);
  }
}

inline double weight_of(const Problem& p, int64_t b) { return kScale * (p.weighted ? p.weights[b] : 1); }

template <class R>
void check_parameters(const Problem& p, const Result<R>& got, const Result<double>& want) {
  double rows = 1, steps = 1;
  for (int64_t b = 0; b < p.B; ++b) {
    const double weight = std::abs(weight_of(p, b));
    rows += weight, steps += weight * double(p.rows.length(b));
  }
  check_parameter("transitions", got.transitions, want.transitions, steps);
  check_parameter("start", got.start, want.start, rows);
  check_parameter("end", got.end, want.end, rows);
}

// All that nll and its gradient give.
template <class R>
void check_result(const Problem& p, const View& view, const Result<R>& got) {
  const View exact_view = view.exactly(p);
  const Result<double> want = run_nll<double>(p, exact_view, serial_for);
  check_values(got.nll, want.nll);
  check_emissions(p, view, got, exact_view, want);
  check_parameters(p, got, want);
}

}  // namespace fastseq::testing
