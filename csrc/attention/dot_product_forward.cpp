// Attention, forward. A task is some blocks of queries of the query heads that share a head of keys: it packs
// the keys and values that they see, once, and takes block after block. Up to kKeysAtOnce keys, a block's
// scores are all there before the softmax; beyond, the softmax goes on from one part of the keys to the next.
//
// Cost of Sq x Sk pairs: 2 D multiply-adds and an exponential each, of what causal and window leave, in steps
// of a block; the scores never leave the second level cache. Memory: packed keys and values of a task, 8 D
// bytes a key in float32.
#include <vector>

#include "dot_product_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

using fastseq::attention::Results;

namespace {

constexpr int64_t kKeysAtOnce = 1024, kKeysOnline = 512, kBlocksOfTask = 8;

template <class E>
class Forward {
  using R = Sum<E>;

  struct Task {
    Sequence s;
    int64_t key_head, first, last;  // blocks of the heads of key_head, one head after the other
    Range keys;
  };

  struct Scratch {
    Scratch(int64_t keys, int64_t D)
        : width(apart<R>(round_up(std::min(keys, kKeysAtOnce), kColumnStep))),
          q(kRowsAtOnce * steps<E>(D)),
          k(panels_size<E>(steps<E>(D), keys)),
          v(panels_size<E>(steps<E>(keys), D)),
          p(std::is_same_v<E, R> ? 0 : kRowsAtOnce * width / 2),
          scores(kRowsAtOnce * width),
          sums(kRowsAtOnce * padded<E>(D)),
          bias(width),
          kept(width / 32 + 1) {}
    const int64_t width;
    const Buffer<E> q, k, v, p;
    const Buffer<R> scores, sums, bias;
    const Buffer<uint32_t> kept;
    R largest[kRowsAtOnce], total[kRowsAtOnce];
  };

 public:
  Forward(const Problem& problem, const Results& results)
      : p(problem),
        out(results),
        group(p.query_heads / std::max<int64_t>(1, p.key_heads)),
        dropout(Dropout::make(p.seed, p.dropout)) {
    for (int64_t n = 0; n < p.N; ++n) {
      const Sequence s(p, n);
      const int64_t blocks = group * blocks_of(s);
      for (int64_t h = 0; h < p.key_heads; ++h)
        for (int64_t first = 0; first < blocks; first += kBlocksOfTask)
          add_task({s, h, first, std::min(blocks, first + kBlocksOfTask), {}});
    }
  }

  void run(const ParallelFor& parallel) {
    if (p.cu_q) clear_rest();
    run_tasks_with(
        parallel, int64_t(tasks.size()), [&] { return Scratch(longest, p.D); },
        [&](int64_t i, Scratch& scratch) { attend(tasks[i], scratch); });
  }

 private:
  static int64_t blocks_of(const Sequence& s) {
    const int64_t rows = block_rows(s.queries);
    return (s.queries + rows - 1) / rows;
  }

  static Range block(const Sequence& s, int64_t index) {
    const int64_t begin = index % blocks_of(s) * block_rows(s.queries);
    return {begin, std::min(s.queries, begin + block_rows(s.queries))};
  }

  void add_task(Task task) {
    task.keys = visible(p, task.s, block(task.s, task.first));
    for (int64_t b = task.first + 1; b < task.last; ++b) {
      const Range more = visible(p, task.s, block(task.s, b));
      task.keys = {std::min(task.keys.begin, more.begin), std::max(task.keys.end, more.end)};
    }
    longest = std::max(longest, task.keys.size());
    tasks.push_back(task);
  }

  // Positions that are in no sequence.
  void clear_rest() const {
    for (int64_t t = 0; t < p.queries; ++t) {
      if (t == p.cu_q[0]) t = p.cu_q[p.N];
      if (t >= p.queries) return;
      for (int64_t h = 0; h < p.query_heads; ++h) store(0, t, h, nullptr, 0, kForbidden<R>);
    }
  }

  // The row of the output, `sums` times factor (0: zeros), and its lse.
  void store(int64_t row, int64_t token, int64_t head, const R* sums, R factor, R lse) const {
    static_cast<R*>(out.lse)[(row * p.query_heads + head) * p.queries + token] = lse;
    const int64_t at = ((row * p.queries + token) * p.query_heads + head) * p.D;
    if (factor == 0) {
      const int64_t size = bytes(p.type);
      std::memset(static_cast<char*>(out.out) + at * size, 0, size_t(p.D * size));
      return;
    }
    store_scaled(p.type, out.out, at, p.D, sums, factor);
  }

  void attend(const Task& t, Scratch& x) const {
    const Matrix keys = matrix(p.k, p.type, p.D, t.s, t.s.first_key, t.key_head, t.keys);
    const Matrix values = matrix(p.v, p.type, p.D, t.s, t.s.first_key, t.key_head, t.keys);
    const Panels<E> k = pack_transposed<E>(keys, x.k), v = pack_columns<E>(values, x.v);
    const bool careful = hides(p) && !is_finite(values);
    for (int64_t b = t.first; b < t.last; ++b)
      attend_block(t, t.key_head * group + b / blocks_of(t.s), block(t.s, b), k, v,
                   careful ? &values : nullptr, x);
  }

