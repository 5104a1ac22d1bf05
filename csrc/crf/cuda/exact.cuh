// The third kernel of nll (see sweep.cuh): rows in the float64 log domain. It does float64 input, and the
// rows that the float32 sweeps marked; what csrc/crf/exact.cpp is on a CPU.
//
//     block g     the rows g, g + grid, ..., one at a time; its own workspace, and its own share of the
//                 parameters' gradient, so that no sum depends on the order of events
//
//     forward     x_0 .. x_C-1 | x_C .. x_2C-1 | ..     log alpha of one segment of C = sqrt(T) positions at
//                              v               v        a time; its last vector stays, a checkpoint
//     backward    x_0 .. x_C-1 | x_C .. x_2C-1 | ..     the last segment first: alpha again, from the
//                 <-           <-                       checkpoint before it, then beta and the gradient
//
//     a step of alpha                                   a step of beta
//             to: 32 tags at a time                             to
//           +-----------+                                     +------------------+
//     from  | j = lane  |  i = warp, warp + 8, ..       from  | j = lane, +32, ..|  i = warp, warp + 8, ..
//           +-----------+                                     +------------------+
//     a thread has a column's every 8th tag, and        a warp has a row, and adds it up by shuffles;
//     warp 0 joins the 8 sums, in order                 the pair (i, j) of the gradient is always the same
//                                                       thread's
//
// Rows of A are read as they lie (4 or 8 bytes an edge and pass, from a cache), in two passes a step: for the
// maximum, and for the sum. Cost of an edge: 4 additions and an exp (some 30 operations) for a value; with
// gradients twice that again, and a multiply-add into the share, 16 bytes to and from a cache. The block
// meets 2 ceil(K/32) + 1 times a step forward, and twice a step backward.
//
// Infinities need no special case in the loops: -inf falls out as a weight of 0, and NaN or +inf make log Z
// NaN.
#pragma once
#include <cmath>
#include <limits>

#include "batch.cuh"
#include "team.cuh"

namespace fastseq::crf::cuda {
namespace exact {

using Block = Team<256>;
constexpr int kWarps = Block::kGroups, kLanes = Block::kGroup;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// How many positions a segment has.
__host__ __device__ inline int segment_length(int T) { return T > 1 ? int(ceil(sqrt(double(T)))) : 1; }
__host__ __device__ inline int segment_count(int T) {
  return (T + segment_length(T) - 1) / segment_length(T);
}

// A block's vectors of K doubles, in global memory.
struct Workspace {
  int C;                // positions of a segment
  double* checkpoints;  // (segments, K): log alpha after each segment
  double* alpha;        // (C, K): log alpha at the positions on of one segment, one after the other
  double *beta, *next;  // (K): log beta; and with x, as the step before reads it

  __device__ Workspace(double* memory, int T, int K)
      : C(segment_length(T)),
        checkpoints(memory),
        alpha(checkpoints + int64_t(segment_count(T)) * K),
        beta(alpha + int64_t(C) * K),
        next(beta + K) {}
};

struct Shared {
  double most[kWarps][kLanes], sum[kWarps][kLanes];  // of a tile of 32 tags, from each warp
  double scratch[kWarps];
};

// What may be subtracted from terms of which the greatest is `most`.
__device__ inline double shift_of(double most) { return most == -kInf ? 0.0 : most; }

// One row at work. All threads of the block hold the same in all members.
template <class S, class R>
struct Row {
  const Batch<S, R>& batch;
  const Workspace& work;
  Shared& shared;
  int b, first, last;  // the positions at the ends; first > last: the row is empty

  __device__ Row(const Batch<S, R>& batch, const Workspace& work, Shared& shared, int b)
      : batch(batch), work(work), shared(shared), b(b) {
    double before = -batch.T, end = -1;  // minus the first position, as the greatest is looked for; the last
    for (int t = Block::rank(); t < batch.T; t += Block::kThreads) {
      if (batch.state(b, t) == kOff) continue;
      before = Greatest()(before, -double(t));
      end = t;
    }
    first = -int(Block::over_team(before, shared.scratch, Greatest()));
    last = int(Block::over_team(end, shared.scratch, Greatest()));
  }

