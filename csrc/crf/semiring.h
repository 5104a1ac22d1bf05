// One recursion step in two semirings and two layouts, with the sums in registers.
//
//     SumProduct   out_j = sum_i in_i * table_ij        forward, backward
//     MaxPlus      out_j = max_i in_i + table_ij        Viterbi
//
// lanes_by_table: in_i and out_j are vectors over sequences, the table scalars (broadcast): K^2 vector
// operations. rows_by_table:  in is (rows, ld), out_j a vector over tags: a small matrix product, each load
// of the table serves all rows.
#pragma once
#include <utility>

#include "../common/simd.h"

namespace fastseq::FASTSEQ_ISA {

struct SumProduct {
  static constexpr float kZero = 0;
  template <class V>
  static FASTSEQ_INLINE V add(V a, V edge, V sum) {
    return V::fma(a, edge, sum);
  }
};

struct MaxPlus {
  static constexpr float kZero = -INFINITY;
  template <class V>
  static FASTSEQ_INLINE V add(V a, V edge, V best) {
    return max(a + edge, best);
  }
};

// Calls f(integral_constant<n>) for a run-time n in [1, N].
template <int N, class F>
FASTSEQ_INLINE void with_constant(int n, const F& f) {
  if constexpr (N > 0) {
    if (n == N)
      f(std::integral_constant<int, N>{});
    else
      with_constant<N - 1>(n, f);
  }
}

// Splits n into the fewest pieces of at most `Most`, as equal as can be: f(begin, size).
template <int Most, class F>
FASTSEQ_INLINE void in_pieces(int n, const F& f) {
  const int pieces = (n + Most - 1) / Most;
  for (int i = 0, at = 0; i < pieces; ++i) {
    const int size = (n - at + pieces - i - 1) / (pieces - i);
    f(at, size);
    at += size;
  }
}

// out(j, result_j) for all j of the (K,K) table.
template <class S, class V, class Out>
FASTSEQ_INLINE void lanes_by_table(const float* in, const float* table, int K, const Out& out) {
  in_pieces<12>(K, [&](int j0, int size) {
    with_constant<12>(size, [&](auto n) {
      V sums[n];
      for (int j = 0; j < n; ++j) sums[j] = V::set(S::kZero);
      for (int i = 0; i < K; ++i) {
        const V a = V::load(in + i * V::W);
        const float* row = table + i * K + j0;
        for (int j = 0; j < n; ++j) sums[j] = S::add(a, V::set(row[j]), sums[j]);
      }
      for (int j = 0; j < n; ++j) out(j0 + j, sums[j]);
    });
  });
}

template <class S, int NB, int NV>
FASTSEQ_INLINE void rows_by_tile(const float* in, const float* table, int64_t ld, int64_t K, float* out) {
  constexpr int W = Wide::W;
  Wide sums[NB][NV];
  for (int r = 0; r < NB; ++r)
    for (int v = 0; v < NV; ++v) sums[r][v] = Wide::set(S::kZero);
  for (int64_t i = 0; i < K; ++i) {
    Wide e[NV];
    for (int v = 0; v < NV; ++v) e[v] = Wide::load(table + i * ld + v * W);
    for (int r = 0; r < NB; ++r) {
      const Wide a = Wide::set(in[r * ld + i]);
      for (int v = 0; v < NV; ++v) sums[r][v] = S::add(a, e[v], sums[r][v]);
    }
  }
  for (int r = 0; r < NB; ++r)
    for (int v = 0; v < NV; ++v) sums[r][v].store(out + r * ld + v * W);
}

constexpr int kMaxRows = 6;

// out (rows, ld) from in (rows, K of ld) and the table (K, ld); ld is a multiple of the vector.
template <class S>
inline void rows_by_table(int rows, const float* in, const float* table, int64_t ld, int64_t K, float* out) {
  with_constant<kMaxRows>(rows, [&](auto n) {
    // as many sums as the registers hold beside a row of the table
    constexpr int kMost = (kRegisters - 6) / n;
    constexpr int kVectors = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
    int64_t j = 0;
    for (; j + kVectors * Wide::W <= ld; j += kVectors * Wide::W)
      rows_by_tile<S, n, kVectors>(in, table + j, ld, K, out + j);
    for (; j < ld; j += Wide::W) rows_by_tile<S, n, 1>(in, table + j, ld, K, out + j);
  });
}

}  // namespace fastseq::FASTSEQ_ISA
