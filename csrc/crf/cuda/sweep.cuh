// The first of the kernels of nll: the recursions through whole sequences, in both directions at once.
//
//     1. sweep       a team a sequence and direction: nll, marks, and a checkpoint of alpha and beta at each
//                    end of each segment                       <- this file: the only one that is sequential
//     2. posterior   a team some segments: alpha and beta again, from the checkpoints; gradient of the
//     emissions,
//                    and each team's share of the parameters' gradient
//     3. exact       a block some of the rows that were marked: float64, log domain          (exact.cuh)
//     4. reduce      the sum of the shares, and the total                                     (reduce.cuh)
//
//     grid.x: teams (several a block where a team is within a warp)      grid.y: forward, backward
//
//     forward    x_0 ..  | x_C ..     | x_2C ..          backward   x_0 ..  | x_C ..      | x_2C .. | end
//     start ->   alpha   v alpha      v alpha            end ->       beta  ^    beta     ^   beta
//                    checkpoint   checkpoint                    checkpoint     checkpoint
//
// Cost of a position that is on, each direction: K^2 multiply-adds, K^2 additions (the lagging sum, see
// edges.cuh), K exps; it reads s*K bytes (s: bytes of an emission) and writes 4K/C of checkpoints. Time: T
// dependent steps, of one read of a vector from shared memory, K/G dependent multiply-adds, and a barrier of
// the team.
#pragma once
#include "segment.cuh"

namespace fastseq::crf::cuda {

// What the sweeps leave for the kernels after them.
struct Sweeps {
  int segments;
  float *alpha,
      *beta;          // (B, segments, row): before the segment, and at its last position on; null: not wanted
  int* tag_before;    // (B, segments): the state of the position on before the segment
  int *first, *last;  // (B,): the positions at the ends of the row; -1: it is empty
  uint8_t* marks;     // (B, 2): the row must be done exactly, say forward and backward