  __device__ bool empty() const { return first > last; }
  __device__ int first_segment() const { return first / work.C; }
  __device__ int last_segment() const { return last / work.C; }
  // The row's part of segment s.
  __device__ int begin(int s) const { return s == first_segment() ? first : s * work.C; }
  __device__ int end(int s) const { return s == last_segment() ? last + 1 : (s + 1) * work.C; }

  __device__ double x(int t, int k) const { return load<double>(batch.x.at(b, t) + k); }

  // What the tag at position t adds to the score of the row's tags; NaN for a bad one.
  __device__ double tag_score(int t, int tag) const {
    if (tag == kBadTag) return kNaN;
    int before = t - 1;
    while (before > first && batch.state(b, before) == kOff) --before;
    const int from = t == first ? kOff : batch.state(b, before);
    double score = x(t, tag);
    if (t == first) score += load<double>(batch.start + tag);
    if (from >= 0) score += load<double>(batch.transitions + int64_t(from) * batch.K + tag);
    if (t == last) score += load<double>(batch.end + tag);
    return score;
  }

  // The score of the row's tags, 0 without tags.
  __device__ double gold_score() const {
    double score = 0;
    for (int t = first + Block::rank(); t <= last; t += Block::kThreads) {
      const int tag = batch.state(b, t);
      if (tag != kOff && tag != kUntagged) score += tag_score(t, tag);
    }
    return Block::over_team(score, shared.scratch, Sum());
  }

  // ---- forward -----------------------------------------------------------------------------------------

  __device__ void start(double* alpha) const {
    for (int k = Block::rank(); k < batch.K; k += Block::kThreads)
      alpha[k] = load<double>(batch.start + k) + x(first, k);
  }

  // This warp's sources of tag j, left in the block's tile.
  __device__ void add_sources(const double* alpha, int j) const {
    const int K = batch.K, warp = Block::group(), lane = Block::lane();
    const R* column = batch.transitions + j;
    double most = -kInf, sum = 0;
    if (j < K) {
      for (int i = warp; i < K; i += kWarps)
        most = Greatest()(alpha[i] + load<double>(column + int64_t(i) * K), most);
      const double shift = shift_of(most);
      for (int i = warp; i < K; i += kWarps)
        sum += exp(alpha[i] + load<double>(column + int64_t(i) * K) - shift);
    }
    shared.most[warp][lane] = most;
    shared.sum[warp][lane] = sum;
  }

  // log sum_i exp(alpha_i + A_ij) of the tile's tag in this lane, from the sums of all warps.
  __device__ double join_sources() const {
    const int lane = Block::lane();
    double most = -kInf, sum = 0;
    for (int w = 0; w < kWarps; ++w) most = Greatest()(shared.most[w][lane], most);
    const double shift = shift_of(most);
    for (int w = 0; w < kWarps; ++w) sum += shared.sum[w][lane] * exp(shared.most[w][lane] - shift);
    return shift + log(sum);
  }

  // log alpha of position t from that of the position on before it.
  __device__ void step(const double* alpha, int t, double* to) const {
    for (int tile = 0; tile < batch.K; tile += kLanes) {
      const int j = tile + Block::lane();
      const bool writes = Block::group() == 0 && j < batch.K;
      const double emission = writes ? x(t, j) : 0.0;  // asked for early: it comes from far away
      add_sources(alpha, j);
      Block::sync();
      if (writes) to[j] = join_sources() + emission;
      Block::sync();
    }
  }

  // Fills work.alpha with segment s, from the checkpoint before it, and returns the last vector: of the
  // checkpoint, where nothing in the segment is on.
  __device__ const double* advance(int s) const {
    const double* alpha = s > first_segment() ? work.checkpoints + int64_t(s - 1) * batch.K : nullptr;
    double* to = work.alpha;
    for (int t = begin(s); t < end(s); ++t) {
      if (batch.state(b, t) == kOff) continue;
      if (t == first)
        start(to);
      else
        step(alpha, t, to);
      Block::sync();
      alpha = to;
      to += batch.K;
    }
    return alpha;
  }

