// What forward and backward of attention share: where sequences and heads lie, which keys a query sees, and
// scores as the softmax wants them.
#pragma once
#include <algorithm>
#include <atomic>

#include "dot_product.h"
#include "products.h"
#include "softmax.h"

namespace fastseq::FASTSEQ_ISA::attention {

using fastseq::attention::Problem;
using fastseq::attention::Tokens;

constexpr int64_t kRowsAtOnce =
    64;  // queries whose scores are held; a block of keys begins at a multiple of it
constexpr int64_t kColumnStep = 64;
static_assert(kColumnStep % kPanel<float> == 0 && kColumnStep % kPanel<double> == 0);

struct Sequence {
  int64_t n, row, first_query, first_key;  // tokens
  int64_t queries, keys, all_keys;         // keys <= all_keys: those that exist

  Sequence(const Problem& p, int64_t index) : n(index) {
    const bool packed = p.cu_q != nullptr;
    row = packed ? 0 : n;
    first_query = packed ? p.cu_q[n] : 0, first_key = packed ? p.cu_k[n] : 0;
    queries = packed ? p.cu_q[n + 1] - first_query : p.queries;
    all_keys = packed ? p.cu_k[n + 1] - first_key : p.keys;
    keys = p.lengths ? p.lengths[n] : all_keys;
  }
};

// Rows [begin, end) of one head, counted from `first` token.
inline Matrix matrix(const Tokens& t, Type type, int64_t D, const Sequence& s, int64_t first, int64_t head,
                     Range rows) {
  const int64_t at = s.row * t.row_stride + (first + rows.begin) * t.token_stride + head * t.head_stride;
  return {static_cast<const char*>(t.data) + at * bytes(type), type, rows.size(), D, t.token_stride};
}

// Keys [begin, end) that query i sees as far as causal and window go.
inline Range visible(const Problem& p, const Sequence& s, int64_t i) {
  const int64_t here = i + s.keys - s.queries;
  int64_t begin = 0, end = s.keys;
  if (p.left >= 0) begin = std::clamp<int64_t>(here - p.left, 0, s.keys);
  if (p.causal) end = std::clamp<int64_t>(here + 1, 0, end);
  if (p.right >= 0 && p.right < s.keys + s.queries) end = std::clamp<int64_t>(here + p.right + 1, 0, end);
  return {begin, std::max(begin, end)};
}

// Those that any of the queries sees, from a whole step of columns on. (Both ends rise with the query.)
inline Range visible(const Problem& p, const Sequence& s, Range queries) {
  const int64_t begin = visible(p, s, queries.begin).begin, end = visible(p, s, queries.end - 1).end;
  return {begin / kColumnStep * kColumnStep, std::max(begin / kColumnStep * kColumnStep, end)};
}

inline bool hides(const Problem& p) { return p.causal || p.left >= 0 || p.right >= 0 || p.bias.data; }

// Like sizes, even, at most kRowsAtOnce.
inline int64_t block_rows(int64_t queries) {
  const int64_t blocks = std::max<int64_t>(1, (queries + kRowsAtOnce - 1) / kRowsAtOnce);
  return std::max<int64_t>(2, round_up((queries + blocks - 1) / blocks, 2));
}

// Scores of one head.
template <class R>
class Scores {
  using V = Numbers<R>;

 public:
  Scores(const Problem& problem, const Sequence& sequence, int64_t query_head)
      : p(problem),
        s(sequence),
        bias_at(s.n * p.bias.n_stride + query_head * p.bias.h_stride),
        slope(slope_of(p, s.n, query_head)),
        plain(!p.slopes && !p.bias.data && !(p.softcap > 0) && p.scale > 0) {}

  // What the prepared scores are still to be multiplied by.
  R factor() const { return plain ? R(p.scale) : R(1); }

  // Products x of query i and the keys `columns` become scores; what it does not see, and what follows up to
  // 32 columns, -infinity. `slopes`, if any, gets the derivative of the soft cap. bias_row: memory for a row.
  void prepare(R* x, int64_t i, Range columns, R* bias_row, R* slopes) const {
    const int64_t n = round_up(columns.size(), 32);
    if (!plain) {
      if (p.softcap > 0)
        cap(x, n, slopes);
      else if (!p.bias.data)
        for (int64_t c = 0; c < n; c += V::W) (V::load(x + c) * V::set(R(p.scale))).store(x + c);
      if (p.bias.data) add_bias(x, i, columns, p.softcap > 0 ? R(1) : R(p.scale), bias_row);
      if (p.slopes) subtract_slope(x, n, R(i + s.keys - s.queries - columns.begin));
    }
    const Range seen = visible(p, s, i);
    std::fill(x, x + std::clamp<int64_t>(seen.begin - columns.begin, 0, n), kForbidden<R>);
    std::fill(x + std::clamp<int64_t>(seen.end - columns.begin, 0, n), x + n, kForbidden<R>);
  }

