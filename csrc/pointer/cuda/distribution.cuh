// The output distribution of a pointer-generator, and its gradient.
//
//     distribution_order_kernel   block b    the source words of b, sorted, for all of its T rows
//     distribution_kernel         block n    row n = (b, t)
//     distribution_grad_kernel    block n    row n; it needs no order
//
// A thread has every kThreads-th word of a row, and goes through them twice: first the softmax's maximum and
// sum in one pass (a sum is brought down whenever a greater logit comes), then the outputs. Copies are added
// at the end, a thread a word: a sum over neighbours of the sorted source, in its order. No atomics; the
// order of each sum depends on the sizes alone, so the same bits come out in every run.
//
// Global memory traffic of a row, for s bytes a logit, r a result, P source positions: the mixture 2 s V + r
// (V + num_oov), where s V + r (V + num_oov) is the least; the gradient 2 (s + r) V + s V, where (s + r) V +
// s V is. What is read twice comes from L2 the second time, where the rows in flight fit. The source adds (36
// + 4 r) P for the mixture, (16 + 4 r) P for the gradient, and 36 P a row of b for the sort, which also costs
// P^2 comparisons, of ids that lie in shared memory.
#pragma once
#include "distribution.h"

namespace fastseq::pointer::cuda {
namespace mixing {

constexpr int kThreads = 512, kWarps = kThreads / 32;
template <class R>
constexpr int kBlocks = sizeof(R) == 8 ? 1 : 2;  // that fit on a multiprocessor: leaves registers enough
constexpr int kBatch = 4;                        // words of a thread that are loaded together
constexpr int kTile = 1024;                      // ids that a block looks at together
constexpr int64_t kAbsent = INT64_MAX;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <class R>
__device__ R sigmoid(R x) {
  return 1 / (1 + exponential(-x));
}

// What a part of a row adds up to: sum_v exp(z_v - shift), and the same times grad_v; where top, the greatest
// logit, is -inf, the shift is 0. NaN and +inf make the sums NaN.
template <class R>
struct Sums {
  R top = -INFINITY, total = 0, dot = 0;

  __device__ R shift() const { return top == -INFINITY ? R(0) : top; }
  // Several words at once, for one look at whether a sum must be brought down.
  __device__ void add(const R (&z)[kBatch], const R (&grad)[kBatch]) {
    R greatest = top;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) greatest = z[j] > greatest ? z[j] : greatest;
    if (greatest > top) bring_down_to(greatest);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const R power = exponential(z[j] - shift());
      total += power, dot += power * grad[j];
    }
  }
  __device__ void add(Sums other) {
    const R greater = other.top > top ? other.top : top;
    bring_down_to(greater), other.bring_down_to(greater);
    total += other.total, dot += other.dot;
  }

 private:
  __device__ void bring_down_to(R greater) {
    const R less = greater == top ? R(1) : exponential(top - greater);
    total *= less, dot *= less, top = greater;
  }
};

// A row's sums, and what the source positions add up to.
template <class R>
struct Total {
  Sums<R> sums;
  R copied;
};

constexpr int kScratch = 4 * kWarps;  // elements of R

// The total over all threads, in each of them: over a warp, then over warps, in a fixed order.
template <class R>
__device__ Total<R> over_block(Total<R> mine, R* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Sums<R> other;
    other.top = __shfl_xor_sync(kFullMask, mine.sums.top, step);
    other.total = __shfl_xor_sync(kFullMask, mine.sums.total, step);
    other.dot = __shfl_xor_sync(kFullMask, mine.sums.dot, step);
    mine.sums.add(other);
    mine.copied += __shfl_xor_sync(kFullMask, mine.copied, step);
  }
  if (threadIdx.x % 32 == 0) {
    R* to = scratch + threadIdx.x / 32 * 4;
    to[0] = mine.sums.top, to[1] = mine.sums.total, to[2] = mine.sums.dot, to[3] = mine.copied;
  }
  __syncthreads();
  Total<R> all{};
#pragma unroll 1  // else all partial sums are in registers at once
  for (int w = 0; w < kWarps; ++w) {
    const R* from = scratch + 4 * w;
    Sums<R> other;
    other.top = from[0], other.total = from[1], other.dot = from[2];
    all.sums.add(other), all.copied += from[3];
  }
  return all;
}