  // log Z, from alpha at the last position; every warp finds it for itself, with the same result.
  __device__ double join_end(const double* alpha) const {
    double most = -kInf, sum = 0;
    for (int k = Block::lane(); k < batch.K; k += kLanes)
      most = Greatest()(alpha[k] + load<double>(batch.end + k), most);
    const double shift = shift_of(Block::over_group(most, Greatest()));
    for (int k = Block::lane(); k < batch.K; k += kLanes)
      sum += exp(alpha[k] + load<double>(batch.end + k) - shift);
    return shift + log(Block::over_group(sum, Sum()));
  }

  // Leaves a checkpoint after each segment, and returns log Z.
  __device__ double forward() const {
    const double* alpha = nullptr;
    for (int s = first_segment(); s <= last_segment(); ++s) {
      alpha = advance(s);
      double* checkpoint = work.checkpoints + int64_t(s) * batch.K;
      for (int k = Block::rank(); k < batch.K; k += Block::kThreads) checkpoint[k] = alpha[k];
      Block::sync();
    }
    return join_end(alpha);
  }
};

// ---- gradient ------------------------------------------------------------------------------------------

// The gradient of one row, weight * (expected - observed), from a finite log Z.
template <class S, class R>
struct Backward {
  const Row<S, R>& row;
  const Gradient<S>& gradient;
  double log_z, weight;
  double *pairs, *start, *end;  // the block's share: (K,K), (K), (K)

  __device__ Backward(const Row<S, R>& row, const Gradient<S>& gradient, double log_z, double weight,
                      double* partial)
      : row(row),
        gradient(gradient),
        log_z(log_z),
        weight(weight),
        pairs(partial),
        start(pairs + int64_t(row.batch.K) * row.batch.K),
        end(start + row.batch.K) {}

  // log beta_i = log sum_j exp(A_ij + next_j) of one position and tag, by a warp. The terms of that sum,
  // times factor = weight * alpha_i exp(shift) / Z, are the expected transitions.
  __device__ void step_of(int i, double alpha) const {
    const int K = row.batch.K;
    const R* edges = row.batch.transitions + int64_t(i) * K;
    const double* next = row.work.next;
    double* pair = pairs + int64_t(i) * K;
    double most = -kInf, sum = 0;
    for (int j = Block::lane(); j < K; j += kLanes)
      most = Greatest()(load<double>(edges + j) + next[j], most);
    const double shift = shift_of(Block::over_group(most, Greatest()));
    // At most 1, as alpha(i) beta(i) <= Z. Where shift stands for -inf all terms are 0, and the factor must
    // be finite.
    const double exponent = alpha + shift - log_z;
    const double factor = weight * exp(exponent < 1.0 ? exponent : 1.0);
    for (int j = Block::lane(); j < K; j += kLanes) {
      const double term = exp(load<double>(edges + j) + next[j] - shift);
      sum += term;
      pair[j] += factor * term;
    }
    sum = Block::over_group(sum, Sum());
    if (Block::lane() == 0) row.work.beta[i] = shift + log(sum);
  }

  // log beta of the position whose log alpha this is, and the pairs of it and of the one after.
  __device__ void step(const double* alpha) const {
    for (int i = Block::group(); i < row.batch.K; i += kWarps) step_of(i, alpha[i]);
  }

  __device__ void from_end() const {
    for (int k = Block::rank(); k < row.batch.K; k += Block::kThreads)
      row.work.beta[k] = load<double>(row.batch.end + k);
  }

  // The gradient of position t, with alpha and beta at hand, and what the step to the position before needs.
  __device__ void write(int t, int tag, const double* alpha) const {
    for (int k = Block::rank(); k < row.batch.K; k += Block::kThreads) {
      const double beta = row.work.beta[k];
      const double g = weight * exp(alpha[k] + beta - log_z) - (k == tag ? weight : 0.0);
      store(gradient.at(row.b, t) + k, g);
      if (t == row.first) start[k] += g;
      if (t == row.last) end[k] += g;
      row.work.next[k] = row.x(t, k) + beta;
    }
  }

