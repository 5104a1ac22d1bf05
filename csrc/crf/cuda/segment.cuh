// A segment: C positions of one sequence, with all that the recursions need of them in shared memory. The
// padded axis is cut into segments, so that any team finds any segment without counting what is on before it;
// within one, the positions that are on are the bits of a word, and only they cost a step.
//
//     x[l]           exp(x_t - max x_t), t = s*C + l              (C rows)
//     alpha[1 + l]   forward values; alpha[0]: those before       (C + 1 rows)
//     beta[l]        backward values                              (C rows)
//     message[2]     x * beta, which a backward step reads        (2 rows, in turn)
#pragma once
#include "edges.cuh"

namespace fastseq::crf::cuda {

// Calls f(l) for the bits of a word, the lowest first.
template <class F>
__device__ void ascending(unsigned bits, const F& f) {
  for (; bits; bits &= bits - 1) f(__ffs(int(bits)) - 1);
}
__device__ inline int highest(unsigned bits) { return 31 - __clz(int(bits)); }
__device__ inline unsigned below(int l) { return (1u << l) - 1; }

template <class Regime>
struct Segment {
  using Team = typename Regime::Team;
  static constexpr int C = Regime::kSegment;

  double* scratch;  // Team::kGroups
  float *x, *alpha, *beta, *message;
  float* scales;  // (C): what the forward step to each position multiplied by
  int* state;     // (C): the tag, or one of batch.cuh's constants
  int ld;

  static __host__ __device__ int bytes(int K) {
    const int floats = (3 * C + 3) * Regime::row(K) + 2 * C;
    return (floats * 4 + Team::kGroups * 8 + 15) / 16 * 16;
  }

  __device__ Segment(unsigned char* memory, int K) : ld(Regime::row(K)) {
    x = reinterpret_cast<float*>(memory + Team::in_block() * bytes(K));
    alpha = x + C * ld;
    beta = alpha + (C + 1) * ld;
    message = beta + C * ld;
    scratch = reinterpret_cast<double*>(message + 2 * ld);
    scales = reinterpret_cast<float*>(scratch + Team::kGroups);
    state = reinterpret_cast<int*>(scales + C);
  }

  // Which positions of segment s are on. Waits first for whoever still works on the segment before.
  template <class S, class R>
  __device__ unsigned look(const Batch<S, R>& batch, int b, int s) const {
    Team::sync();
    if (Team::rank() < C) state[Team::rank()] = batch.state(b, s * C + Team::rank());
    Team::sync();
    unsigned bits = 0;
    for (int l = 0; l < C; ++l) bits |= unsigned(state[l] != kOff) << l;
    return bits;
  }

  // Calls f(k) for the tags of a row, padding included, that this thread has: among the team, or among its
  // group. The compiler is told how many where it can be, as it would prepare for any number.
  template <class F>
  __device__ void each_of_team(const F& f) const {
    each<Team::kThreads>(Team::rank(), f);
  }
  template <class F>
  __device__ void each_of_group(const F& f) const {
    each<Team::kGroup>(Team::lane(), f);
  }

  // Fills x, a group of lanes a position. Adds the maxima to `tops`, in one lane a group. To be synced.
  // Positions that are off, and padding, hold -inf and come to 0: that takes no branch.
  template <class S>
  __device__ void exponentiate(const Batch<S, float>& batch, int b, int s, unsigned bits, double& tops,
                               float& gap) const {
    fetch(batch, b, s, bits);
    constexpr int kAtOnce = Regime::kRow == 0 ? 1 : Regime::kRow <= 32 ? 4 : 128 / Regime::kRow;
    static_assert(Regime::kRow == 0 || C % (kAtOnce * Team::kGroups) == 0);
#pragma unroll 1
    for (int l = Team::group(); l < C; l += kAtOnce * Team::kGroups) {
      float most[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        most[n] = -FLT_MAX;
        each_of_group([&](int k) { most[n] = Greatest()(x[(l + n * Team::kGroups) * ld + k], most[n]); });
      }
      Team::over_group(most, Greatest());
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        float* x_l = x + (l + n * Team::kGroups) * ld;
        each_of_group([&](int k) { x_l[k] = scaled_exp(x_l[k] - most[n], gap); });
        if (Team::lane() == 0 && (bits >> (l + n * Team::kGroups) & 1)) tops += most[n];
      }
    }
  }