// The thread's part of a row. `grad` may be null.
template <class S, class R>
__device__ Sums<R> sum_up(const S* z, const R* grad, int V) {
  Sums<R> sums;
  for (int first = int(threadIdx.x); first < V; first += kBatch * kThreads) {
    R logits[kBatch], grads[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = first + j * kThreads;  // V + 2^11 fits in an int
      logits[j] = v < V ? load<R>(z + v) : -INFINITY;
      grads[j] = v < V && grad ? load<R>(grad + v) : R(0);
    }
    sums.add(logits, grads);
  }
  return sums;
}

// f of each word from begin to end that is this thread's.
template <class F>
__device__ __forceinline__ void for_words(int begin, int end, const F& f) {
#pragma unroll 2
  for (int v = begin + int(threadIdx.x); v < end; v += kThreads) f(v);
}

// Adds the copies of a row to its outputs, a thread for each different word.
template <class R>
__device__ void add_copies(const SourceOrder& order, int b, int positions, int words, const R* attention,
                           R copy, R* final) {
  const int64_t* ids = order.ids + int64_t(b) * positions;
  const int* at = order.positions + int64_t(b) * positions;
#pragma unroll 1
  for (int p = int(threadIdx.x); p < positions; p += kThreads) {
    const int64_t id = load_int(ids + p);
    if (id >= words || (p > 0 && load_int(ids + p - 1) == id)) continue;
    R mass = 0;
#pragma unroll 1  // most words come once
    for (int q = p; q < positions && (q == p || load_int(ids + q) == id); ++q)
      mass += load<R>(attention + load_int(at + q));
    store(final + id, load<R>(final + id) + copy * mass);
  }
}

}  // namespace mixing

// The rank of an id is the number of ids that come before it. Launched with B blocks.
template <class Id>
__global__ void __launch_bounds__(mixing::kThreads, 2)
    distribution_order_kernel(int positions, int64_t words, const Id* source_ids, SourceOrder order) {
  using namespace mixing;
  FASTSEQ_DYNAMIC_SHARED(int64_t, tile);
  const int b = int(blockIdx.x);
  const Id* ids = source_ids + int64_t(b) * positions;
  const auto key = [&](int i) {
    const int64_t id = load_int(ids + i);
    return id < 0 ? kAbsent : id;
  };
  int invalid = 0;
  for (int first = 0; first < positions; first += kThreads) {
    const int i = first + int(threadIdx.x);
    const int64_t mine = i < positions ? key(i) : 0;
    invalid |= i < positions && load_int(ids + i) >= words;
    int rank = 0;
    for (int begin = 0; begin < positions; begin += kTile) {
      const int size = min(kTile, positions - begin);
      __syncthreads();  // the tile before has been read
      for (int j = int(threadIdx.x); j < size; j += kThreads) tile[j] = key(begin + j);
      __syncthreads();
      for (int j = 0; i < positions && j < size; ++j)
        rank += tile[j] < mine || (tile[j] == mine && begin + j < i);
    }
    if (i >= positions) continue;
    store_int(order.ids + int64_t(b) * positions + rank, mine);
    store_int(order.positions + int64_t(b) * positions + rank, i);
  }
  const bool any = __syncthreads_or(invalid);
  if (threadIdx.x == 0) store_int(order.invalid + b, any);
}

// Launched with B*T blocks.
template <class S, class R>
__global__ void __launch_bounds__(mixing::kThreads, mixing::kBlocks<R>)
    distribution_kernel(Mixture<S, R> m, SourceOrder order, R* final) {
  using namespace mixing;
  FASTSEQ_DYNAMIC_SHARED(R, scratch);
  const int b = int(blockIdx.x) / m.T, t = int(blockIdx.x) % m.T, words = m.V + m.num_oov;
  const S* z = m.logits.at(b, t);
  const R* attention = m.attention.at(b, t);
  const int64_t* ids = m.source_ids + int64_t(b) * m.positions;
  final += int64_t(blockIdx.x) * words;

  Total<R> mine{sum_up<S, R>(z, nullptr, m.V), 0};
#pragma unroll 1
  for (int i = int(threadIdx.x); i < m.positions; i += kThreads)
    if (load_int(ids + i) >= 0) mine.copied += load<R>(attention + i) * 0;  // NaN of what is not finite
  const Total<R> all = over_block(mine, scratch);
  const R g = load<R>(m.gate + blockIdx.x), copy = sigmoid(-g);
  const R shift = all.sums.shift(), generate = sigmoid(g) / (all.sums.total + all.copied);
  const bool invalid = m.positions > 0 && load_int(order.invalid + b);
  const R poison = invalid ? R(NAN) : (generate + copy) * 0;  // else 0, or NaN

  for_words(0, m.V,
            [&](int v) { store(final + v, exponential(load<R>(z + v) - shift) * generate + poison); });
  for_words(m.V, words, [&](int v) { store(final + v, poison); });
  __syncthreads();  // the copies come on top of what other threads have written
  add_copies(order, b, m.positions, words, attention, copy, final);
}

