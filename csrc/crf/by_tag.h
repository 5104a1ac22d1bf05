// Many tags (K > 32): the lanes of a vector are tags, and up to 6 sequences, longest first, step together, so
// that a step is a small matrix product (rows x K) (K x K) and each load of E serves all its rows.
//
//     alpha, x: [t][row][tag], rows padded to whole vectors with zeros     E: [i][tag]
//
// Cost per step: 3 * rows * K^2 FMAs (forward, backward, counts), K exps a row, which are done for all steps
// first: the recursions then wait for nothing but their own FMAs, as each applies the scale of the step
// before while the next is being found. The counts are a product over time, (steps*rows x K)^T (steps*rows x
// K), taken in chunks of time while what they read is in the cache.
#pragma once
#include "scaled.h"
#include "semiring.h"

namespace fastseq::FASTSEQ_ISA {

// counts[i..i+NI)[j..j+NV vectors) += sum over n of a[n][i] * m[n][j].
template <int NI, int NV>
FASTSEQ_INLINE void count_tile(const float* a, const float* m, int64_t ld, int64_t n, float* counts) {
  constexpr int W = Wide::W;
  Wide sums[NI][NV];
  for (int i = 0; i < NI; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = Wide::set(0);
  for (int64_t r = 0; r < n; ++r) {
    Wide m_r[NV];
    for (int v = 0; v < NV; ++v) m_r[v] = Wide::load(m + r * ld + v * W);
    for (int i = 0; i < NI; ++i) {
      const Wide a_i = Wide::set(a[r * ld + i]);
      for (int v = 0; v < NV; ++v) sums[i][v] = Wide::fma(a_i, m_r[v], sums[i][v]);
    }
  }
  for (int i = 0; i < NI; ++i)
    for (int v = 0; v < NV; ++v)
      (Wide::load(counts + i * ld + v * W) + sums[i][v]).store(counts + i * ld + v * W);
}

inline void count_block(const float* a, const float* m, int64_t ld, int64_t K, int64_t n, float* counts) {
  constexpr int kRows = kRegisters == 32 ? 8 : 4;
  constexpr int W = Wide::W;
  const auto columns = [&](auto vectors, int64_t j) {
    int64_t i = 0;
    for (; i + kRows <= K; i += kRows) count_tile<kRows, vectors>(a + i, m + j, ld, n, counts + i * ld + j);
    for (; i < K; ++i) count_tile<1, vectors>(a + i, m + j, ld, n, counts + i * ld + j);
  };
  int64_t j = 0;
  for (; j + 2 * W <= ld; j += 2 * W) columns(std::integral_constant<int, 2>{}, j);
  if (j < ld) columns(std::integral_constant<int, 1>{}, j);
}

class ByTag {
 public:
  static constexpr int W = Wide::W;
  static constexpr int64_t kChunk = 128;  // rows of alpha and of messages that one count_block reads
  static constexpr int kAhead = 4;        // steps

  static int64_t scratch_floats(int64_t L, int rows, int64_t ld, bool gradient) {
    return L * rows * ld + (gradient ? L : 2) * (rows * ld + rows) + 2 * rows * ld + 2 * ld + 64;
  }

  // rows[0..count): at most 6 rows with at least one position on, longest first. `sums` as in BySequence,
  // rows of ld.
  ByTag(const Job& job, const int64_t* rows, int count, float* scratch, float* sums)
      : job_(job),
        K_(job.tables.K),
        ld_(job.tables.ld),
        count_(count),
        gradient_(job.gradient != nullptr),
        sums_(sums) {
    for (int r = 0; r < count; ++r) {
      row_[r] = rows[r];
      length_[r] = int(job.model.rows.length(rows[r]));
      weight_[r] = gradient_ ? job.row_weight(rows[r]) : 0.f;
      gap_[r] = INFINITY;
      drift_[r] = 1.f;
    }
    const int64_t steps = gradient_ ? length_[0] : 2;
    x_ = scratch;
    alpha_ = x_ + length_[0] * count * ld_;
    sum_ = alpha_ + steps * count * ld_;
    message_ = sum_ + count * ld_;
    posterior_ = message_ + count * ld_;
    padding_ = posterior_ + ld_;
    inverse_ = padding_ + ld_;
    for (int64_t k = 0; k < ld_; ++k) padding_[k] = k < K_ ? 0.f : 1.f;
  }

  void run() {
    for (int r = 0; r < count_; ++r)
      for (int t = 0; t < length_[r]; ++t) maxima_[r] += exponentiate(t, r);
    forward();
    if (!gradient_) return;
    for (int r = 0; r < count_; ++r)
      if (job_.marks[row_[r]]) forget(r);
    backward();
  }

 private:
  int64_t slot(int t) const { return gradient_ ? t : t & 1; }
  float* alpha(int t, int r) const {
    return alpha_ + (slot(t) * count_ + r) * ld_;
  }  // times inverse, it sums to 1
  float& inverse(int t, int r) const { return inverse_[slot(t) * count_ + r]; }
  float* x(int t, int r) const { return x_ + (t * count_ + r) * ld_; }
  int64_t position(int r, int t) const { return job_.model.rows.of(row_[r])[t]; }

  // x_t = exp(emissions - their maximum) for one row. Returns the maximum.
  FASTSEQ_INLINE float exponentiate(int t, int r) {
    float* x_t = x(t, r);
    const float* e = emission_row(job_.model.x, row_[r], position(r, t), x_t);
    const int64_t whole = K_ / W * W;
    // The last, partial vector is read through a copy: past the row may lie another thread's memory, or
    // nothing.
    float tail[W];
    if (whole < ld_)
      for (int i = 0; i < W; ++i) tail[i] = whole + i < K_ ? e[whole + i] : -INFINITY;
    Wide tops = Wide::set(-FLT_MAX);
    for (int64_t k = 0; k < whole; k += W) tops = max(Wide::load(e + k), tops);
    if (whole < ld_) tops = max(Wide::load(tail), tops);
    const float top = largest(tops);
    const Wide vtop = Wide::set(top);
    for (int64_t k = 0; k < whole; k += W) Wide::exp_or_zero(Wide::load(e + k) - vtop).store(x_t + k);
    if (whole < ld_) Wide::exp_or_zero(Wide::load(tail) - vtop).store(x_t + whole);
    return top;
  }

  void forward() {
    LogProduct scales[kMaxRows];
    int active = count_;
    for (int t = 0; t < length_[0]; ++t) {
      while (length_[active - 1] <= t) --active;
      if (t) rows_by_table<SumProduct>(active, alpha(t - 1, 0), job_.tables.edges, ld_, K_, sum_);
      for (int r = 0; r < active; ++r)
        scales[r].multiply(t ? step(t, r, sum_ + r * ld_, inverse(t - 1, r))
                             : step(t, r, job_.tables.start, 1.f));
      // Rows that have ended read as zeros, so that products over time can run over all rows.
      if (gradient_ && active < count_) {
        std::memset(alpha(t, active), 0, sizeof(float) * (count_ - active) * ld_);
        std::memset(x(t, active), 0, sizeof(float) * (count_ - active) * ld_);
      }
      for (int r = active - 1; r >= 0 && length_[r] == t + 1; --r) {
        Wide z = Wide::set(0);
        for (int64_t k = 0; k < ld_; k += W)
          z = Wide::fma(Wide::load(alpha(t, r) + k), Wide::load(job_.tables.end + k), z);
        z_[r] = sum(z);
        finish_row(job_, row_[r], maxima_[r], scales[r].log(), z_[r] * inverse(t, r), gap_[r]);
      }
    }
  }

  // alpha_t = x_t * (s * the scale of the step before), for one row. Returns its sum.
  FASTSEQ_INLINE float step(int t, int r, const float* s, float before) {
    const float* x_t = x(t, r);
    float* a = alpha(t, r);
    const Wide tiny = Wide::set(kTiny), scale = Wide::set(before);
    Wide totals = Wide::set(0);
    uint32_t small = 0;
    for (int64_t k = 0; k < ld_; k += W) {
      const Wide p = Wide::load(x_t + k) * (Wide::load(s + k) * scale);
      small |= Wide::not_ge(p + Wide::load(padding_ + k), tiny);
      totals = totals + p;
      p.store(a + k);
    }
    if (__builtin_expect(small, 0)) look_closer(t, r);
    const float total = sum(totals);
    if (!(total >= kTiny)) job_.marks[row_[r]] = 1;
    inverse(t, r) = 1.f / total;
    return total;
  }

  // As BySequence::look_closer, for one row.
  __attribute__((noinline)) void look_closer(int t, int r) {
    std::vector<float> staging(K_);
    const float* e = emission_row(job_.model.x, row_[r], position(r, t), staging.data());
    float top = -FLT_MAX;
    for (int64_t k = 0; k < K_; ++k) top = e[k] > top ? e[k] : top;
    for (int64_t k = 0; k < K_; ++k) {
      if (alpha(t, r)[k] >= kTiny) continue;
      if (x(t, r)[k] == 0) {
        if (e[k] > -INFINITY) gap_[r] = std::min(gap_[r], top - e[k]);
      } else if (reachable(t, r, k)) {
        job_.marks[row_[r]] = 1;
        return;
      }
    }
  }

  bool reachable(int t, int r, int64_t k) const {
    if (t == 0) return job_.tables.start[k] > 0;
    const float *a = alpha(t - 1, r), *into = job_.tables.edges_t + k * ld_;
    for (int64_t i = 0; i < K_; ++i)
      if (a[i] > 0 && into[i] > 0) return true;
    return false;
  }

  void forget(int r) {
    for (int t = 0; t < length_[0]; ++t) std::memset(alpha(t, r), 0, sizeof(float) * ld_);
  }

  void backward() {
    int active = 0;
    int64_t chunk_end = length_[0];
    const int64_t chunk_steps = std::max<int64_t>(1, kChunk / count_);
    for (int t = length_[0] - 1; t >= 0; --t) {
      const int were_active = active;
      while (active < count_ && length_[active] > t) ++active;
      if (were_active) rows_by_table<SumProduct>(were_active, message_, job_.tables.edges_t, ld_, K_, sum_);
      for (int r = were_active; r < active; ++r)
        for (int64_t k = 0; k < ld_; ++k) sum_[r * ld_ + k] = job_.tables.end[k] / z_[r];
      for (int r = 0; r < active; ++r) {
        if (job_.marks[row_[r]]) {
          std::memset(message_ + r * ld_, 0, sizeof(float) * ld_);
          std::memset(x(t, r), 0, sizeof(float) * ld_);
          continue;
        }
        if (t >= kAhead) prefetch_gradient(job_, row_[r], position(r, t - kAhead));
        receive(t, r);
        if (r >= were_active) add_posterior(sums_ + (K_ + 1) * ld_);
        if (t == 0) add_posterior(sums_ + K_ * ld_);
        store_gradient(job_, row_[r], position(r, t), posterior_, weight_[r]);
      }
      if (t > 0 && (chunk_end - t >= chunk_steps || t == 1)) {
        count_block(alpha(t - 1, 0), x(t, 0), ld_, K_, (chunk_end - t) * count_, sums_);
        chunk_end = t;
      }
    }
  }

  // beta_t of one row has arrived in sum_. Leaves the message to t-1; in place of x, the message times
  // weight, for the counts; and the weighted posterior. alpha . beta = 1 holds up to rounding once it holds
  // at the end of the row. The recursion does not wait for the sum: it is divided out of the posterior, so
  // that errors do not grow with t, and out of the message every 32 steps.
  FASTSEQ_INLINE void receive(int t, int r) {
    const float *a = alpha(t, r), *beta = sum_ + r * ld_;
    float *x_t = x(t, r), *message = message_ + r * ld_;
    const Wide before = Wide::set(t ? inverse(t - 1, r) * drift_[r] : 0.f), weight = Wide::set(weight_[r]);
    Wide totals = Wide::set(0);
    for (int64_t k = 0; k < ld_; k += W) {
      const Wide a_k = Wide::load(a + k), b = Wide::load(beta + k);
      const Wide m = Wide::where_positive(a_k, Wide::load(x_t + k) * b * before);
      m.store(message + k);
      (m * weight).store(x_t + k);
      totals = Wide::fma(a_k, b, totals);
    }
    const float total = sum(totals);
    drift_[r] = t % 32 == 0 ? 1.f / total : 1.f;
    const Wide normal = Wide::set(weight_[r] / total);
    for (int64_t k = 0; k < ld_; k += W)
      (Wide::load(a + k) * Wide::load(beta + k) * normal).store(posterior_ + k);
  }

  void add_posterior(float* to) const {
    for (int64_t k = 0; k < ld_; ++k) to[k] += posterior_[k];
  }

  const Job& job_;
  const int64_t K_, ld_;
  const int count_;
  const bool gradient_;
  float* sums_;
  int64_t row_[kMaxRows];
  int length_[kMaxRows];
  float weight_[kMaxRows], gap_[kMaxRows], z_[kMaxRows], drift_[kMaxRows];
  double maxima_[kMaxRows] = {};
  float *alpha_, *x_, *sum_, *message_, *posterior_, *padding_, *inverse_;
};

}  // namespace fastseq::FASTSEQ_ISA