  // The alphas of the positions that are on, from alpha[0], or, in a `fresh` row, from its start. Returns the
  // shifts that were applied. `lost`: something may have underflowed.
  template <class Edges>
  __device__ int forward(const Edges& edges, const Ends& start, bool fresh, unsigned bits, bool& lost) const {
    int shifts = 0;
    const float* from = alpha;
    if (fresh) {
      from = begin(start, __ffs(int(bits)) - 1, lost);
      bits &= bits - 1;
    }
    ascending(bits, [&](int l) {
      const Scale scale = edges.step(
          from, x + l * ld, [&](int k, float reached, float x_k) { arrive(l, k, reached, x_k, lost); });
      if (Team::rank() == 0) scales[l] = scale.factor;
      shifts += scale.shift;
      from = alpha + (l + 1) * ld;
      Team::sync();
    });
    return shifts;
  }

  // The betas of the positions that are on, the last of them from `entering` (a row in shared or global
  // memory); `leaving`, if not null, becomes the beta of the position before the segment.
  template <class Edges, class Entering>
  __device__ void backward(const Edges& edges, const Entering& entering, unsigned bits, float* leaving,
                           bool& lost) const {
    int l = highest(bits), turn = 0;
    const auto put = [&](int k, float value, float x_k) {
      const float m = value * x_k;
      beta[l * ld + k] = value;
      message[turn * ld + k] = m;
      lost |= !(m >= kTiny) && value != 0 && x_k != 0;
    };
    each_of_team([&](int k) { put(k, entering(k), x[l * ld + k]); });
    Team::sync();
    for (unsigned rest = bits & below(l); rest; rest &= below(l)) {
      const float* from = message + turn * ld;
      l = highest(rest);
      turn ^= 1;
      edges.step(from, x + l * ld, put);
      Team::sync();
    }
    if (!leaving) return;
    edges.step(message + turn * ld, x, [&](int k, float value, float) { leaving[k] = value; });
    Team::sync();
  }

 private:
  // The emissions of the positions that are on, in x: eight are asked for before the first is waited for
  // (more would take registers that there are not). A lane later reads what it wrote itself.
  template <class S>
  __device__ void fetch(const Batch<S, float>& batch, int b, int s, unsigned bits) const {
#pragma unroll 8
    for (int l = 0; l < C; l += Team::kGroups) {
      const int at = l + Team::group();
      if (C % Team::kGroups != 0 && at >= C) continue;
      const S* from = batch.x.at(b, s * C + at);
      each_of_group([&](int k) {
        const bool is = (bits >> at & 1) && k < batch.K;
        x[at * ld + k] = is ? load<float>(from + k) : -INFINITY;
      });
    }
  }

  template <int Threads, class F>
  __device__ void each(int first, const F& f) const {
    constexpr int kRow = Regime::kRow;
    if constexpr (kRow > 0) {
#pragma unroll
      for (int k = 0; k < kRow; k += Threads)
        if (kRow % Threads == 0 || first + k < kRow) f(first + k);
    } else {
      for (int k = first; k < ld; k += Threads) f(k);
    }
  }

  // alpha_k at position l, from what of it came over the edges.
  __device__ void arrive(int l, int k, float reached, float x_k, bool& lost) const {
    const float value = reached * x_k;
    alpha[(l + 1) * ld + k] = value;
    lost |= !(value >= kTiny) && reached != 0 && x_k != 0;
  }

  // The alphas of a row's first position; returns them.
  __device__ const float* begin(const Ends& start, int l, bool& lost) const {
    float unused = 0.f;
    each_of_team([&](int k) { arrive(l, k, start(k, unused) * kWhole, x[l * ld + k], lost); });
    if (Team::rank() == 0) scales[l] = 1.f;
    Team::sync();
    return alpha + (l + 1) * ld;
  }
};

}  // namespace fastseq::crf::cuda