  // Whether query i sees key j.
  bool sees(int64_t i, int64_t j) const {
    const Range seen = visible(p, s, i);
    R value = 0;
    if (p.bias.data) load_bias(i, {j, j + 1}, &value);
    return j >= seen.begin && j < seen.end && value != kForbidden<R>;
  }

 private:
  void cap(R* x, int64_t n, R* slopes) const {
    const V by = V::set(R(p.scale / p.softcap)), up = V::set(R(p.softcap)), one = V::set(1);
    for (int64_t c = 0; c < n; c += V::W) {
      const V t = vtanh(V::load(x + c) * by);
      (t * up).store(x + c);
      if (slopes) (one - t * t).store(slopes + c);
    }
  }

  static R slope_of(const Problem& p, int64_t n, int64_t head) {
    R slope = 0;
    if (p.slopes)
      crf::load_row({p.slopes, p.slopes_type, 2, 1, 1, n * p.slopes_n + head * p.slopes_h, 0}, 1, 0, &slope);
    return slope;
  }

  void load_bias(int64_t i, Range columns, R* out) const {
    const int64_t at = bias_at + i * p.bias.i_stride + columns.begin * p.bias.j_stride;
    const int64_t count = p.bias.j_stride ? columns.size() : 1;
    crf::load_row({p.bias.data, p.bias.type, 2, 1, count, at, 0}, 1, 0, out);
  }

  // x = x * factor + bias
  void add_bias(R* x, int64_t i, Range columns, R factor, R* row) const {
    const V lowest = V::set(std::numeric_limits<R>::lowest()), never = V::set(kForbidden<R>);
    const R* bias = row;
    if (p.bias.type == (std::is_same_v<R, double> ? Type::f64 : Type::f32) && p.bias.j_stride == 1) {
      bias = static_cast<const R*>(p.bias.data) + bias_at + i * p.bias.i_stride + columns.begin;
    } else {
      load_bias(i, columns, row);
      if (!p.bias.j_stride) std::fill(row + 1, row + columns.size(), row[0]);
    }
    for (int64_t c = 0; c < columns.size(); c += V::W) {
      const V b = c + V::W <= columns.size() ? V::load(bias + c) : V::load(bias + c, columns.size() - c);
      V::where_less(b, lowest, never, V::fma(V::load(x + c), V::set(factor), b)).store(x + c);
    }
  }

  // The query is `here` columns right of the first.
  void subtract_slope(R* x, int64_t n, R here) const {
    R first[V::W];
    for (int k = 0; k < V::W; ++k) first[k] = R(k);
    const V steps = V::load(first), minus = V::set(-slope), zero = V::set(0);
    for (int64_t c = 0; c < n; c += V::W) {
      const V distance = steps + V::set(R(c) - here);
      V::fma(max(distance, zero - distance), minus, V::load(x + c)).store(x + c);
    }
  }

  const Problem& p;
  const Sequence& s;
  const int64_t bias_at;
  const R slope;
  const bool plain;
};

// y += a x, D long.
template <class R>
void add_scaled(R* y, R a, const R* x, int64_t D) {
  for (int64_t d = 0; d < D; ++d) y[d] += a * x[d];
}

template <class R>
R dot(const R* x, const R* y, int64_t D) {
  using V = Numbers<R>;
  V all = V::set(0);
  int64_t d = 0;
  for (; d + V::W <= D; d += V::W) all = V::fma(V::load(x + d), V::load(y + d), all);
  if (d < D) all = V::fma(V::load(x + d, D - d), V::load(y + d, D - d), all);
  return sum(all);
}

// run_tasks with memory of its own for each thread: make() once a range.
template <class Make, class Task>
void run_tasks_with(const ParallelFor& parallel_for, int64_t n, const Make& make, const Task& task) {
  if (n == 0) return;
  std::atomic<int64_t> next{0};
  parallel_for(n, [&](int64_t, int64_t) {
    int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    if (i >= n) return;
    auto scratch = make();
    for (; i < n; i = next.fetch_add(1, std::memory_order_relaxed)) task(i, scratch);
  });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
