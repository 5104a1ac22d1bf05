// E = exp(A - max A), as a team holds it, and one step of a recursion over it: the vector that it reads lies
// in shared memory, and the step brings it back to size.
//
//     forward     next_j = sum_i v_i E_ij          thread (j, g) sums every G-th chunk of 4 sources i
//     backward    next_i = sum_j E_ij v_j          thread (i, g), the same with rows for columns
//
// Numbers. A vector is kept at a sum near 2^60, by powers of two, so that nothing is rounded. What the sum
// was, each thread finds on its way through v: the step waits for no reduction, but uses the size of the
// vector before, and so lags one step behind. Entries of E, and of X = exp(x - max x), below e^-62 are left
// out, as 0, and answered for at the end (`gap`); then the product of an entry of E and a value of at least
// kTiny = 2^-30 is a normal float, no sum is 0 unless nothing was added to it, and a value that falls below
// kTiny, which is 2^-90 of the whole, is seen: its row is marked, to be done exactly.
#pragma once
#include <cfloat>

#include "batch.cuh"
#include "team.cuh"

namespace fastseq::crf::cuda {

constexpr float kTiny = 0x1p-30f;
constexpr float kLogPruned = -62.f;
constexpr int kSize = 60;  // log2 of the sum that vectors are kept at
constexpr float kWhole = 0x1p60f;

// exp(below), or 0 where that is left out; `gap` is how far below the nearest of those was. NaN stays NaN.
__device__ inline float scaled_exp(float below, float& gap) {
  const bool pruned = below < kLogPruned;
  gap = pruned && below > -INFINITY && -below < gap ? -below : gap;
  return pruned ? 0.f : expf(below);
}

// Multiplying by `factor` = 2^shift brings a vector of this sum to the size of kWhole.
struct Scale {
  int shift = 0;
  float factor = 1.f;
  Scale() = default;
  __device__ explicit Scale(float sum) {
    shift = kSize + 127 - (__float_as_int(sum) >> 23 & 0xff);
    shift = shift < 127 ? shift : 127;
    factor = __int_as_float((shift + 127) << 23);
  }
};

// The greatest of values[0..n), at least -FLT_MAX; every thread of the team gets it.
template <class Team>
__device__ float greatest(const float* values, int64_t n, double* scratch) {
  float top = -FLT_MAX;
  for (int64_t i = Team::rank(); i < n; i += Team::kThreads) top = Greatest()(load<float>(values + i), top);
  return float(Team::over_team(top, scratch, Greatest()));
}

// The exponentiated `start` or `end`, not kept: a row uses each once.
struct Ends {
  const float* values;
  int K;
  float top;
  __device__ float operator()(int k, float& gap) const {
    return k < K ? scaled_exp(load<float>(values + k) - top, gap) : 0.f;
  }
};

// K <= KM: a thread's slice of E, in registers.
template <int KM, int G, bool Forward>
class Slice {
 public:
  using Team = cuda::Team<KM * G>;
  static constexpr int kLength = KM / G;
  float top, gap = INFINITY;

  __device__ Slice(const float* transitions, int K, double* scratch) {
    top = greatest<Team>(transitions, int64_t(K) * K, scratch);
#pragma unroll
    for (int n = 0; n < kLength; ++n) {
      const int i = Forward ? other(n) : tag(), j = Forward ? tag() : other(n);
      e_[n] = i < K && j < K ? scaled_exp(load<float>(transitions + i * K + j) - top, gap) : 0.f;
    }
  }

