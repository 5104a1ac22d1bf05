// The products of blocks that attention is made of, on packed operands, for float, double and pairs of
// bfloat16 (E = Pair, vdpbf16ps: only where has_pairs() says so; else bfloat16 numbers are packed as floats).
//
// A matrix lies in memory as rows of D numbers (tokens, `stride` elements apart). It is packed in three ways:
//   pack_rows        row by row: the left operand A of a product (Rows::contiguous)
//   pack_transposed  panels whose columns are the matrix' rows, depth D:  C = A B^T, as in Q K^T and dO V^T
//   pack_columns     panels whose columns are the matrix' columns, depth rows:  C = A B, as in P V and dS K
// and product() multiplies. The transposed left operand of P^T dO and dS^T Q needs no packing: product with
// Rows::strided reads it along the rows of P. Sums are Sum<E>: float, or double for double.
//
// One element of depth is one number, or two for Pair: depths and the row stride of A are in elements E,
// which steps<E>() counts. Packing moves each number once; a product runs at 85 % and more of a core's peak
// if a panel of 128 elements' depth and the rows of A stay in the first two levels of cache.
#pragma once
#include "../common/gemm.h"
#include "../common/half.h"

namespace fastseq::FASTSEQ_ISA::attention {

using crf::Type;

template <class E>
using Sum = typename Element<E>::Sum;

// Row r, column c at element r * stride + c of `data`.
struct Matrix {
  const void* data;
  Type type;
  int64_t rows, columns, stride;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Elements that panels take.
template <class E>
constexpr int64_t panels_size(int64_t depth, int64_t columns) {
  return depth * padded<E>(columns);
}

template <class E>
struct Panels {
  const E* data;
  int64_t depth, columns;  // depth in elements
};

// Whether this CPU multiplies pairs of bfloat16. (Pair has code in the avx512 variant alone.)
bool has_pairs();

// Whether all numbers are finite.
bool is_finite(const Matrix& m);

// out[r * ld + k]: element k of row r, zeros up to ld >= steps<E>(columns).
template <class E>
void pack_rows(const Matrix& m, E* out, int64_t ld);
// Into panels_size(steps(m.columns), m.rows) elements. Columns beyond m.rows are 0.
template <class E>
Panels<E> pack_transposed(const Matrix& m, E* out);
// Into panels_size(steps(m.rows), m.columns) elements.
template <class E>
Panels<E> pack_columns(const Matrix& m, E* out);

// C (+)= A B for `count` rows of A, the elements `depth` of B's depth and the panels that hold `columns`
// (begin a multiple of kPanel<E>; whole panels are written). `a` is the element of depth.begin: element
// (m, k) at a[m * a_stride + k - depth.begin], or at a[m + (k - depth.begin) * a_stride] for Rows::strided.
// c is column 0 of B.
template <class E, Rows rows>
void product(int64_t count, const E* a, int64_t a_stride, const Panels<E>& b, Range depth, Range columns,
             Sum<E>* c, int64_t c_stride, bool add);

// Numbers [at, at + n) of `out`, of that type, become x times factor.
void store_scaled(Type type, void* out, int64_t at, int64_t n, const float* x, float factor);
void store_scaled(Type type, void* out, int64_t at, int64_t n, const double* x, double factor);

// What a block x (rows `ld` apart) of columns [begin, end), begin even, becomes as operand A of pairs:
// `along` its rows (for Rows::contiguous, out[r * out_ld + c / 2]; a column at an odd end is paired with 0),
// and `across` them (for Rows::strided, out[r / 2 * out_ld + c]; an odd last row likewise); either may be
// null. Written in whole 32 columns from begin. With E = float or double the block itself is both.
void round_pairs(const float* x, int64_t ld, int64_t rows, Range columns, Pair* along, Pair* across,
                 int64_t out_ld);

}  // namespace fastseq::FASTSEQ_ISA::attention
