// Viterbi's window (viterbi.cuh): what a team keeps in shared memory of M positions of its row, which of them
// are on, and the path through them. Regime is one of viterbi_recursion.cuh, which says how large it all is.
#pragma once
#include "batch.cuh"
#include "team.cuh"

namespace fastseq::crf::cuda {
namespace decoding {

// ---- what a team keeps in shared memory -------------------------------------------------------------------

template <class Regime>
class Memory {
 public:
  using Team = typename Regime::Team;
  using R = typename Regime::Result;
  using Pointer = typename Regime::Pointer;

  // Positions of a window. A short batch has a short one: then more blocks share a multiprocessor.
  static __host__ __device__ int window(int T, int K) {
    const int longest = Regime::window(K), needed = (T + 31) / 32 * 32;
    return needed < longest ? needed : longest;
  }
  static __host__ __device__ int bytes(int T, int K) {
    const int M = window(T, K), of_position = int(sizeof(uint16_t)) + Regime::row(K) * int(sizeof(Pointer));
    return (words_at(K) + word_count(M) * int(sizeof(unsigned)) + M * of_position + 15) / 16 * 16;
  }

  const int M;
  __device__ Memory(unsigned char* shared, int T, int K)
      : M(window(T, K)), K_(K), memory_(shared + Team::in_block() * bytes(T, K)) {}

  // Two vectors, in turn.
  __device__ R* scores(int which) const { return at<R>(0) + which * row(); }
  // Regime::kAhead rows: emissions ahead of their use.
  __device__ R* x(int which) const { return at<R>(2 * row() * int(sizeof(R))) + which * row(); }
  __device__ double* scratch() const { return at<double>(scratch_at(K_)); }  // (Team::kGroups)
  // Bit l of word w: position w*Team::kGroup + l of the window is on.
  __device__ unsigned* words() const { return at<unsigned>(words_at(K_)); }
  __device__ int word_count() const { return word_count(M); }
  // (M): those that are on, in order.
  __device__ uint16_t* places() const { return reinterpret_cast<uint16_t*>(words() + word_count()); }
  // For the l-th of those: the best tag before each tag. The first of a row of them later has the path.
  __device__ Pointer* pointers(int l) const { return reinterpret_cast<Pointer*>(places() + M) + l * row(); }

 private:
  static __host__ __device__ int scratch_at(int K) {
    return (2 + Regime::kAhead) * Regime::row(K) * int(sizeof(R));
  }
  static __host__ __device__ int words_at(int K) {
    return scratch_at(K) + Team::kGroups * int(sizeof(double));
  }
  static __host__ __device__ int word_count(int M) { return (M + Team::kGroup - 1) / Team::kGroup; }
  __device__ int row() const { return Regime::row(K_); }
  template <class E>
  __device__ E* at(int offset) const {
    return reinterpret_cast<E*>(memory_ + offset);
  }

  const int K_;
  unsigned char* const memory_;
};

// ---- a window: which of its positions are on, and the path through them -----------------------------------

template <class Regime>
class Window {
 public:
  using Team = typename Regime::Team;
  int start = -1;  // the window is [start, start + M)
  int on = 0;      // how many of it are on

  __device__ explicit Window(const Memory<Regime>& memory) : memory_(memory) {}

  template <class S, class R>
  __device__ void look(const Batch<S, R>& batch, int b, int t) {
    if (t == start) return;
    start = t;
    Team::sync();  // whoever still reads about the window before
    for (int w = 0; w < memory_.word_count(); w += kAtOnce * Team::kGroups)
      look_at_words(batch, b, w + Team::group());
    Team::sync();
    on = visit([&](int m, int l) {
      if (l >= 0) memory_.places()[l] = uint16_t(m);
    });
    Team::sync();
  }

  // Follows the pointers from the tag of the last position on; one thread does. Column 0 of the pointers
  // becomes the path. Returns the tag before the window.
  __device__ int trace(int tag) const {
    for (int l = on - 1; l >= 0; --l) {
      typename Regime::Pointer* pointers = memory_.pointers(l);
      const int before = pointers[tag];
      pointers[0] = typename Regime::Pointer(tag);
      tag = before;
    }
    return tag;
  }

  // The window's part of a path of T tags.
  __device__ void write(int64_t* path, int T) const {
    visit([&](int m, int l) {
      if (start + m < T) store_int(path + start + m, l >= 0 ? int(*memory_.pointers(l)) : kTagOff);
    });
  }

 private:
  static constexpr int kAtOnce = Team::kInWarp ? 8 : 1;  // words of a group that wait for memory together

  template <class S, class R>
  __device__ void look_at_words(const Batch<S, R>& batch, int b, int w) {
    unsigned mine = 0;
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int m = (w + n * Team::kGroups) * Team::kGroup + Team::lane();
      mine |= unsigned(m < memory_.M && batch.state(b, start + m) != kOff) << n;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const unsigned word = __ballot_sync(Team::lanes(), mine >> n & 1);
      const int at = w + n * Team::kGroups;
      if (Team::lane() == 0 && at < memory_.word_count()) memory_.words()[at] = word >> first_lane();
    }
  }
  static __device__ int first_lane() { return int(threadIdx.x) % 32 - Team::lane(); }

  // Calls f(m, l) for each m < M, by one thread each, neighbours by neighbours: position m of the window is
  // the l-th that is on, or it is off, and l is -1. Returns how many are on.
  template <class F>
  __device__ int visit(const F& f) const {
    int before = 0;
    for (int w = 0; w < memory_.word_count(); ++w) {
      const unsigned word = memory_.words()[w], bit = 1u << Team::lane();
      const int m = w * Team::kGroup + Team::lane();
      if (w % Team::kGroups == Team::group() && m < memory_.M)
        f(m, word & bit ? before + __popc(word & (bit - 1)) : -1);
      before += __popc(word);
    }
    return before;
  }

  const Memory<Regime>& memory_;
};

}  // namespace decoding
}  // namespace fastseq::crf::cuda