  // Calls out(k, next_k, x_k) in one thread for each tag k < KM. All of v has been written, and the team
  // synced.
  template <class Out>
  __device__ Scale step(const float* v, const float* x, const Out& out) const {
    const float x_k = x[tag()];  // asked for early, by all, so that nothing waits for it in the end
    float4 parts{}, sums{};      // four chains of additions, to wait less for each
#pragma unroll
    for (int n = 0; n < kLength; n += 4) {
      const float4 four = *reinterpret_cast<const float4*>(v + other(n));
      parts.x = fmaf(four.x, e_[n], parts.x), sums.x += four.x;
      parts.y = fmaf(four.y, e_[n + 1], parts.y), sums.y += four.y;
      parts.z = fmaf(four.z, e_[n + 2], parts.z), sums.z += four.z;
      parts.w = fmaf(four.w, e_[n + 3], parts.w), sums.w += four.w;
    }
    float reached = (parts.x + parts.y) + (parts.z + parts.w), sum = (sums.x + sums.y) + (sums.z + sums.w);
    for (int g = 1; g < G; g *= 2) {
      reached += __shfl_xor_sync(Team::lanes(), reached, g);
      sum += __shfl_xor_sync(Team::lanes(), sum, g);
    }
    const Scale scale(sum);
    if (part() == 0) out(tag(), reached * scale.factor, x_k);
    return scale;
  }

  static __device__ int tag() { return Team::rank() / G; }
  // The tag at the other end of the thread's n-th edge: chunks of 4 in turn, so that the G readers of a step
  // read neighbouring words of shared memory.
  static __device__ int other(int n) { return 4 * (n / 4 * G + part()) + n % 4; }
  __device__ float edge(int n) const { return e_[n]; }

 private:
  static __device__ int part() { return Team::rank() % G; }
  float e_[kLength];
};

// Any K: E does not fit, and is exponentiated anew from the transitions, which stay in L2, at each step.
template <bool Forward>
class Stream {
 public:
  using Team = cuda::Team<512>;
  float top, gap = INFINITY;

  __device__ Stream(const float* transitions, int K, double* scratch) : transitions_(transitions), K_(K) {
    top = greatest<Team>(transitions, int64_t(K) * K, scratch);
    for (int64_t n = Team::rank(); n < int64_t(K) * K; n += Team::kThreads)
      scaled_exp(load<float>(transitions + n) - top, gap);
  }

  // Forward a thread has a tag j, and neighbouring threads read neighbouring columns; backward a warp has a
  // tag i, and its lanes read along the row.
  template <class Out>
  __device__ Scale step(const float* v, const float* x, const Out& out) const {
    float sum = 0.f;
    for (int k = Team::lane(); k < K_; k += Team::kGroup) sum += v[k];
    const Scale scale(Team::over_group(sum, Sum()));
    if constexpr (Forward) {
      for (int j = Team::rank(); j < K_; j += Team::kThreads) {
        float reached = 0.f;
        for (int i = 0; i < K_; ++i) reached = fmaf(v[i], edge(i, j), reached);
        out(j, reached * scale.factor, x[j]);
      }
    } else {
      for (int i = Team::group(); i < K_; i += Team::kGroups) {
        float reached = 0.f;
        for (int j = Team::lane(); j < K_; j += Team::kGroup) reached = fmaf(v[j], edge(i, j), reached);
        reached = Team::over_group(reached, Sum());
        if (Team::lane() == 0) out(i, reached * scale.factor, x[i]);
      }
    }
    return scale;
  }

  __device__ float edge(int i, int j) const {
    float unused = 0.f;
    return scaled_exp(load<float>(transitions_ + int64_t(i) * K_ + j) - top, unused);
  }

 private:
  const float* transitions_;
  int K_;
};

// The regimes: how many threads a sequence gets, and where E is.
template <int KM, int G>
struct Registers {
  using Team = cuda::Team<KM * G>;
  template <bool Forward>
  using Edges = Slice<KM, G, Forward>;
  static constexpr int kSegment = 16, kRow = KM;  // the row as a constant, for loops over it
  static constexpr int kResident = KM <= 32   ? 3
                                   : KM <= 64 ? 2
                                              : 1;  // blocks that registers must have room for
  static __host__ __device__ int row(int) { return KM; }
};
struct Streamed {
  using Team = cuda::Team<512>;
  template <bool Forward>
  using Edges = Stream<Forward>;
  static constexpr int kSegment = 4, kRow = 0;  // no constant
  static constexpr int kResident = 1;
  static __host__ __device__ int row(int K) { return (K + 3) / 4 * 4; }
};

}  // namespace fastseq::crf::cuda