  // Segment s, whose alphas are in work.alpha up to the vector `alpha`. `after` is the tag of the position
  // that follows; returns that of the segment's first.
  __device__ int segment(int s, const double* alpha, int after) const {
    for (int t = row.end(s) - 1; t >= row.begin(s); --t) {
      const int tag = row.batch.state(row.b, t);
      if (tag == kOff) continue;
      if (t == row.last)
        from_end();
      else
        step(alpha);
      Block::sync();
      write(t, tag, alpha);
      if (Block::rank() == 0 && tag >= 0 && after >= 0) pairs[int64_t(tag) * row.batch.K + after] -= weight;
      Block::sync();
      after = tag;
      alpha -= row.batch.K;
    }
    return after;
  }

  // After row.forward().
  __device__ void run() const {
    int after = kOff;
    for (int s = row.last_segment(); s >= row.first_segment(); --s) after = segment(s, row.advance(s), after);
  }
};

// Row b of the gradient where it is no matter of marginals: `value` where on, 0 where off. A warp a position.
template <class S, class R>
__device__ void fill(const Batch<S, R>& batch, int b, const Gradient<S>& gradient, double value) {
  for (int t = Block::group(); t < batch.T; t += kWarps) {
    const double written = batch.state(b, t) == kOff ? 0.0 : value;
    for (int k = Block::lane(); k < batch.K; k += kLanes) store(gradient.at(b, t) + k, written);
  }
}

__device__ inline void fill(double* partial, int K, double value) {
  for (int64_t n = Block::rank(); n < partial_size(K); n += Block::kThreads) partial[n] = value;
  Block::sync();
}

// Row b: its nll, and, if wanted, its gradient.
template <class S, class R>
__device__ void do_row(const Row<S, R>& row, R* nll, const Gradient<S>& gradient, double* partial) {
  const double weight = row.batch.weight(row.b);
  double log_z = row.empty() ? 0.0 : row.forward();
  const double gold = row.empty() ? 0.0 : row.gold_score();
  if (gold != gold) log_z = kNaN;
  const bool invalid = log_z != log_z, possible = !invalid && log_z != -kInf;
  if (Block::rank() == 0)
    store(nll + row.b, row.batch.tags.data && !possible && !invalid ? kInf : log_z - gold);
  if (!partial) return;
  fill(row.batch, row.b, gradient, invalid && weight != 0 ? kNaN : 0.0);
  Block::sync();
  if (weight == 0 || row.empty()) return;
  if (invalid) fill(partial, row.batch.K, kNaN);
  if (possible) Backward<S, R>(row, gradient, log_z, weight, partial).run();
}

}  // namespace exact

// Doubles of global memory for each block of the exact kernel.
__host__ __device__ inline int64_t exact_workspace(int T, int K) {
  return (int64_t(exact::segment_count(T)) + exact::segment_length(T) + 2) * K;
}

// marks (B,2): a row is done where either is not 0; null: all rows. workspace: exact_workspace(T, K) a block.
// With a gradient: partials has partial_size(K) a block, and used[block] says whether it was written.
// Without: both are null.
template <class S, class R>
__global__ void __launch_bounds__(exact::Block::kBlock)
    exact_kernel(Batch<S, R> batch, const uint8_t* marks, R* nll, Gradient<S> gradient, double* workspace,
                 double* partials, uint8_t* used) {
  __shared__ exact::Shared shared;
  const exact::Workspace work(workspace + blockIdx.x * exact_workspace(batch.T, batch.K), batch.T, batch.K);
  double* partial = partials ? partials + blockIdx.x * partial_size(batch.K) : nullptr;
  bool fresh = true;
  for (int b = int(blockIdx.x); b < batch.B; b += int(gridDim.x)) {
    if (marks && !(marks[2 * b] | marks[2 * b + 1])) continue;
    if (fresh && partial) exact::fill(partial, batch.K, 0.0);
    fresh = false;
    exact::do_row(exact::Row<S, R>(batch, work, shared, b), nll, gradient, partial);
  }
  if (partial && threadIdx.x == 0) used[blockIdx.x] = !fresh;
}

}  // namespace fastseq::crf::cuda
