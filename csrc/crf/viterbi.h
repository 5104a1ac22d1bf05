// Viterbi in float32. The forward pass adds and takes maxima, K^2 of each a step, and keeps only the scores;
// the winning tags are found again on the way back, K operations a step, on the one path that matters.
//
// Rounding and ties are those of the textbook's (and pytorch-crf's) step, max over i of (score_i + A_ij) +
// x_j, where the first i wins: adding x_j after the maximum gives the same score, since rounding is monotone,
// but the way back compares with x_j added, as two sums that differ may round to one.
//
// With many tags most of them cannot win: where tag i is so far behind the best tag that no transition makes
// up for it, score_i + max_j (A_ij - min_i' A_i'j) < max score, row i of A is not read at all. That is exact,
// it is the common case, and it is also what makes more than 1 edge per add and max possible; where A forbids
// (-inf), nothing can be ruled out.
#pragma once
#include <climits>

#include "scaled.h"
#include "semiring.h"

namespace fastseq::FASTSEQ_ISA {

struct ViterbiJob {
  const Model<float>& model;
  const float *edges, *edges_t;  // (K, ld) padded with -inf: from x to, to x from
  int64_t ld;
  const float* reach;  // (ld,): by how much row i of A can exceed another, max_j (A_ij - min_i' A_i'j)
  int64_t* paths;      // (B,T), filled with -100
  float* scores;       // (B,), filled with NaN
  uint8_t* invalid;    // (B,), zeros; 1 where NaN or +inf was seen: the score stays NaN
};

// out = from + x, K of each. Returns whether any x is one that nothing may be computed from: NaN or +inf.
inline bool add_emissions(const float* from, const float* x, int64_t K, float* out) {
  const Wide largest_finite = Wide::set(FLT_MAX);
  uint32_t bad = 0;
  int64_t k = 0;
  for (; k + Wide::W <= K; k += Wide::W) {
    const Wide x_k = Wide::load(x + k);
    bad |= Wide::not_ge(largest_finite, x_k);
    (Wide::load(from + k) + x_k).store(out + k);
  }
  for (; k < K; ++k) {
    bad |= !(x[k] <= FLT_MAX);
    out[k] = from[k] + x[k];
  }
  return bad;
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
    best = candidate > top ? i : best;  // no branch: it would be mispredicted a few times a step
    top = candidate > top ? candidate : top;
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

// Lanes are sequences: up to W rows, longest first, each with a position on. Scratch: (L + 1) * K * W + 2 * W
// * (K + 16).
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
    transpose<V>(K, [&](int l) { return from[l]; }, [&](int k) { return x + k * W; });
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

// max_j (A_ij - min_i' A_i'j) for each i; +inf where A_ij is possible and another entry of the column is not.
inline void find_reach(const float* edges, int64_t ld, int64_t K, float* reach) {
  std::vector<float> least(edges, edges + K);
  for (int64_t i = 1; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) least[j] = edges[i * ld + j] < least[j] ? edges[i * ld + j] : least[j];
  for (int64_t i = 0; i < K; ++i) {
    reach[i] = -INFINITY;
    for (int64_t j = 0; j < K; ++j) {
      const float d = edges[i * ld + j] - least[j];
      reach[i] = d > reach[i] ? d : reach[i];  // of two -inf, NaN: row i cannot win there
    }
  }
}

// The tags that could be the best predecessor of some tag, those that are not ruled out by `reach`: one bit
// each in `possible`, ld / W words. Returns how many. Scores and reach are padded to ld with -inf.
inline int possible_winners(const float* score, const float* reach, int64_t ld, float widest,
                            uint32_t* possible) {
  Wide tops = Wide::set(-INFINITY);
  for (int64_t k = 0; k < ld; k += Wide::W) tops = max(Wide::load(score + k), tops);
  const float top = largest(tops);
  // rounding must not rule out a tie: four units in the last place of everything that is added
  const Wide bar = Wide::set(top - 4.8e-7f * (std::fabs(top) + widest));
  int n = 0;
  for (int64_t k = 0; k < ld; k += Wide::W) {
    possible[k / Wide::W] = Wide::not_ge(bar, Wide::load(score + k) + Wide::load(reach + k));
    n += __builtin_popcount(possible[k / Wide::W]);
  }
  return n;
}

// out_j = max over the possible tags i of score_i + A_ij, for one row and NV vectors of j.
template <int NV>
FASTSEQ_INLINE void best_of_few(const float* score, const float* table, int64_t ld, const uint32_t* possible,
                                float* out) {
  Wide best[NV];
  for (int v = 0; v < NV; ++v) best[v] = Wide::set(-INFINITY);
  for (int64_t k = 0; k < ld; k += Wide::W)
    for (uint32_t bits = possible[k / Wide::W]; bits; bits &= bits - 1) {
      const int64_t i = k + __builtin_ctz(bits);
      const Wide s = Wide::set(score[i]);
      for (int v = 0; v < NV; ++v) best[v] = max(s + Wide::load(table + i * ld + v * Wide::W), best[v]);
    }
  for (int v = 0; v < NV; ++v) best[v].store(out + v * Wide::W);
}

// One step of the rows that are active, before the emissions: to[r] from from[r], in the (max, +) semiring.
// Returns how many steps to take before looking again whether anything can be ruled out: where it could not,
// it seldom can soon after.
inline int max_plus_step(const ViterbiJob& job, int active, float widest, bool look, const float* from,
                         float* to, uint32_t* possible) {
  const int64_t K = job.model.x.K, ld = job.ld, words = ld / Wide::W;
  int64_t total = K * active;
  if (look) {
    total = 0;
    for (int r = 0; r < active; ++r)
      total += possible_winners(from + r * ld, job.reach, ld, widest, possible + r * words);
  }
  if (3 * total > K * active) {
    rows_by_table<MaxPlus>(active, from, job.edges, ld, K, to);
    return look ? 16 : -1;
  }
  for (int r = 0; r < active; ++r) {
    const float* row = from + r * ld;
    int64_t j = 0;
    for (; j + 4 * Wide::W <= ld; j += 4 * Wide::W)
      best_of_few<4>(row, job.edges + j, ld, possible + r * words, to + r * ld + j);
    for (; j < ld; j += Wide::W)
      best_of_few<1>(row, job.edges + j, ld, possible + r * words, to + r * ld + j);
  }
  return 0;
}

// Lanes are tags: up to 6 rows, longest first. Scratch: L * count * ld + K + 16.
inline void viterbi_by_tag(const ViterbiJob& job, const int64_t* rows, int count, float* scratch) {
  const Model<float>& m = job.model;
  const int64_t K = m.x.K, ld = job.ld, L = m.rows.length(rows[0]);
  float* staging = scratch + L * count * ld;
  const auto score = [&](int64_t t, int r) { return scratch + (t * count + r) * ld; };
  std::vector<uint32_t> possible(count * ld / Wide::W);
  const float widest = *std::max_element(job.reach, job.reach + K);
  int wait = std::isfinite(widest) ? 0 : INT_MAX;
  int active = count;
  for (int64_t t = 0; t < L; ++t) {
    while (m.rows.length(rows[active - 1]) <= t) --active;
    if (t)
      wait += max_plus_step(job, active, widest, wait == 0, score(t - 1, 0), score(t, 0), possible.data());
    for (int r = 0; r < active; ++r) {
      const int32_t* at = m.rows.of(rows[r]);
      if (t + 4 < m.rows.length(rows[r]))
        prefetch<0>(m.x.data, m.x.type, rows[r] * m.x.stride_b + at[t + 4] * m.x.stride_t, K);
      const float* e = emission_row(m.x, rows[r], at[t], staging);
      float* s = score(t, r);
      if (add_emissions(t ? s : m.start, e, K, s)) job.invalid[rows[r]] = 1;
      std::fill(s + K, s + ld, -INFINITY);
    }
  }
  for (int r = 0; r < count; ++r)
    trace_back<1>(job, rows[r], staging, [&](int64_t t) { return score(t, r); });
}

}  // namespace fastseq::FASTSEQ_ISA
