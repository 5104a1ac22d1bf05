// Few tags (K <= 32): the lanes of a vector are W sequences, longest first, and a step is K*K multiply-adds
// of vectors.
//
//     alpha, x: [t][k][lane]     E: scalars, broadcast      counts: one vector per (i, j), summed over lanes
//     at the end
//
// Cost per step and W sequences: 3 K^2 vector FMAs (forward, backward, counts), K exps, and two K x W
// transposes between the layout of the tensors and that of the lanes. A lane idles once its sequence has
// ended. Exps and transposes are done for all steps first: the recursions then wait for nothing but their own
// FMAs, as each applies the scale of the step before while the next is being found.
#pragma once
#include "scaled.h"
#include "semiring.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int64_t kMaxTagsBySequence = 32;

template <class V>
class BySequence {
 public:
  static constexpr int W = V::W;

  // Floats of scratch for one group of rows, the longest of L positions.
  static int64_t scratch_floats(int64_t L, int64_t K, bool gradient) {
    return L * K * W + (gradient ? L : 2) * (K * W + W) + 2 * K * W + 2 * W * round_up(K, 16) + 64;
  }

  // rows[0..count): at most W rows with at least one position on, longest first. With a gradient, adds the
  // group's share of the (K*K + 2*K) parameter sums, unscaled by the edges, to `sums`.
  BySequence(const Job& job, const int64_t* rows, int count, float* scratch, float* sums)
      : job_(job), K_(int(job.tables.K)), count_(count), gradient_(job.gradient != nullptr), sums_(sums) {
    for (int l = 0; l < count; ++l) {
      row_[l] = rows[l];
      length_[l] = int(job.model.rows.length(rows[l]));
      positions_[l] = job.model.rows.of(rows[l]);
      weight_[l] = gradient_ ? job.row_weight(rows[l]) : 0.f;
      gap_[l] = INFINITY;
    }
    const int64_t steps = gradient_ ? length_[0] : 2;
    x_ = scratch;
    alpha_ = x_ + length_[0] * K_ * W;
    inverse_ = alpha_ + steps * K_ * W;
    message_ = inverse_ + steps * W;
    posterior_ = message_ + K_ * W;
    staging_ = posterior_ + K_ * W;
    spare_ = staging_ + W * round_up(K_, 16);
    std::fill(spare_, spare_ + W * round_up(K_, 16), 0.f);
  }

  void run() {
    exponentiate();
    forward();
    if (!gradient_) return;
    for (int l = 0; l < count_; ++l)
      if (job_.marks[row_[l]]) forget(l);
    backward();
    count_transitions();
  }

 private:
  int64_t slot(int t) const { return gradient_ ? t : t & 1; }
  float* alpha(int t) const {
    return alpha_ + slot(t) * K_ * W;
  }  // not normalised: times inverse(t) it sums to 1
  float* inverse(int t) const { return inverse_ + slot(t) * W; }
  float* x(int t) const { return x_ + t * K_ * W; }
  int64_t position(int l, int t) const { return positions_[l][t]; }

  // x_t = exp(emissions - their maximum) for all t, one lane a sequence; lanes that have ended read zeros.
  void exponentiate() {
    int active = count_;
    for (int t = 0; t < length_[0]; ++t) {
      while (length_[active - 1] <= t) --active;
      const float* from[W];
      for (int l = 0; l < W; ++l)
        from[l] = l < active
                      ? emission_row(job_.model.x, row_[l], position(l, t), staging_ + l * round_up(K_, 16))
                      : spare_;
      float* x_t = x(t);
      transpose<V>(K_, [&](int l) { return from[l]; }, [&](int k) { return x_t + k * W; });
      V top = V::set(-FLT_MAX);
      for (int k = 0; k < K_; ++k) top = max(V::load(x_t + k * W), top);
      for (int k = 0; k < K_; ++k) V::exp_or_zero(V::load(x_t + k * W) - top).store(x_t + k * W);
      float tops[W];
      top.store(tops);
      for (int l = 0; l < W; ++l) maxima_[l] += tops[l];
    }
  }

