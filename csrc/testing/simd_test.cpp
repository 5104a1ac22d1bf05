// simd.h: exp, sigmoid and tanh of every lane type against the C library in double, over all magnitudes, and
// loads and stores of fewer lanes than a vector has. Compiled for the instruction set that FASTSEQ_ISA names.
#include "common/simd.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "testing/check.h"

namespace {

using namespace fastseq;
using namespace fastseq::FASTSEQ_ISA;

constexpr double kInf = std::numeric_limits<double>::infinity();

// The error in units of the last place of the float or double nearest to `want`.
template <class R>
double ulps(R got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : kInf;
  const R near = R(want);
  if (std::isinf(near)) return got == near ? 0 : kInf;
  const R next = std::nextafter(std::fabs(near), R(kInf));
  return std::fabs(double(got) - want) / (double(next) - std::fabs(double(near)));
}

template <class R>
std::vector<R> arguments() {
  std::vector<R> x = {0, R(-0.0), 1, R(kInf), R(-kInf), R(NAN), std::numeric_limits<R>::max(), R(0.625)};
  for (int64_t i = 0; i < 400000; ++i) {
    const double magnitude =
        std::ldexp(1 + double(i * 7919 % 10000) / 1e4, int(i % 40) - 32);  // 2^-32 .. 2^8
    x.push_back(R(i % 2 ? magnitude : -magnitude));
  }
  return x;
}

template <class V, class F, class Want>
void compare(const char* name, const F& f, const Want& want, double most) {
  using R = typename V::Scalar;
  testing::context() =
      std::string(name) + " of " + std::to_string(V::W) + " lanes of " + std::to_string(sizeof(R)) + " bytes";
  const std::vector<R> x = arguments<R>();
  for (size_t i = 0; i + V::W <= x.size(); i += V::W) {
    R y[V::W];
    f(V::load(&x[i])).store(y);
    for (int lane = 0; lane < V::W; ++lane) CHECK(ulps(y[lane], want(double(x[i + lane]))) <= most);
  }
}

template <class V>
void test_functions() {
  using R = typename V::Scalar;
  compare<V>("exp", [](V x) { return vexp(x); }, [](double x) { return std::exp(x); }, 2);
  // As a float, exp of 89 is infinite: there, sigmoid is 0 where it could be 1e-39.
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  compare<V>(
      "sigmoid", [](V x) { return V::where_less(x, V::set(-87), V::set(0), vsigmoid(x)); },
      [&](double x) { return x < -87 ? 0 : sigmoid(x); }, 3);
  R tiny[V::W];
  vsigmoid(V::set(-90)).store(tiny);
  CHECK(tiny[0] >= 0 && tiny[0] < 2e-38);
  compare<V>("tanh", [](V x) { return vtanh(x); }, [](double x) { return std::tanh(x); }, 2);
  testing::context() = "odd and within [-1, 1]";
  for (const R x : arguments<R>()) {
    R up[V::W], down[V::W];
    vtanh(V::set(x)).store(up);
    vtanh(V::set(-x)).store(down);
    CHECK(std::isnan(x) || (up[0] == -down[0] && std::fabs(up[0]) <= 1));
    CHECK(!(std::fabs(x) > 20) || std::fabs(up[0]) == 1);
    V::one_over_one_plus_exp2(V::set(x)).store(down);
    const double want = 1 / (1 + std::exp2(double(x)));
    CHECK(std::isnan(x) ? std::isnan(down[0])
                        : std::fabs(down[0] - want) <= (sizeof(R) == 4 ? 1.2e-7 : 3e-16));
  }
}

template <class V>
void test_parts() {
  using R = typename V::Scalar;
  testing::context() = "parts of a vector";
  for (int64_t n = 0; n < V::W; ++n) {
    // Exactly n numbers are there: the address sanitizer sees a read or write of more.
    std::vector<R> from(n, R(3)), to(n, R(0));
    V::load(from.data(), n).store(to.data(), n);
    CHECK(from == to);
    R whole[V::W];
    V::load(from.data(), n).store(whole);
    for (int64_t i = 0; i < V::W; ++i) CHECK(whole[i] == (i < n ? 3 : 0));
  }
}

template <class V>
void test() {
  test_functions<V>();
  test_parts<V>();
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  test<Wide>();
  if constexpr (!std::is_same_v<Wide, Narrow>) test<Narrow>();
  test<Lanes<4>>();
  test<WideDouble>();
  return testing::summary("simd");
}