  void attend_block(const Task& t, int64_t head, Range queries, const Panels<E>& k, const Panels<E>& v,
                    const Matrix* values, Scratch& x) const {
    const int64_t rows = queries.size(), ld = padded<E>(p.D);
    const Scores<R> scores(p, t.s, head);
    const HeadMask mask(dropout, t.s.n * p.query_heads + head);
    pack_rows<E>(matrix(p.q, p.type, p.D, t.s, t.s.first_query, head, queries), x.q, steps<E>(p.D));
    std::fill_n(x.largest, rows, kForbidden<R>);
    std::fill_n(x.total, rows, R(0));
    std::fill_n(static_cast<R*>(x.sums), rows * ld, R(0));
    const Range all = visible(p, t.s, queries);
    const int64_t most = all.size() <= kKeysAtOnce ? kKeysAtOnce : kKeysOnline;
    for (int64_t begin = all.begin; begin < all.end; begin += most) {
      const Range columns{begin, std::min(all.end, begin + most)};
      const Range here{begin - t.keys.begin, columns.end - t.keys.begin};
      product<E, Rows::contiguous>(rows, x.q, steps<E>(p.D), k, {0, k.depth}, here, x.scores - here.begin,
                                   x.width, false);
      for (int64_t r = 0; r < rows; ++r) {
        R* row = x.scores + r * x.width;
        scores.prepare(row, queries.begin + r, columns, x.bias, nullptr);
        if (dropout.any())
          keep_bits(dropout, mask, queries.begin + r, begin, (columns.size() + 31) / 32, x.kept);
        soften(row, round_up(columns.size(), 32), scores.factor(), r, x);
      }
      if (values)
        add_careful(scores, *values, t.keys.begin, queries, columns, x);
      else
        add_values(v, rows, here, x);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const R total = x.total[r], lse = x.largest[r] + std::log(total);
      store(t.s.row, t.s.first_query + queries.begin + r, head, x.sums + r * ld,
            total == 0 ? 0 : R(dropout.factor()) / total, total == 0 ? kForbidden<R> : lse);
    }
  }

  // Row r's scores become probabilities, but for a factor that its total corrects in the end.
  void soften(R* row, int64_t n, R factor, int64_t r, Scratch& x) const {
    const R largest = std::max(x.largest[r], largest_of(row, n) * factor);
    const R shift = largest == kForbidden<R> ? R(0) : largest;
    if (x.total[r] != 0 && largest != x.largest[r]) {
      const R less = std::exp(x.largest[r] - largest);
      R* sums = x.sums + r * padded<E>(p.D);
      for (int64_t d = 0; d < p.D; ++d) sums[d] *= less;
      x.total[r] *= less;
    }
    x.largest[r] = largest;
    const uint32_t* kept = dropout.any() ? static_cast<const uint32_t*>(x.kept) : nullptr;
    x.total[r] += exponentials(row, n, factor, shift, kept);
  }

  void add_values(const Panels<E>& v, int64_t rows, Range here, Scratch& x) const {
    const E* a = x.p;
    int64_t stride = x.width;
    if constexpr (std::is_same_v<E, R>) {
      a = x.scores;
    } else {
      stride = x.width / 2;
      round_pairs(x.scores, x.width, rows, {0, here.size()}, x.p, nullptr, stride);
    }
    product<E, Rows::contiguous>(rows, a, stride, v, {steps<E>(here.begin), steps<E>(here.end)}, {0, p.D},
                                 x.sums, padded<E>(p.D), true);
  }

  // Where a value is not finite, what a query does not see must not be multiplied, not even by 0.
  void add_careful(const Scores<R>& scores, const Matrix& values, int64_t first, Range queries, Range columns,
                   Scratch& x) const {
    std::vector<R> value(p.D);
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      crf::load_row({values.data, values.type, 1, values.rows, p.D, 0, values.stride}, 0, j - first,
                    value.data());
      for (int64_t r = 0; r < queries.size(); ++r)
        if (scores.sees(queries.begin + r, j))
          add_scaled(x.sums + r * padded<E>(p.D), x.scores[r * x.width + j - columns.begin], value.data(),
                     p.D);
    }
  }

  const Problem& p;
  const Results& out;
  const int64_t group;
  const Dropout dropout;
  std::vector<Task> tasks;
  int64_t longest = 0;
};

}  // namespace

void forward(const Problem& problem, const Results& results, const ParallelFor& parallel) {
  if (problem.type == Type::f64) return Forward<double>(problem, results).run(parallel);
#if defined(__AVX512F__)
  if (problem.type == Type::bf16 && has_pairs()) return Forward<Pair>(problem, results).run(parallel);
#endif
  Forward<float>(problem, results).run(parallel);
}

}  // namespace fastseq::FASTSEQ_ISA::attention