  void forward() {
    const V tiny = V::set(kTiny);
    LogProduct scales[W];
    V before = V::set(1);  // the scale of the step before
    int active = count_;
    for (int t = 0; t < length_[0]; ++t) {
      while (length_[active - 1] <= t) --active;
      float live[W];
      for (int l = 0; l < W; ++l) live[l] = l < active ? 1.f : 0.f;
      const V on = V::load(live), idle = V::set(1) - on;
      V total = idle;
      uint32_t small = 0;
      float* a = alpha(t);
      const float* x_t = x(t);
      const auto finish_tag = [&](int k, V sum) {
        const V p = V::load(x_t + k * W) * (sum * before);
        small |= V::not_ge(p + idle, tiny);
        total = total + p;
        p.store(a + k * W);
      };
      if (t)
        lanes_by_table<SumProduct, V>(alpha(t - 1), job_.tables.edges, K_, finish_tag);
      else
        for (int k = 0; k < K_; ++k) finish_tag(k, V::set(job_.tables.start[k]));
      small &= (1u << active) - 1;
      if (__builtin_expect(small, 0)) look_closer(t, small);
      uint32_t lost = V::not_ge(total, tiny) & ((1u << active) - 1);
      for (int l = 0; lost; ++l, lost >>= 1)
        if (lost & 1) job_.marks[row_[l]] = 1;
      before = on / total;  // 0 for a lane that has ended: its alpha is 0 from the next step on
      before.store(inverse(t));
      float totals[W];
      total.store(totals);
      for (int l = 0; l < active; ++l) scales[l].multiply(totals[l]);
      for (int l = active - 1; l >= 0 && length_[l] == t + 1; --l) finish(l, t, scales[l].log());
    }
  }

  // Some alpha of these lanes is tiny. That is nothing if the tag is forbidden or cannot be reached; it is a
  // pruned edge, for finish_row to weigh, if the emission underflowed; and else the row must be done again.
  __attribute__((noinline)) void look_closer(int t, uint32_t lanes) {
    float top;
    for (int l = 0; lanes; ++l, lanes >>= 1) {
      if (!(lanes & 1)) continue;
      const float* e = emission_row(job_.model.x, row_[l], position(l, t), staging_);
      top = -FLT_MAX;
      for (int k = 0; k < K_; ++k) top = e[k] > top ? e[k] : top;
      for (int k = 0; k < K_; ++k) {
        if (alpha(t)[k * W + l] >= kTiny) continue;
        if (x(t)[k * W + l] == 0) {
          if (e[k] > -INFINITY) gap_[l] = std::min(gap_[l], top - e[k]);
        } else if (reachable(t, k, l)) {
          job_.marks[row_[l]] = 1;
        }
      }
    }
  }

  bool reachable(int t, int k, int l) const {
    if (t == 0) return job_.tables.start[k] > 0;
    for (int i = 0; i < K_; ++i)
      if (alpha(t - 1)[i * W + l] > 0 && job_.tables.edges[i * K_ + k] > 0) return true;
    return false;
  }

  void finish(int l, int t, double log_scales) {
    z_[l] = 0;
    for (int k = 0; k < K_; ++k) z_[l] += alpha(t)[k * W + l] * job_.tables.end[k];
    finish_row(job_, row_[l], maxima_[l], log_scales, z_[l] * inverse(t)[l], gap_[l]);
  }

  // A marked row takes no part in the backward pass: with alpha = 0 all that follows is 0.
  void forget(int l) {
    for (int t = 0; t < length_[0]; ++t)
      for (int k = 0; k < K_; ++k) alpha(t)[k * W + l] = 0;
  }

  // alpha_t . beta_t = 1 holds up to rounding once it holds at the end of a row, so that the recursion need
  // not wait for the sum; posteriors and counts are divided by it, and their error does not grow with t.
  void backward() {
    const V weights = V::load(weight_);
    int active = 0;
    for (int t = length_[0] - 1; t >= 0; --t) {
      float beta[kMaxTagsBySequence * W];
      if (active)
        lanes_by_table<SumProduct, V>(message_, job_.tables.edges_t, K_,
                                      [&](int k, V sum) { sum.store(beta + k * W); });
      else
        std::fill(beta, beta + K_ * W, 0.f);
      const int were_active = active;
      for (; active < count_ && length_[active] > t; ++active)
        for (int k = 0; k < K_; ++k) beta[k * W + active] = job_.tables.end[k] / z_[active];
      const float *a = alpha(t), *x_t = x(t);
      const V before = t ? V::load(inverse(t - 1)) : V::set(0);
      V total = V::set(0);
      for (int k = 0; k < K_; ++k) {
        const V a_k = V::load(a + k * W), b = V::load(beta + k * W);
        V::where_positive(a_k, V::load(x_t + k * W) * b * before).store(message_ + k * W);
        const V p = V::where_positive(a_k, a_k * b);
        p.store(posterior_ + k * W);
        total = total + p;
      }
      const V normal = V::where_positive(total, weights / total);
      for (int k = 0; k < K_; ++k) {
        (V::load(message_ + k * W) * normal).store(x(t) + k * W);
        (V::load(posterior_ + k * W) * normal).store(posterior_ + k * W);
      }
      for (int l = were_active; l < active; ++l)
        for (int k = 0; k < K_; ++k) sums_[K_ * K_ + K_ + k] += posterior_[k * W + l];
      store_posteriors(t, active);
    }
    for (int k = 0; k < K_; ++k) sums_[K_ * K_ + k] += sum(V::load(posterior_ + k * W));
  }

