// Viterbi's recursion (viterbi.cuh) in its two regimes: from the scores before a position to those after it,
// and the pointers.
//
//     InRegisters   K <= KM    thread j*G + g has tag j, and every G-th four of the edges to it, in registers
//     InCache       any K      thread r has the tags r, r + threads, ..; all edges are read in every step
#pragma once
#include <limits>

#include "viterbi_window.cuh"

namespace fastseq::crf::cuda {
namespace decoding {

// ---- the best of some tags --------------------------------------------------------------------------------

template <class R>
constexpr R kInf = std::numeric_limits<R>::infinity();
template <class R>
constexpr R kNaN = std::numeric_limits<R>::quiet_NaN();

template <class R>
struct Best {
  R value = -kInf<R>;
  int tag = 0;  // where nothing is possible
};

// Of two, where the tags of a come before those of b.
template <class R>
__device__ Best<R> first_of(const Best<R>& a, const Best<R>& b) {
  return b.value > a.value ? b : a;
}

// Of `Lanes` neighbouring lanes, in any order of tags. Each gets it.
template <class Team, int Lanes, class R>
__device__ Best<R> best_of_lanes(Best<R> best) {
#pragma unroll
  for (int step = 1; step < Lanes; step *= 2) {
    const R value = __shfl_xor_sync(Team::lanes(), best.value, step);
    const int tag = __shfl_xor_sync(Team::lanes(), best.tag, step);
    const bool wins = value > best.value || (value == best.value && tag < best.tag);
    best.value = wins ? value : best.value;
    best.tag = wins ? tag : best.tag;
  }
  return best;
}

template <class R>
struct alignas(16) Four {
  R values[4];
};

// Of the sources i .. i+3, with their scores s and edges a to a tag with emission x.
template <class R>
__device__ Best<R> best_of_four(const Four<R>& s, const Four<R>& a, R x, int i) {
  const auto source = [&](int n) { return Best<R>{(s.values[n] + a.values[n]) + x, i + n}; };
  return first_of(first_of(source(0), source(1)), first_of(source(2), source(3)));
}

template <class R>
__device__ const Four<R>& four(const R* values) {
  return *reinterpret_cast<const Four<R>*>(values);
}

// NaN or +inf makes the score of a row that uses it NaN.
template <class R>
__device__ bool spoils(R value) {
  return !(value < kInf<R>);
}

// ---- the recursion, with the transitions in registers: K <= KM --------------------------------------------

template <class S, class R, int KM, int G>
class InRegisters {
 public:
  using Team = cuda::Team<KM * G>;
  using Result = R;
  using Pointer = uint8_t;
  static constexpr int kAhead = G == 1 ? 8 : G;  // some 1000 cycles, in steps
  static __host__ __device__ int row(int) { return KM; }
  static __host__ __device__ int window(int) { return KM == 64 ? 512 : 256; }

  bool spoilt = false;  // by the emissions that were read

  __device__ InRegisters(const Batch<S, R>& batch, int b, const Memory<InRegisters>& memory)
      : batch_(batch), b_(b), memory_(memory) {
    const int j = tag(), K = batch.K;
#pragma unroll
    for (int n = 0; n < KM / G; ++n) {
      const int i = 4 * (n / 4 * G + part()) + n % 4;
      column_[n / 4].values[n % 4] = i < K && j < K ? load<R>(batch.transitions + i * K + j) : -kInf<R>;
    }
  }

  // The scores before the next step, to and from global memory; a thread reads what it wrote itself.
  __device__ void save(R* checkpoint) const {
    if (part() == 0 && tag() < batch_.K) store(checkpoint + tag(), memory_.scores(now_)[tag()]);
  }
  __device__ void restore(const R* checkpoint) {
    if (part() == 0) memory_.scores(now_)[tag()] = tag() < batch_.K ? load<R>(checkpoint + tag()) : -kInf<R>;
    Team::sync();
  }

  // All steps of a window; `first`: the row begins in it.
  __device__ void run(const Window<InRegisters>& window, bool first) {
    fetch(window, 0);
    for (int l = 0; l < window.on; l += kAhead) {
      keep();
      fetch(window, l + kAhead);
      const int end = l + kAhead < window.on ? l + kAhead : window.on;
      for (int m = l; m < end; ++m) step(m, first && m == 0);
    }
  }

  __device__ bool spoilt_by_edges() const {
    bool spoilt = false;
#pragma unroll
    for (int n = 0; n < KM / G; ++n) spoilt |= spoils(column_[n / 4].values[n % 4]);
    return spoilt;
  }

  // The best last tag of those that this thread has.
  __device__ Best<R> last() const {
    return tag() < batch_.K ? Best<R>{memory_.scores(now_)[tag()] + load<R>(batch_.end + tag()), tag()}
                            : Best<R>{};
  }

 private:
  static __device__ int tag() { return Team::rank() / G; }
  static __device__ int part() { return Team::rank() % G; }

