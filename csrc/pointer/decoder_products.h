// The products of a step: few rows (the batch) times a weight matrix, which is read once for all of them and
// where it lies, since packing it would cost a decoding step more than the product. Rows are anywhere in
// memory. A step moves rows + weights bytes once, and does 2*rows*K*N FLOPs: with 4 rows it is at the speed
// of L2 and L3.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../common/simd.h"

namespace fastseq::FASTSEQ_ISA::decoder {

constexpr int kRows = kRegisters == 32 ? 4 : 2;  // rows that share a load of the weights
constexpr int kColumns = 4;

// One term of a product: in(r) is row r of the input, w + n*ld row n of the weights, K long.
template <class R, class In>
struct Term {
  In in;
  const R* w;
  int64_t ld, K;
};
template <class R, class In>
Term(In, const R*, int64_t, int64_t) -> Term<R, In>;

// acc[p][q] += in[p] . w[q]
template <class V, int P, int Q, class R>
FASTSEQ_INLINE void add_dots(const R* const* in, const R* w, int64_t ld, int64_t K, V (&acc)[P][Q]) {
  int64_t k = 0;
  const auto add = [&](auto load) {
    V x[P];
    for (int p = 0; p < P; ++p) x[p] = load(in[p] + k);
    for (int q = 0; q < Q; ++q) {
      const V y = load(w + q * ld + k);
      for (int p = 0; p < P; ++p) acc[p][q] = V::fma(x[p], y, acc[p][q]);
    }
  };
  for (; k + V::W <= K; k += V::W) add([](const R* p) { return V::load(p); });
  if (k < K) add([&](const R* p) { return V::load(p, K - k); });
}

template <class V, int P, int Q, class R, class Out, class... Terms>
FASTSEQ_INLINE void dot_block(int64_t r, int64_t n, const Out& out, const Terms&... terms) {
  V acc[P][Q];
  for (auto& row : acc)
    for (V& a : row) a = V::set(0);
  const auto add = [&](const auto& term) {
    const R* in[P];
    for (int p = 0; p < P; ++p) in[p] = term.in(r + p);
    add_dots<V, P, Q, R>(in, term.w + n * term.ld, term.ld, term.K, acc);
  };
  (add(terms), ...);
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) out(r + p, n + q, sum(acc[p][q]));
}

// out(r, n, sum of terms' in(r) . w[n]) for r in [r0, r1), n in [n0, n1).
template <class V, class R, class Out, class... Terms>
void dots(int64_t r0, int64_t r1, int64_t n0, int64_t n1, const Out& out, const Terms&... terms) {
  int64_t n = n0;
  for (; n + kColumns <= n1; n += kColumns) {
    int64_t r = r0;
    for (; r + kRows <= r1; r += kRows) dot_block<V, kRows, kColumns, R>(r, n, out, terms...);
    for (; r < r1; ++r) dot_block<V, 1, kColumns, R>(r, n, out, terms...);
  }
  for (; n < n1; ++n)
    for (int64_t r = r0; r < r1; ++r) dot_block<V, 1, 1, R>(r, n, out, terms...);
}

// to[p][c] = from[p][c] + sum_k in[p][k*step] w[k*ld + c] for Q vectors of columns; the last has `lanes`.
template <class V, int P, int Q, class R>
FASTSEQ_INLINE void column_block(const R* const* in, int64_t step, const R* w, int64_t ld, int64_t K,
                                 int64_t lanes, const R* const* from, R* const* to) {
  const bool whole = lanes == V::W;
  V acc[P][Q];
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q)
      acc[p][q] = from[p] == nullptr ? V::set(0)
                  : whole            ? V::load(from[p] + q * V::W)
                                     : V::load(from[p] + q * V::W, lanes);
  for (int64_t k = 0; k < K; ++k, w += ld) {
    V y[Q];
    for (int q = 0; q < Q; ++q) y[q] = whole ? V::load(w + q * V::W) : V::load(w + q * V::W, lanes);
    for (int p = 0; p < P; ++p) {
      const V x = V::set(in[p][k * step]);
      for (int q = 0; q < Q; ++q) acc[p][q] = V::fma(x, y[q], acc[p][q]);
    }
  }
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q)
      if (whole)
        acc[p][q].store(to[p] + q * V::W);
      else
        acc[p][q].store(to[p] + q * V::W, lanes);
}

template <class V, int P, class R, class In, class From, class To>
FASTSEQ_INLINE void columns_of_rows(int64_t r, int64_t c0, int64_t c1, const In& in, int64_t step, const R* w,
                                    int64_t ld, int64_t K, const From& from, const To& to) {
  const R *x[P], *a[P];
  R* y[P];
  const auto at = [&](int64_t c) {
    for (int p = 0; p < P; ++p) {
      x[p] = in(r + p);
      a[p] = from(r + p) == nullptr ? nullptr : from(r + p) + c;
      y[p] = to(r + p) + c;
    }
  };
  int64_t c = c0;
  for (; c + kColumns * V::W <= c1; c += kColumns * V::W)
    at(c), column_block<V, P, kColumns>(x, step, w + c, ld, K, V::W, a, y);
  for (; c < c1; c += V::W)
    at(c), column_block<V, P, 1>(x, step, w + c, ld, K, std::min<int64_t>(V::W, c1 - c), a, y);
}

// to(r)[c] = from(r)[c] + sum_k in(r)[k*step] w[k*ld + c] for r < rows and c in [c0, c1). from(r) may be null
// (zeros), or to(r).
template <class V, class R, class In, class From, class To>
void columns(int64_t rows, int64_t c0, int64_t c1, const In& in, int64_t step, const R* w, int64_t ld,
             int64_t K, const From& from, const To& to) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) columns_of_rows<V, kRows>(r, c0, c1, in, step, w, ld, K, from, to);
  for (; r < rows; ++r) columns_of_rows<V, 1>(r, c0, c1, in, step, w, ld, K, from, to);
}

// Calls f(k, lanes) for each vector of n numbers. For whole ones `lanes` is a constant of its type, so that
// no branch is left in the loop.
template <class V, class F>
FASTSEQ_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t k = 0;
  for (; k + V::W <= n; k += V::W) f(k, std::integral_constant<int64_t, V::W>());
  if (k < n) f(k, n - k);
}

template <class V>
FASTSEQ_INLINE V load(const typename V::Scalar* p, int64_t lanes) {
  return lanes == V::W ? V::load(p) : V::load(p, lanes);
}
template <class V>
FASTSEQ_INLINE void store(V x, typename V::Scalar* p, int64_t lanes) {
  if (lanes == V::W)
    x.store(p);
  else
    x.store(p, lanes);
}

}  // namespace fastseq::FASTSEQ_ISA::decoder
