// Viterbi in float32. The forward pass adds and takes maxima, K^2 of each a step, and keeps only the scores; the winning
// tags are found again on the way back, K operations a step, on the one path that matters.
//
// Rounding and ties are those of the textbook's (and pytorch-crf's) step, max over i of (score_i + A_ij) + x_j, where the
// first i wins: adding x_j after the maximum gives the same score, since rounding is monotone, but the way back compares
// with x_j added, as two sums that differ may round to one.
#pragma once
#include "scaled.h"
#include "semiring.h"

namespace fastseq::FASTSEQ_ISA {

struct ViterbiJob {
  const Model<float>& model;
  const float *edges, *edges_t;  // (K, ld) padded with -inf: from x to, to x from
  int64_t ld;
  int64_t* paths;    // (B,T), filled with -100
  float* scores;     // (B,), filled with NaN
  uint8_t* invalid;  // (B,), zeros; 1 where NaN or +inf was seen: the score stays NaN
};

// Whether any number of K may not take part in arithmetic: NaN or +inf.
inline bool has_nan_or_inf(const float* x, int64_t K) {
  bool found = false;
  for (int64_t k = 0; k < K; ++k) found |= !(x[k] <= FLT_MAX);
  return found;
}

struct Best {
  int64_t tag;
  float score;
};

// The first i that maximises (s[i*stride] + edge[i]) + x.
template <int Stride>
FASTSEQ_INLINE Best first_best(const float* s, const float* edge, float x, int64_t K) {
  int64_t i = 0, best = 0;
  float top = -INFINITY;
  if constexpr (Stride == 1) {  // the maximum first, then the first place that has it
    Wide tops = Wide::set(-INFINITY);
    const Wide vx = Wide::set(x);
    const auto candidates = [&](int64_t k) { return Wide::load(s + k) + Wide::load(edge + k) + vx; };
    for (; i + Wide::W <= K; i += Wide::W) tops = max(candidates(i), tops);
    top = i ? largest(tops) : top;
    for (int64_t k = i; k < K; ++k) top = std::max(top, (s[k] + edge[k]) + x);
    for (int64_t k = 0; k < i; k += Wide::W)
      if (const uint32_t there = ~Wide::not_ge(candidates(k), Wide::set(top)) & ((1u << Wide::W) - 1))
        return {k + __builtin_ctz(there), top};
    for (int64_t k = i; k < K; ++k)
      if ((s[k] + edge[k]) + x >= top) return {k, top};
    return {0, top};
  }
  for (; i < K; ++i) {
    const float candidate = (s[i * Stride] + edge[i]) + x;
    if (candidate > top) {
      top = candidate;
      best = i;
    }
  }
  return {best, top};
}

// The path of one row, backwards. score(t) points to the scores of position t, `Stride` floats apart.
template <int Stride, class Scores>
void trace_back(const ViterbiJob& job, int64_t b, float* staging, const Scores& score) {
  const Model<float>& m = job.model;
  const int64_t L = m.rows.length(b), K = m.x.K;
  const int32_t* at = m.rows.of(b);
  int64_t* path = job.paths + b * m.x.T;
  Best best = first_best<Stride>(score(L - 1), m.end, 0.f, K);
  if (!job.invalid[b]) job.scores[b] = best.score;
  path[at[L - 1]] = best.tag;
  for (int64_t t = L - 1; t > 0; --t) {
    const float x = emission_row(m.x, b, at[t], staging)[best.tag];
    best = first_best<Stride>(score(t - 1), job.edges_t + best.tag * job.ld, x, K);
    path[at[t - 1]] = best.tag;
  }
}

// Lanes are sequences: up to W rows, longest first, each with a position on. Scratch: (L + 1) * K * W + 2 * W * (K + 16).
template <class V>
void viterbi_by_sequence(const ViterbiJob& job, const int64_t* rows, int count, float* scratch) {
  constexpr int W = V::W;
  const Model<float>& m = job.model;
  const int K = int(m.x.K);
  const int64_t L = m.rows.length(rows[0]), ld = round_up(K, 16);
  float *x = scratch + L * K * W, *staging = x + K * W, *spare = staging + W * ld;
  std::fill(spare, spare + ld, 0.f);
  const auto score = [&](int64_t t) { return scratch + t * K * W; };
  int active = count;
  for (int64_t t = 0; t < L; ++t) {
    while (m.rows.length(rows[active - 1]) <= t) --active;
    const float* from[W];
    for (int l = 0; l < W; ++l)
      from[l] = l < active ? emission_row(m.x, rows[l], m.rows.of(rows[l])[t], staging + l * ld) : spare;
    transpose<V>(from, x, W, K);
    uint32_t bad = 0;
    const auto finish_tag = [&](int k, V best) {
      const V x_k = V::load(x + k * W);
      bad |= V::not_ge(V::set(FLT_MAX), x_k);
      (best + x_k).store(score(t) + k * W);
    };
    if (t)
      lanes_by_table<MaxPlus, V>(score(t - 1), job.edges, K, finish_tag);
    else
      for (int k = 0; k < K; ++k) finish_tag(k, V::set(m.start[k]));
    for (int l = 0; l < active; ++l)
      if (bad >> l & 1) job.invalid[rows[l]] = 1;
  }
  for (int l = 0; l < count; ++l)
    trace_back<W>(job, rows[l], staging, [&](int64_t t) { return score(t) + l; });
}

// Lanes are tags: up to 6 rows, longest first. Scratch: L * count * ld + K + 16.
inline void viterbi_by_tag(const ViterbiJob& job, const int64_t* rows, int count, float* scratch) {
  const Model<float>& m = job.model;
  const int64_t K = m.x.K, ld = job.ld, L = m.rows.length(rows[0]);
  float* staging = scratch + L * count * ld;
  const auto score = [&](int64_t t, int r) { return scratch + (t * count + r) * ld; };
  int active = count;
  for (int64_t t = 0; t < L; ++t) {
    while (m.rows.length(rows[active - 1]) <= t) --active;
    if (t) rows_by_table<MaxPlus>(active, score(t - 1, 0), job.edges, ld, K, score(t, 0));
    for (int r = 0; r < active; ++r) {
      const float* e = emission_row(m.x, rows[r], m.rows.of(rows[r])[t], staging);
      float* s = score(t, r);
      const float* from = t ? s : m.start;
      if (has_nan_or_inf(e, K)) job.invalid[rows[r]] = 1;
      for (int64_t k = 0; k < K; ++k) s[k] = from[k] + e[k];
    }
  }
  for (int r = 0; r < count; ++r)
    trace_back<1>(job, rows[r], staging, [&](int64_t t) { return score(t, r); });
}

}  // namespace fastseq::FASTSEQ_ISA