  // Emissions of the positions on from the l-th on: into registers, which nobody waits for yet; lane g of a
  // tag every G-th.
  __device__ void fetch(const Window<InRegisters>& window, int l) {
#pragma unroll
    for (int n = 0; n < kAhead / G; ++n) {
      const int at = l + n * G + part();
      const bool is = at < window.on && tag() < batch_.K;
      fetched_[n] = is ? R(load<R>(batch_.x.at(b_, window.start + memory_.places()[at]) + tag())) : R(0);
    }
  }
  __device__ void keep() {
#pragma unroll
    for (int n = 0; n < kAhead / G; ++n) {
      spoilt |= spoils(fetched_[n]);
      memory_.x(n * G + part())[tag()] = fetched_[n];
    }
    if constexpr (G > 1) __syncwarp(Team::lanes());  // the lanes of a tag are neighbours
  }

  __device__ void step(int l, bool first) {
    const R *from = memory_.scores(now_), x = memory_.x(l % kAhead)[tag()];
    const Best<R> best = first ? Best<R>{from[tag()] + x, 0} : best_source(from, x);
    now_ = 1 - now_;
    if (part() == 0) {
      memory_.scores(now_)[tag()] = best.value;
      memory_.pointers(l)[tag()] = Pointer(best.tag);
    }
    Team::sync();
  }

  __device__ Best<R> best_source(const R* from, R x) const {
    Best<R> best;
#pragma unroll
    for (int n = 0; n < KM / G / 4; ++n)
      best = first_of(best, best_of_four(four(from + 4 * (n * G + part())), column_[n], x, 4 * n * G));
    best.tag += 4 * part();
    return best_of_lanes<Team, G>(best);
  }

  const Batch<S, R>& batch_;
  const int b_;
  const Memory<InRegisters>& memory_;
  Four<R> column_[KM / G / 4];
  R fetched_[kAhead / G];
  int now_ = 0;
};

// ---- the recursion, with the transitions in a cache: any K that shared memory has room for ----------------

template <class S, class R, class P>
class InCache {
 public:
  using Team = cuda::Team<sizeof(P) == 1 ? 256 : 512>;
  using Result = R;
  using Pointer = P;
  static constexpr int kAhead = 1;
  static __host__ __device__ int row(int K) { return (K + 3) / 4 * 4; }
  // As many as 46 KiB have room for, beside vectors of doubles.
  static __host__ __device__ int window(int K) {
    const int room = 46 * 1024 - 3 * int(sizeof(double)) * row(K), fit = room / (row(K) * int(sizeof(P)));
    return fit < 128 ? fit : 128;
  }

  bool spoilt = false;  // by the emissions that were read

  __device__ InCache(const Batch<S, R>& batch, int b, const Memory<InCache>& memory)
      : batch_(batch), b_(b), memory_(memory) {}

  __device__ void save(R* checkpoint) const {
    for_tags([&](int j) { store(checkpoint + j, memory_.scores(now_)[j]); });
  }
  __device__ void restore(const R* checkpoint) {
    for_tags([&](int j) { memory_.scores(now_)[j] = load<R>(checkpoint + j); });
    Team::sync();
  }

  __device__ void run(const Window<InCache>& window, bool first) {
    for_tags([&](int j) { memory_.x(0)[j] = emission(window, 0, j); });
    for (int l = 0; l < window.on; ++l) step(window, l, first && l == 0);
  }

  __device__ bool spoilt_by_edges() const {
    bool spoilt = false;
    for_tags([&](int j) {
#pragma unroll 8
      for (int i = 0; i < batch_.K; ++i) spoilt |= spoils(edge(i, j));
    });
    return spoilt;
  }

  __device__ Best<R> last() const {
    Best<R> best;
    for_tags([&](int j) { best = first_of(best, {memory_.scores(now_)[j] + load<R>(batch_.end + j), j}); });
    return best;
  }

 private:
  template <class F>
  __device__ void for_tags(const F& f) const {
#pragma unroll 1
    for (int j = Team::rank(); j < batch_.K; j += Team::kThreads) f(j);
  }
  __device__ R edge(int i, int j) const { return load<R>(batch_.transitions + i * batch_.K + j); }
  __device__ R emission(const Window<InCache>& window, int l, int j) const {
    return l < window.on ? R(load<R>(batch_.x.at(b_, window.start + memory_.places()[l]) + j)) : R(0);
  }

  __device__ void step(const Window<InCache>& window, int l, bool first) {
    const R* from = memory_.scores(now_);
    R* to = memory_.scores(1 - now_);
    for_tags([&](int j) {
      const R x = memory_.x(0)[j], x_ahead = emission(window, l + 1, j);
      const Best<R> best = first ? Best<R>{from[j] + x, 0} : best_source(from, j, x);
      to[j] = best.value;
      memory_.pointers(l)[j] = Pointer(best.tag);
      memory_.x(0)[j] = x_ahead;
      spoilt |= spoils(x);
    });
    now_ = 1 - now_;
    Team::sync();
  }

  __device__ Best<R> best_source(const R* from, int j, R x) const {
    Best<R> best;
    int i = 0;
#pragma unroll 4
    for (; i + 4 <= batch_.K; i += 4) {
      const Four<R> edges{edge(i, j), edge(i + 1, j), edge(i + 2, j), edge(i + 3, j)};
      best = first_of(best, best_of_four(four(from + i), edges, x, i));
    }
    for (; i < batch_.K; ++i) best = first_of(best, {(from[i] + edge(i, j)) + x, i});
    return best;
  }

  const Batch<S, R>& batch_;
  const int b_;
  const Memory<InCache>& memory_;
  int now_ = 0;
};

}  // namespace decoding
}  // namespace fastseq::crf::cuda
