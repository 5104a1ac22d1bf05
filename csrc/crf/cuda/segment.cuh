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

// Calls f(l) for the bits of a word, the lowest first, or the highest first.
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

  // Fills x, a group of lanes a position. Adds the maxima to `tops`, in one lane a group. To be synced.
  template <class S>
  __device__ void exponentiate(const Batch<S, float>& batch, int b, int s, unsigned bits, double& tops,
                               float& gap) const {
    for (int l = Team::group(); l < C; l += Team::kGroups) {
      if (!(bits >> l & 1)) continue;
      const S* from = batch.x.at(b, s * C + l);
      float* to = x + l * ld;
      float top = -FLT_MAX;
      for (int k = Team::lane(); k < batch.K; k += Team::kGroup) {
        to[k] = load<float>(from + k);
        top = Greatest()(to[k], top);
      }
      top = Team::over_group(top, Greatest());
      for (int k = Team::lane(); k < ld; k += Team::kGroup)
        to[k] = k < batch.K ? scaled_exp(to[k] - top, gap) : 0.f;
      if (Team::lane() == 0) tops += top;
    }
  }

  // The alphas of the positions that are on, from alpha[0], or, in a `fresh` row, from its start. Returns the
  // shifts that were applied. `lost`: something may have underflowed.
  template <class Edges>
  __device__ int forward(const Edges& edges, const Ends& start, bool fresh, unsigned bits, bool& lost) const {
    int shifts = 0;
    const float* from = alpha;
    ascending(bits, [&](int l) {
      float* to = alpha + (l + 1) * ld;
      const float* x_l = x + l * ld;
      const auto put = [&](int k, float reached) {
        to[k] = reached * x_l[k];
        lost |= !(to[k] >= kTiny) && reached != 0 && x_l[k] != 0;
      };
      Scale scale;
      if (fresh) {
        float unused = 0.f;
        for (int k = Team::rank(); k < ld; k += Team::kThreads) put(k, start(k, unused) * kWhole);
      } else {
        scale = edges.step(from, put);
      }
      if (Team::rank() == 0) scales[l] = scale.factor;
      shifts += scale.shift;
      fresh = false;
      from = to;
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
    const auto put = [&](int k, float value) {
      const float m = value * x[l * ld + k];
      beta[l * ld + k] = value;
      message[turn * ld + k] = m;
      lost |= !(m >= kTiny) && value != 0 && x[l * ld + k] != 0;
    };
    for (int k = Team::rank(); k < ld; k += Team::kThreads) put(k, entering(k));
    Team::sync();
    for (unsigned rest = bits & below(l); rest; rest &= below(l)) {
      const float* from = message + turn * ld;
      l = highest(rest);
      turn ^= 1;
      edges.step(from, put);
      Team::sync();
    }
    if (!leaving) return;
    edges.step(message + turn * ld, [&](int k, float value) { leaving[k] = value; });
    Team::sync();
  }
};

}  // namespace fastseq::crf::cuda
