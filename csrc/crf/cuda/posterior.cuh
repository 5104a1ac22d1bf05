// The second kernel of nll (see sweep.cuh): posteriors and gradients, segment by segment, in any order.
//
//     a team owns the segments  owner, owner + owners, ...  of all B * segments:
//
//       checkpoint ->  alpha_0 alpha_1 .. alpha_C-1            C steps forward
//                      beta_0  beta_1  .. beta_C-1  <- checkpoint      C steps backward
//       p_t = alpha_t * beta_t / its sum                       gradient of x_t: w (p_t - onehot(tag))
//       sum_t alpha_{t-1}^T (x_t * beta_t * factor_t)          expected transitions, K^2 sums in registers
//
// Each posterior is normalised by its own sum, so no rounding grows with T, and the sizes of alpha and beta
// cancel. A team adds up its segments in order, and writes its share of the parameters' gradient once: the
// sum over the shares (reduce.cuh) is the same in every run.
//
// Cost of a position that is on: 3 K^2 multiply-adds, 2 K^2 additions, K exps. It reads s*K bytes and writes
// s*K (s: bytes of an emission), reads 8K/C of checkpoints; each owner clears,
// adds to and writes 4 (K^2 + 2K).
#pragma once
#include "sweep.cuh"

namespace fastseq::crf::cuda {

// Calls f(row, l) for the positions of a segment that have one before: the row of alpha that has its values.
template <class F>
__device__ void each_pair(unsigned bits, bool fresh, const F& f) {
  int row = fresh ? -1 : 0;
  ascending(bits, [&](int l) {
    if (row >= 0) f(row, l);
    row = l + 1;
  });
}

// The expected transitions of an owner's segments. K <= KM: sums in the registers of the thread that has the
// edge of the forward slice.
template <int KM, int G>
class PairSums {
 public:
  using Edges = Slice<KM, G, true>;

  __device__ void add(const Segment<Registers<KM, G>>& segment, unsigned bits, bool fresh, const Edges&, int,
                      float*) {
    each_pair(bits, fresh, [&](int row, int l) {
      const float m = segment.x[l * KM + Edges::tag()];
#pragma unroll
      for (int n = 0; n < Edges::kLength; n += 4) {
        const float4 four = *reinterpret_cast<const float4*>(segment.alpha + row * KM + Edges::other(n));
        sums_[n] = fmaf(four.x, m, sums_[n]);
        sums_[n + 1] = fmaf(four.y, m, sums_[n + 1]);
        sums_[n + 2] = fmaf(four.z, m, sums_[n + 2]);
        sums_[n + 3] = fmaf(four.w, m, sums_[n + 3]);
      }
    });
  }

  __device__ void write(const Edges& edges, int K, float* partial) const {
    const int j = Edges::tag();
#pragma unroll
    for (int n = 0; n < Edges::kLength; ++n) {
      const int i = Edges::other(n);
      if (i < K && j < K) partial[i * K + j] += edges.edge(n) * sums_[n];
    }
  }

