// Viterbi: the best path of every row, and its score, in one launch.
//
//     score_t(j) = max over i of ((score_t-1(i) + A_ij) + x_t(j))     pointer_t(j) = the first i that has it
//
// Rounding and ties are those of csrc/crf/viterbi.cpp: sums are compared as they are after both additions.
//
//     a row      a team of threads (team.cuh), with the transitions in its registers
//     a thread   tag j, and every G-th four of the sources i:    i = 0123 4567 89..
//                K/G transitions; G neighbouring lanes compare       g0   g1   g2
//     a step     scores of t-1, in shared memory -> scores of t, in the other of two such vectors; one wait
//     K > 128    a thread has the tags j = rank, rank + threads, ..; neighbouring threads read row i of A
//                together, from a cache, in every step
//
//     T      | window 0 | window 1 | window 2 |    pointers are kept of one window of M positions, in shared
//     there   --------->|--------->|--------->     memory; the scores before a window go to `checkpoints`
//     trace                         <---------     the path follows the pointers of the last window,
//     back               --->, <---                each one before it is swept again from its checkpoint
//
// Cost of an edge: 2 additions, 1 comparison and 2 selections; twice that in all windows but the last. Bytes
// of global memory, for a row with L positions on: L K of the type of x, twice if not in the last window; T
// of the mask, twice; 8 T for the path; 2 (T/M - 1) K scores for checkpoints, and no history of T K pointers;
// the transitions once (K > 128: L - 1 times, from L2 or L1). M is 256 or 512 for K <= 128, then 128 down
// to 10.
//
// Only positions that are on cost a step; a window without any costs a look at the mask.
#pragma once
#include "kernels.h"
#include "viterbi_recursion.cuh"

namespace fastseq::crf::cuda {
namespace decoding {

// ---- a row ------------------------------------------------------------------------------------------------

// The best of the team's best last tags, for each of its threads.
template <class Team, class R>
__device__ Best<R> best_of_team(const Best<R>& mine, int K, double* scratch) {
  const double top = Team::over_team(double(mine.value), scratch, Greatest());
  const int tag = double(mine.value) == top ? mine.tag : K - 1;
  return {R(top), -int(Team::over_team(-double(tag), scratch, Greatest()))};
}

// At least one, for the score of a row without positions.
template <class Regime>
__host__ __device__ int window_count(int T, int K) {
  const int M = Memory<Regime>::window(T, K);
  return T > M ? (T - 1) / M + 1 : 1;
}

// Whether a thread has seen anything that makes the score of a row of this length NaN.
template <class Regime, class S, class R>
__device__ bool is_spoilt(const Regime& recursion, const Batch<S, R>& batch, int length) {
  bool spoilt = recursion.spoilt || (length > 1 && recursion.spoilt_by_edges());
  for (int k = Regime::Team::rank(); k < batch.K; k += Regime::Team::kThreads)
    spoilt |= spoils(load<R>(batch.start + k)) || spoils(load<R>(batch.end + k));
  return spoilt;
}

// Once the last step is done: stores the score of row b, and returns the last tag.
template <class Regime, class S, class R>
__device__ int finish(const Regime& recursion, const Batch<S, R>& batch, int b, int length, double* scratch,
                      R* scores) {
  using Team = typename Regime::Team;
  if (length == 0) {
    if (Team::rank() == 0) store(scores + b, R(0));
    return 0;
  }
  const Best<R> best = best_of_team<Team>(recursion.last(), batch.K, scratch);
  const bool spoilt = Team::over_team(double(is_spoilt(recursion, batch, length)), scratch, Greatest()) > 0;
  if (Team::rank() == 0) store(scores + b, spoilt ? kNaN<R> : best.value);
  return best.tag;
}

// Elements of R that a row needs for its checkpoints.
template <class Regime>
__host__ __device__ int64_t checkpoint_size(int T, int K) {
  return int64_t(window_count<Regime>(T, K) - 1) * K;
}

// There and back again: the n-th look is at window 0, 1, .., windows - 1, windows - 1, .., 1, 0.
template <class Regime, class S, class R>
__global__ void __launch_bounds__(Regime::Team::kBlock, 1)
    viterbi_kernel(Batch<S, R> batch, int64_t* paths, R* scores, R* checkpoints) {
  FASTSEQ_DYNAMIC_SHARED(unsigned char, shared);
  using Team = typename Regime::Team;
  const int b = Team::index(), windows = window_count<Regime>(batch.T, batch.K);
  if (b >= batch.B) return;  // a whole team, and only where teams do not wait for each other
  const Memory<Regime> memory(shared, batch.T, batch.K);
  Window<Regime> window(memory);
  Regime recursion(batch, b, memory);
  int first = -1, last = -1, length = 0, tag = 0;  // windows with positions on; how many; where the path is
  for (int n = 0; n < 2 * windows; ++n) {
    const bool there = n < windows;
    const int w = there ? n : 2 * windows - 1 - n;
    if (n == windows) tag = finish(recursion, batch, b, length, memory.scratch(), scores);
    window.look(batch, b, w * memory.M);
    if (window.on > 0 && first < 0) first = w;
    if (window.on > 0 && (there || w != last)) {  // of the last one the pointers are still there
      R* checkpoint = checkpoints + b * checkpoint_size<Regime>(batch.T, batch.K) + int64_t(w - 1) * batch.K;
      if (w == first)
        recursion.restore(batch.start);
      else if (there)
        recursion.save(checkpoint);
      else
        recursion.restore(checkpoint);
      recursion.run(window, w == first);
    }
    if (there) {
      length += window.on;
      if (window.on > 0) last = w;
    } else {
      if (Team::rank() == 0) tag = window.trace(tag);
      Team::sync();
      window.write(paths + int64_t(b) * batch.T, batch.T);
    }
  }
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the regime for K tags, as a Type.
template <class S, class R, class F>
auto with_regime(int K, const F& f) {
  if (K <= 16) return f(Type<InRegisters<S, R, 16, 1>>());
  if (K <= 32) return f(Type<InRegisters<S, R, 32, 1>>());
  if (K <= 64) return f(Type<InRegisters<S, R, 64, 4>>());
  if (K <= 128) return f(Type<InRegisters<S, R, 128, 4>>());
  if (K <= 256) return f(Type<InCache<S, R, uint8_t>>());
  return f(Type<InCache<S, R, uint16_t>>());
}

}  // namespace decoding

template <class S, class R>
int64_t viterbi_workspace(const Batch<S, R>& batch) {
  return batch.B * decoding::with_regime<S, R>(batch.K, [&](auto regime) {
           return decoding::checkpoint_size<typename decltype(regime)::type>(batch.T, batch.K);
         });
}

template <class S, class R>
void viterbi(const Batch<S, R>& batch, int64_t* paths, R* scores, R* checkpoints, cudaStream_t stream) {
  if (batch.B == 0) return;
  decoding::with_regime<S, R>(batch.K, [&](auto regime) {
    using Regime = typename decltype(regime)::type;
    using Team = typename Regime::Team;
    const int shared = Team::kPerBlock * decoding::Memory<Regime>::bytes(batch.T, batch.K);
    const int blocks = (batch.B + Team::kPerBlock - 1) / Team::kPerBlock;
    FASTSEQ_LAUNCH((decoding::viterbi_kernel<Regime, S, R>), dim3(unsigned(blocks)), dim3(Team::kBlock),
                   shared, stream, batch, paths, scores, checkpoints);
  });
}

}  // namespace fastseq::crf::cuda
