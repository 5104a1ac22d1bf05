// Rows of scores: their largest, exponentials and sums, and what backward makes of them: 12 operations a
// vector for an exponential. Rows are padded to whole 32 columns with -infinity, whose exponential is exactly
// 0. Scores are never multiplied by log2(e) before the largest is subtracted: large ones that are integers
// stay exact.
#pragma once
#include <limits>
#include <type_traits>

#include "dropout.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class R>
using Numbers = std::conditional_t<std::is_same_v<R, double>, WideDouble, Wide>;

template <class R>
constexpr R kForbidden = -std::numeric_limits<R>::infinity();

// exp(x) to about 1e-7 for x <= 87; exactly 0 below log(2^-126), NaN stays NaN.
template <class V>
FASTSEQ_INLINE V exponential(V x) {
  using R = typename V::Scalar;
  if constexpr (std::is_same_v<R, double>) {
    return V::make([&](int i) { return std::exp(x.v[i]); });
  } else {
    x = x * V::set(1.4426950408889634f);
    const V n = V::round(V::where_less(x, V::set(-126.f), V::set(-126.f), x)), r = x - n;
    V p = V::set(kExp2[0]);
    for (int k = 1; k < 6; ++k) p = V::fma(p, r, V::set(kExp2[k]));
    return V::where_less(x, V::set(-126.f), V::set(0.f), V::scale(p, n));
  }
}

// The largest of x[0..n), n a multiple of 32; NaN is passed over.
template <class R>
R largest_of(const R* x, int64_t n) {
  using V = Numbers<R>;
  V a = V::set(kForbidden<R>), b = a;
  for (int64_t c = 0; c < n; c += 2 * V::W) {
    a = max(V::load(x + c), a);
    b = max(V::load(x + c + V::W), b);
  }
  return largest(max(a, b));
}

// x = exp(x * factor - shift) for n (a multiple of 32) scores; returns their sum. Then those that `kept`, if
// any, does not keep become 0.
template <class R>
R exponentials(R* x, int64_t n, R factor, R shift, const uint32_t* kept) {
  using V = Numbers<R>;
  const V by = V::set(factor), less = V::set(-shift);
  V a = V::set(0), b = a;
  const auto run = [&](auto keep) {
    for (int64_t c = 0; c < n; c += 2 * V::W) {
      const V p = exponential(V::fma(V::load(x + c), by, less));
      const V q = exponential(V::fma(V::load(x + c + V::W), by, less));
      a = a + p, b = b + q;
      keep(p, c).store(x + c);
      keep(q, c + V::W).store(x + c + V::W);
    }
  };
  if (kept)
    run([&](V p, int64_t c) { return kept_or_zero(kept, c, p); });
  else
    run([](V p, int64_t) { return p; });
  return sum(a + b);
}

// Backward of a row: with p = exp(x * factor - lse),
//   x = p where kept, else 0;   d = p (d * inverse where kept, else 0; - delta)
template <class R>
void differentiate(R* x, R* d, int64_t n, R factor, R lse, R inverse, R delta, const uint32_t* kept) {
  using V = Numbers<R>;
  const V by = V::set(factor), less = V::set(-lse), minus = V::set(-delta), up = V::set(inverse);
  const auto run = [&](auto keep) {
    for (int64_t c = 0; c < n; c += V::W) {
      const V p = exponential(V::fma(V::load(x + c), by, less));
      keep(p, c).store(x + c);
      (p * V::fma(keep(V::load(d + c), c), up, minus)).store(d + c);
    }
  };
  if (kept)
    run([&](V p, int64_t c) { return kept_or_zero(kept, c, p); });
  else
    run([](V p, int64_t) { return p; });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