  // The weighted posteriors of position t, less the gold tags, to where the gradient is: a row of K a lane,
  // written in pieces of W tags, and the rest of them, if K is not a multiple, one by one.
  FASTSEQ_INLINE void store_posteriors(int t, int active) {
    const int64_t ld = round_up(K_, 16);
    const Gradients<float>& g = *job_.gradient;
    const bool direct = job_.model.x.type == Type::f32;
    float* to[W];
    for (int l = 0; l < W; ++l) {
      const int64_t at = l < active && direct ? row_[l] * g.stride_b + position(l, t) * g.stride_t : 0;
      to[l] = l < active && direct ? static_cast<float*>(g.emissions) + at : staging_ + l * ld;
    }
    int k = 0;
    for (; k + W <= K_; k += W)
      transpose<V>(W, [&](int i) { return posterior_ + (k + i) * W; }, [&](int l) { return to[l] + k; });
    for (; k < K_; ++k)
      for (int l = 0; l < W; ++l) to[l][k] = posterior_[k * W + l];
    for (int l = 0; l < active; ++l) {
      // not read back from the gradient, whose line may be far away
      const int64_t y = job_.tags.data ? job_.tags.at(row_[l], position(l, t)) : -1;
      if (y >= 0) to[l][y] = posterior_[y * W + l] - weight_[l];
      if (!direct)
        store_row(job_.model.x.type, g.emissions, row_[l] * g.stride_b + position(l, t) * g.stride_t, K_,
                  to[l]);
    }
  }

  // sums[i][j] += sum over t and lanes of alpha_{t-1}(i) * message_t(j), in tiles of vectors that stay in
  // registers.
  void count_transitions() {
    constexpr int kTile = kRegisters == 32 ? 5 : 3;
    in_pieces<kTile>(K_, [&](int i0, int rows) {
      in_pieces<kTile>(K_, [&](int j0, int columns) {
        with_constant<kTile>(rows, [&](auto n_i) {
          with_constant<kTile>(columns, [&](auto n_j) { count_tile<n_i, n_j>(i0, j0); });
        });
      });
    });
  }

  template <int NI, int NJ>
  FASTSEQ_INLINE void count_tile(int i0, int j0) {
    // In runs of 64 steps: a float that grows with the length of the row would lose what is added to it.
    for (int begin = 1; begin < length_[0]; begin += 64) {
      V sums[NI][NJ];
      for (int i = 0; i < NI; ++i)
        for (int j = 0; j < NJ; ++j) sums[i][j] = V::set(0);
      for (int t = begin; t < std::min(begin + 64, length_[0]); ++t) {
        const float *a = alpha(t - 1) + i0 * W, *m = x(t) + j0 * W;
        V a_i[NI];
        for (int i = 0; i < NI; ++i) a_i[i] = V::load(a + i * W);
        for (int j = 0; j < NJ; ++j) {
          const V m_j = V::load(m + j * W);
          for (int i = 0; i < NI; ++i) sums[i][j] = V::fma(a_i[i], m_j, sums[i][j]);
        }
      }
      for (int i = 0; i < NI; ++i)
        for (int j = 0; j < NJ; ++j) sums_[(i0 + i) * K_ + j0 + j] += sum(sums[i][j]);
    }
  }

  const Job& job_;
  const int K_, count_;
  const bool gradient_;
  float* sums_;
  int64_t row_[W];
  const int32_t* positions_[W];
  int length_[W];
  float weight_[W] = {}, gap_[W], z_[W];
  double maxima_[W] = {};
  float *alpha_, *x_, *inverse_, *message_, *posterior_, *staging_, *spare_;
};

}  // namespace fastseq::FASTSEQ_ISA