 private:
  float sums_[Edges::kLength] = {};
};

// Any K: sums in the owner's share, in global memory, by the thread that has column j.
class StreamedPairSums {
 public:
  __device__ void add(const Segment<Streamed>& segment, unsigned bits, bool fresh, const Stream<true>& edges,
                      int K, float* partial) {
    for (int j = Streamed::Team::rank(); j < K; j += Streamed::Team::kThreads) {
      for (int i = 0; i < K; ++i) {
        float sum = 0.f;
        each_pair(bits, fresh, [&](int row, int l) {
          sum = fmaf(segment.alpha[row * segment.ld + i], segment.x[l * segment.ld + j], sum);
        });
        partial[int64_t(i) * K + j] += edges.edge(i, j) * sum;
      }
    }
  }
  __device__ void write(const Stream<true>&, int, float*) const {}
};

template <class Regime>
struct PairSumsOf;
template <int KM, int G>
struct PairSumsOf<Registers<KM, G>> {
  using type = PairSums<KM, G>;
};
template <>
struct PairSumsOf<Streamed> {
  using type = StreamedPairSums;
};

// Positions that are off, or in a row without a weight: zero. A group of lanes a position.
template <class Regime, class S>
__device__ void write_zeros(const Batch<S, float>& batch, int b, int s, unsigned bits,
                            const Gradient<S>& gradient) {
  using Team = typename Regime::Team;
  constexpr int C = Regime::kSegment;
#pragma unroll 1
  for (int l = Team::group(); l < C && s * C + l < batch.T; l += Team::kGroups) {
    if (bits >> l & 1) continue;
#pragma unroll 1
    for (int k = Team::lane(); k < batch.K; k += Team::kGroup) store(gradient.at(b, s * C + l) + k, 0.f);
  }
}

// weight * (p_t - onehot) of the segment's positions into the gradient, and of the row's ends into the shares
// of `start` and `end`. Leaves x_t * beta_t * factor_t in x, ready for the pair sums. A group of lanes a
// position.
template <class Regime, class S>
__device__ void write_posteriors(const Batch<S, float>& batch, int b, int s, const Segment<Regime>& segment,
                                 unsigned bits, const Sweeps& sweeps, const Gradient<S>& gradient,
                                 float* partial) {
  using Team = typename Regime::Team;
  const int K = batch.K, ld = segment.ld;
  const float weight = float(batch.weight(b));
  const int first = sweeps.first[b], last = sweeps.last[b];
  float *start = partial + int64_t(K) * K, *end = start + K;
  for (int l = Team::group(); l < Segment<Regime>::C; l += Team::kGroups) {
    if (!(bits >> l & 1)) continue;
    const int t = s * Segment<Regime>::C + l;
    const float *a = segment.alpha + (l + 1) * ld, *beta = segment.beta + l * ld;
    float sum = 0.f;
#pragma unroll 1
    for (int k = Team::lane(); k < K; k += Team::kGroup) sum += (a[k] / kWhole) * beta[k];
    const float factor = weight / Team::over_group(sum, Sum()), pair = factor * segment.scales[l] / kWhole;
#pragma unroll 1
    for (int k = Team::lane(); k < K; k += Team::kGroup) {
      const float g = (a[k] / kWhole) * beta[k] * factor - (segment.state[l] == k ? weight : 0.f);
      store(gradient.at(b, t) + k, g);
      if (t == first) start[k] += g;
      if (t == last) end[k] += g;
      segment.x[l * ld + k] *= beta[k] * pair;
    }
  }
}

// Takes the observed transitions off an owner's share; the thread of a column has all that go to its tag.
template <class Regime>
__device__ void take_off_gold(const Segment<Regime>& segment, unsigned bits, bool fresh, int before,
                              float weight, int K, float* partial) {
  using Team = typename Regime::Team;
  each_pair(bits, fresh, [&](int row, int l) {
    const int from = row ? segment.state[row - 1] : before, to = segment.state[l];
    if (to >= 0 && to % Team::kThreads == Team::rank()) partial[int64_t(from) * K + to] -= weight;
  });
}

template <class S, class Regime>
__global__ void __launch_bounds__(Regime::Team::kBlock, Regime::kResident)
    posterior_kernel(Batch<S, float> batch, Sweeps sweeps, Gradient<S> gradient, float* partials) {
  using Team = typename Regime::Team;
  FASTSEQ_DYNAMIC_SHARED(unsigned char, memory);
  const int K = batch.K, owners = int(gridDim.x) * Team::kPerBlock;
  const Segment<Regime> segment(memory, K);
  const typename Regime::template Edges<true> forward(batch.transitions, K, segment.scratch);
  const typename Regime::template Edges<false> backward(batch.transitions, K, segment.scratch);
  const Ends start{batch.start, K, greatest<Team>(batch.start, K, segment.scratch)};
  float* partial = partials + Team::index() * partial_size(K);
  for (int64_t n = Team::rank(); n < partial_size(K); n += Team::kThreads) partial[n] = 0.f;
  typename PairSumsOf<Regime>::type pairs;

  for (int64_t task = Team::index(); task < int64_t(batch.B) * sweeps.segments; task += owners) {
    const int b = int(task / sweeps.segments), s = int(task % sweeps.segments);
    if (sweeps.marked(b)) continue;  // the exact kernel writes all of that row
    const float weight = float(batch.weight(b));
    const unsigned bits = weight == 0 ? 0 : segment.look(batch, b, s);
    write_zeros<Regime>(batch, b, s, bits, gradient);
    if (!bits) continue;
    const bool fresh = sweeps.first[b] >= s * Segment<Regime>::C;
    const int before = fresh ? kUntagged : sweeps.tag_before[task];
    const float *alpha = sweeps.alpha + task * segment.ld, *beta = sweeps.beta + task * segment.ld;
    double tops = 0;
    float gap = 0;
    bool lost = false;  // the sweeps have looked
    if (!fresh) segment.each_of_team([&](int k) { segment.alpha[k] = load<float>(alpha + k); });
    segment.exponentiate(batch, b, s, bits, tops, gap);
    Team::sync();
    segment.forward(forward, start, fresh, bits, lost);
    segment.backward(backward, [&](int k) { return load<float>(beta + k); }, bits, nullptr, lost);
    write_posteriors(batch, b, s, segment, bits, sweeps, gradient, partial);
    Team::sync();
    pairs.add(segment, bits, fresh, forward, K, partial);
    take_off_gold(segment, bits, fresh, before, weight, K, partial);
  }
  Team::sync();
  pairs.write(forward, K, partial);
}

}  // namespace fastseq::crf::cuda