  __device__ int64_t at(int b, int s) const { return int64_t(b) * segments + s; }
  __device__ bool marked(int b) const { return marks[2 * b] | marks[2 * b + 1]; }
};

// What a thread has gathered on its way forward.
struct Gathered {
  int on = 0, first = -1, last = -1;
  int previous = kUntagged;  // the state of the last position on
  int shifts = kSize;
  double tops = 0, gold = 0;
  float gap = INFINITY;
  bool lost = false;
};

// The share of one segment in the score of the tags; a lane a position.
template <class Regime, class S>
__device__ void gather_gold(const Batch<S, float>& batch, int b, int s, const Segment<Regime>& segment,
                            unsigned bits, Gathered& gathered) {
  const int l = Regime::Team::rank();
  if (l >= Segment<Regime>::C || !(bits >> l & 1)) return;
  const int y = segment.state[l];
  if (y == kBadTag) gathered.lost = true;
  if (y < 0) return;
  const unsigned before = bits & below(l);
  const bool is_first = !before && gathered.first < 0;
  const int from = before ? segment.state[highest(before)] : gathered.previous;
  gathered.gold += load<float>(batch.x.at(b, s * Segment<Regime>::C + l) + y);
  if (is_first)
    gathered.gold += load<float>(batch.start + y);
  else if (from >= 0)
    gathered.gold += load<float>(batch.transitions + int64_t(from) * batch.K + y);
}

// The last word on a row: its log Z, whether an edge that was left out could have mattered, and its nll. What
// was left out costs a path at least `gap`; `regret` is how far log Z lies below the best that any path could
// conceivably have.
template <class S>
__device__ void finish_row(const Batch<S, float>& batch, int b, const Gathered& g, double peaks, double z,
                           const Sweeps& sweeps, float* nll) {
  sweeps.first[b] = g.first;
  sweeps.last[b] = g.last;
  const double log_z = peaks + log(z) - g.shifts * 0.693147180559945309417;
  const double regret = peaks + g.on * log(double(batch.K)) - log_z;
  const double gold = g.gold + (g.previous >= 0 ? load<float>(batch.end + g.previous) : 0.f);
  const bool right = g.on == 0 || (!g.lost && z >= kTiny && regret + 30 < g.gap);
  sweeps.marks[2 * b] = !right;
  if (gridDim.y == 1) sweeps.marks[2 * b + 1] = 0;  // nobody goes backward
  store(nll + b, g.on ? float(log_z - (batch.tags.data ? gold : 0.0)) : 0.f);
}

template <class Regime, class S>
__device__ void sweep_forward(const Batch<S, float>& batch, int b, const Segment<Regime>& segment,
                              const Sweeps& sweeps, float* nll) {
  using Team = typename Regime::Team;
  using Edges = typename Regime::template Edges<true>;
  const int K = batch.K;
  const Edges edges(batch.transitions, K, segment.scratch);
  const Ends start{batch.start, K, greatest<Team>(batch.start, K, segment.scratch)};
  const Ends end{batch.end, K, greatest<Team>(batch.end, K, segment.scratch)};
  Gathered g;
  g.gap = edges.gap;
  for (int k = Team::rank(); k < K; k += Team::kThreads) start(k, g.gap);
  for (int s = 0; s < sweeps.segments; ++s) {
    const unsigned bits = segment.look(batch, b, s);
    if (!bits) continue;
    if (sweeps.alpha && g.on) {
      float* to = sweeps.alpha + sweeps.at(b, s) * segment.ld;
      segment.each_of_team([&](int k) { store(to + k, segment.alpha[k]); });
      if (Team::rank() == 0) sweeps.tag_before[sweeps.at(b, s)] = g.previous;
    }
    segment.exponentiate(batch, b, s, bits, g.tops, g.gap);
    gather_gold(batch, b, s, segment, bits, g);
    Team::sync();
    g.shifts += segment.forward(edges, start, g.on == 0, bits, g.lost);
    const int l = highest(bits);
    segment.each_of_team([&](int k) { segment.alpha[k] = segment.alpha[(l + 1) * segment.ld + k]; });
    if (g.on == 0) g.first = s * Segment<Regime>::C + __ffs(int(bits)) - 1;
    g.last = s * Segment<Regime>::C + l;
    g.previous = segment.state[l];
    g.on += __popc(bits);
  }
  double z = 0;
  for (int k = Team::rank(); k < K && g.on; k += Team::kThreads) z += segment.alpha[k] * end(k, g.gap);
  z = Team::over_team(z, segment.scratch, Sum());
  g.tops = Team::over_team(g.tops, segment.scratch, Sum());
  g.gold = Team::over_team(g.gold, segment.scratch, Sum());
  g.gap = -float(Team::over_team(-double(g.gap), segment.scratch, Greatest()));
  g.lost = Team::over_team(double(g.lost), segment.scratch, Greatest()) > 0;
  const double peaks = g.tops + double(g.on - 1) * edges.top + start.top + end.top;
  if (Team::rank() == 0) finish_row(batch, b, g, peaks, z, sweeps, nll);
}

template <class Regime, class S>
__device__ void sweep_backward(const Batch<S, float>& batch, int b, const Segment<Regime>& segment,
                               const Sweeps& sweeps) {
  using Team = typename Regime::Team;
  using Edges = typename Regime::template Edges<false>;
  const Edges edges(batch.transitions, batch.K, segment.scratch);
  const Ends end{batch.end, batch.K, greatest<Team>(batch.end, batch.K, segment.scratch)};
  float* carried = segment.alpha;  // which has no other use here
  float gap = INFINITY;            // the forward sweep answers for what is left out
  double tops = 0;
  bool lost = false;
  segment.each_of_team([&](int k) { carried[k] = end(k, gap) * kWhole; });
  for (int s = sweeps.segments - 1; s >= 0; --s) {
    const unsigned bits = segment.look(batch, b, s);
    if (!bits) continue;
    float* to = sweeps.beta + sweeps.at(b, s) * segment.ld;
    segment.each_of_team([&](int k) { store(to + k, carried[k]); });
    segment.exponentiate(batch, b, s, bits, tops, gap);
    Team::sync();
    segment.backward(edges, [&](int k) { return carried[k]; }, bits, carried, lost);
  }
  lost = Team::over_team(double(lost), segment.scratch, Greatest()) > 0;
  if (Team::rank() == 0) sweeps.marks[2 * b + 1] = lost;
}

template <class S, class Regime>
__global__ void __launch_bounds__(Regime::Team::kBlock, 1)
    sweep_kernel(Batch<S, float> batch, Sweeps sweeps, float* nll) {
  FASTSEQ_DYNAMIC_SHARED(unsigned char, memory);
  const int b = Regime::Team::index();
  if (b >= batch.B) return;  // a whole team, and only where teams do not wait for each other
  const Segment<Regime> segment(memory, batch.K);
  if (blockIdx.y == 0)
    sweep_forward(batch, b, segment, sweeps, nll);
  else
    sweep_backward(batch, b, segment, sweeps);
}

}  // namespace fastseq::crf::cuda