// Launched with B*T blocks.
template <class S, class R>
__global__ void __launch_bounds__(mixing::kThreads, mixing::kBlocks<R>)
    distribution_grad_kernel(Mixture<S, R> m, Rows<R> grads, MixtureGradients<S, R> to) {
  using namespace mixing;
  FASTSEQ_DYNAMIC_SHARED(R, scratch);
  const int b = int(blockIdx.x) / m.T, t = int(blockIdx.x) % m.T, words = m.V + m.num_oov;
  const S* z = m.logits.at(b, t);
  const R *attention = m.attention.at(b, t), *grad = grads.at(b, t);
  const int64_t* ids = m.source_ids + int64_t(b) * m.positions;
  const auto grad_of = [&](int64_t id) { return id < words ? load<R>(grad + id) : R(NAN); };

  Total<R> mine{sum_up(z, grad, m.V), 0};
#pragma unroll 1
  for (int i = int(threadIdx.x); i < m.positions; i += kThreads)
    if (const int64_t id = load_int(ids + i); id >= 0) mine.copied += load<R>(attention + i) * grad_of(id);
  const Total<R> all = over_block(mine, scratch);
  const R g = load<R>(m.gate + blockIdx.x), generate = sigmoid(g), copy = sigmoid(-g);
  const R shift = all.sums.shift(), mean = all.sums.dot / all.sums.total, rest = mean - all.copied;
  const R scale = generate / all.sums.total, poison = rest * generate * 0;  // 0, or NaN

  S* to_logits = to.logits + int64_t(blockIdx.x) * m.V;
  for_words(0, m.V, [&](int v) {
    const R p = exponential(load<R>(z + v) - shift) * scale;
    store(to_logits + v, p * (load<R>(grad + v) - mean) + poison);
  });
  R* to_attention = to.attention + int64_t(blockIdx.x) * m.positions;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < m.positions; i += kThreads) {
    const int64_t id = load_int(ids + i);
    store(to_attention + i, id >= 0 ? copy * grad_of(id) + poison : R(0));
  }
  if (threadIdx.x == 0) store(to.gate + blockIdx.x, generate * copy * rest + poison);
}

// ---- from the host ---------------------------------------------------------------------------------------

template <class S, class R>
void distribution(const Mixture<S, R>& m, const SourceOrder& order, R* final, cudaStream_t stream) {
  using namespace mixing;
  if (m.B == 0 || m.T == 0) return;
  if (m.positions > 0)
    FASTSEQ_LAUNCH((distribution_order_kernel<int64_t>), dim3(m.B), dim3(kThreads), kTile * sizeof(int64_t),
                   stream, m.positions, int64_t(m.V) + m.num_oov, m.source_ids, order);
  FASTSEQ_LAUNCH((distribution_kernel<S, R>), dim3(m.B * m.T), dim3(kThreads), kScratch * sizeof(R), stream,
                 m, order, final);
}

template <class S, class R>
void distribution_grad(const Mixture<S, R>& m, const Rows<R>& grad, const MixtureGradients<S, R>& to,
                       cudaStream_t stream) {
  using namespace mixing;
  if (m.B == 0 || m.T == 0) return;
  FASTSEQ_LAUNCH((distribution_grad_kernel<S, R>), dim3(m.B * m.T), dim3(kThreads), kScratch * sizeof(R),
                 stream, m, grad, to);
}

}  // namespace fastseq::pointer::cuda
