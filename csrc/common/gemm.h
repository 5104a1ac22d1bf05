// The inner loop of matrix products whose operands are packed: C (+)= A B for a block of a few rows and a
// panel of columns, in registers. One register-blocked loop for float32, float64 and pairs of bfloat16
// (vdpbf16ps, where the CPU has it).
//
// A step of the loop loads one row of the panel and broadcasts one element of each row of A: with 6 rows and
// 4 vectors 10 loads for 24 multiply-adds, which keeps one 512-bit unit busy. B's panel is meant to stay in
// the first level cache while the rows of A go by, so callers cut the depth at `kDepth` elements. Callers
// pack as their operands lie; what memory that takes is here.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace fastseq::FASTSEQ_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kPanelVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPanelVectors = 2;
#else
constexpr int kVectorBytes = 16, kPanelVectors = 2;
#endif
constexpr int kBlockRows = 6;
constexpr int64_t kDepth = 128;

// Two bfloat16 along the depth: the lower half of the word comes first.
struct Pair {
  uint32_t bits;
};

// What the elements E add up to, and how many steps of the depth an element is.
template <class E>
struct Element {
  using Sum = E;
  static constexpr int kSteps = 1;
};
template <>
struct Element<Pair> {
  using Sum = float;
  static constexpr int kSteps = 2;
};

template <class E>
constexpr int kLanes = kVectorBytes / int(sizeof(E));
template <class E>
constexpr int kPanel = kPanelVectors * kLanes<E>;

// The vectors in panel `p` of `columns` columns: the last panel may be narrower.
template <class E>
constexpr int panel_vectors(int64_t columns, int64_t p) {
  const int64_t left = (columns - p * kPanel<E> + kLanes<E> - 1) / kLanes<E>;
  return int(left < kPanelVectors ? left : kPanelVectors);
}

// Elements of depth that n numbers need.
template <class E>
constexpr int64_t steps(int64_t n) {
  return (n + Element<E>::kSteps - 1) / Element<E>::kSteps;
}

// The columns that a product of n columns writes: C needs memory for them.
template <class E>
constexpr int64_t padded(int64_t n) {
  return round_up(n, kLanes<E>);
}

// Elements between rows of `columns` numbers such that those of one column are in different sets of a cache:
// an odd number of lines.
template <class T>
constexpr int64_t apart(int64_t columns) {
  return (round_up(columns * int64_t(sizeof(T)), 64) / 64 | 1) * 64 / int64_t(sizeof(T));
}

// Aligned and uninitialised memory.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(std::aligned_alloc(64, size_t(round_up(n * int64_t(sizeof(T)) + 1, 64))))) {
    if (!data_) throw std::bad_alloc();
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// A: element (m, k) at a[m * stride + k] where the rows are contiguous, else at a[m + k * stride].
enum class Rows { contiguous, strided };

template <class E>
struct Product {
  int64_t depth;  // in elements
  const E* a;
  int64_t a_stride;
  const E* b;  // the panel, `vectors` vectors for each k
  typename Element<E>::Sum* c;
  int64_t c_stride;
  bool add;  // to what C holds
};

template <class E, int M, int N, Rows rows>
struct Block {
  static void run(const Product<E>& p) {
    typedef E Vector __attribute__((vector_size(kVectorBytes)));
    typedef E Loose __attribute__((vector_size(kVectorBytes), aligned(alignof(E)), may_alias));
    Vector sums[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        sums[m][n] = p.add ? *reinterpret_cast<const Loose*>(p.c + m * p.c_stride + n * kLanes<E>) : Vector{};
    const E *a = p.a, *b = p.b;
    const int64_t stride = p.a_stride;
    for (int64_t k = 0; k < p.depth; ++k, b += N * kLanes<E>) {
      Vector column[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) column[n] = *reinterpret_cast<const Loose*>(b + n * kLanes<E>);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const Vector x = (rows == Rows::contiguous ? a[m * stride] : a[m]) - Vector{};  // in every lane
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] += x * column[n];
      }
      a += rows == Rows::contiguous ? 1 : stride;
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        *reinterpret_cast<Loose*>(p.c + m * p.c_stride + n * kLanes<E>) = sums[m][n];
  }
};

#if defined(__AVX512F__)
template <int M, int N, Rows rows>
struct Block<Pair, M, N, rows> {
  __attribute__((target("avx512bf16"))) static void run(const Product<Pair>& p) {
    __m512 sums[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        sums[m][n] = p.add ? _mm512_loadu_ps(p.c + m * p.c_stride + n * 16) : _mm512_setzero_ps();
    const Pair *a = p.a, *b = p.b;
    const int64_t stride = p.a_stride;
    for (int64_t k = 0; k < p.depth; ++k, b += N * 16) {
      __m512i column[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) column[n] = _mm512_loadu_si512(b + n * 16);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m512i x = _mm512_set1_epi32(int(rows == Rows::contiguous ? a[m * stride].bits : a[m].bits));
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)x, (__m512bh)column[n]);
      }
      a += rows == Rows::contiguous ? 1 : stride;
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) _mm512_storeu_ps(p.c + m * p.c_stride + n * 16, sums[m][n]);
  }
};
#endif

template <class E, Rows rows, int N, int M = kBlockRows>
void run_block(int count, const Product<E>& p) {
  if (count == M) return Block<E, M, N, rows>::run(p);
  if constexpr (M > 1) run_block<E, rows, N, M - 1>(count, p);
}

// C (rows x panel) (+)= A (rows x depth) B (depth x panel), the panel `vectors` vectors wide.
template <class E, Rows rows, int N = kPanelVectors>
void multiply(int64_t count, int vectors, const Product<E>& p) {
  if (vectors == N) {
    for (int64_t m = 0; m < count; m += kBlockRows) {
      Product<E> block = p;
      block.a += rows == Rows::contiguous ? m * p.a_stride : m;
      block.c += m * p.c_stride;
      run_block<E, rows, N>(int(count - m < kBlockRows ? count - m : kBlockRows), block);
    }
    return;
  }
  if constexpr (N > 1) multiply<E, rows, N - 1>(count, vectors, p);
}

}  // namespace fastseq::FASTSEQ_ISA
