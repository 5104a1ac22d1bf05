// Attention, backward. A task is a sequence and a head of keys, and the query heads that share it: part of
// the keys after part, whose packed keys, values and gradients stay in the second level cache, it takes the
// blocks of queries, makes their probabilities again from lse, and adds up all gradients. So there is no sum
// over tasks, but for the gradient of a bias which several of them share: those are dealt to a number of
// copies that depends on the sizes alone, and the copies are added up in order.
//
// Cost of Sq x Sk pairs: 5 D multiply-adds and an exponential each, of what causal and window leave. Memory
// of a thread: some 30 D bytes a key of a part, 4 D bytes a query.
#include <vector>

#include "dot_product_bias_grad.h"
#include "dot_product_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

namespace {

constexpr int64_t kKeysOfPart = 512;

template <class E>
class Backpropagation {
  using R = Sum<E>;
  static constexpr bool kRounds = !std::is_same_v<E, R>;

  struct Scratch {
    Scratch(int64_t keys, int64_t queries, int64_t D)
        : width(apart<R>(round_up(keys, kColumnStep))),
          q_rows(kRowsAtOnce * steps<E>(D)),
          do_rows(kRowsAtOnce * steps<E>(D)),
          q_columns(kRowsAtOnce * padded<E>(D)),
          do_columns(kRowsAtOnce * padded<E>(D)),
          k_transposed(panels_size<E>(steps<E>(D), keys)),
          v_transposed(panels_size<E>(steps<E>(D), keys)),
          k_columns(panels_size<E>(steps<E>(keys), D)),
          along(kRounds ? kRowsAtOnce * width : 0),
          p_across(kRounds ? kRowsAtOnce * width / 2 : 0),
          d_across(kRounds ? kRowsAtOnce * width / 2 : 0),
          p(kRowsAtOnce * width),
          d(kRowsAtOnce * width),
          row(width),
          steepness(width),
          dk(keys * padded<E>(D)),
          dv(keys * padded<E>(D)),
          dq(queries * padded<E>(D)),
          lse(queries),
          delta(queries),
          kept(width / 32 + 1) {}
    const int64_t width;
    const Buffer<E> q_rows, do_rows, q_columns, do_columns, k_transposed, v_transposed, k_columns;
    const Buffer<E> along, p_across, d_across;  // of pairs
    const Buffer<R> p, d, row, steepness, dk, dv, dq, lse, delta;
    const Buffer<uint32_t> kept;
  };

 public:
  Backpropagation(const Problem& problem, const fastseq::attention::Backward& gradients)
      : p(problem),
        out(gradients),
        group(p.query_heads / std::max<int64_t>(1, p.key_heads)),
        dropout(Dropout::make(p.seed, p.dropout)),
        bias(p, out) {
    for (int64_t n = 0; n < p.N; ++n) {
      const Sequence s(p, n);
      most_keys = std::max(most_keys, part_of(s.keys)), most_queries = std::max(most_queries, s.queries);
    }
  }

  void run(const ParallelFor& parallel) {
    if (p.cu_q) {  // there may be tokens that are in no sequence
      const size_t queries = size_t(p.queries * p.query_heads * p.D * bytes(p.type));
      const size_t keys = size_t(p.keys * p.key_heads * p.D * bytes(p.type));
      if (queries > 0) std::memset(out.dq, 0, queries);  // torch has no memory for a tensor of no elements
      if (keys > 0) std::memset(out.dk, 0, keys);
      if (keys > 0) std::memset(out.dv, 0, keys);
    }
    run_tasks_with(
        parallel, bias.tasks(), [&] { return Scratch(most_keys, group * most_queries, p.D); },
        [&](int64_t task, Scratch& scratch) {
          bias.for_heads(task,
                         [&](int64_t n, int64_t head, R* dbias) { head_of_keys(n, head, dbias, scratch); });
        });
    bias.finish(parallel);
  }

 private:
  // The keys are taken in parts of like size.
  static int64_t part_of(int64_t keys) {
    const int64_t parts = std::max<int64_t>(1, (keys + kKeysOfPart - 1) / kKeysOfPart);
    return round_up((keys + parts - 1) / parts, kColumnStep);
  }

  struct Head {
    Sequence s;
    int64_t key_head;
    R* dbias;
    bool careful;
  };

  void head_of_keys(int64_t n, int64_t key_head, R* dbias, Scratch& x) const {
    Head h{Sequence(p, n), key_head, dbias, false};
    h.careful = hides(p) && !all_finite(h);
    prepare_rows(h, x);
    const int64_t part = part_of(h.s.keys);
    std::fill_n(static_cast<R*>(x.dq), group * h.s.queries * padded<E>(p.D), R(0));
    for (int64_t begin = 0; begin < h.s.keys; begin += part)
      part_of_keys(h, {begin, std::min(h.s.keys, begin + part)}, x);
    for (int64_t j = h.s.keys; j < h.s.all_keys; ++j) {
      store(out.dk, p.keys, p.key_heads, h.s.row, h.s.first_key + j, key_head, nullptr, 0);
      store(out.dv, p.keys, p.key_heads, h.s.row, h.s.first_key + j, key_head, nullptr, 0);
    }
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < h.s.queries; ++i)
        store(out.dq, p.queries, p.query_heads, h.s.row, h.s.first_query + i, key_head * group + g,
              x.dq + (g * h.s.queries + i) * padded<E>(p.D), R(p.scale));
  }

  // Row (row, token, head) of a dense gradient: `sums` times factor; 0: zeros.
  void store(void* gradient, int64_t tokens, int64_t heads, int64_t row, int64_t token, int64_t head,
             const R* sums, R factor) const {
    const int64_t at = ((row * tokens + token) * heads + head) * p.D;
    if (factor == 0) {
      std::memset(static_cast<char*>(gradient) + at * bytes(p.type), 0, size_t(p.D * bytes(p.type)));
      return;
    }
    store_scaled(p.type, gradient, at, p.D, sums, factor);
  }

  Matrix queries_of(const Tokens& t, const Head& h, int64_t head, Range rows) const {
    return matrix(t, p.type, p.D, h.s, h.s.first_query, head, rows);
  }
  Matrix keys_of(const Tokens& t, const Head& h, Range rows) const {
    return matrix(t, p.type, p.D, h.s, h.s.first_key, h.key_head, rows);
  }

  bool all_finite(const Head& h) const {
    bool yes = is_finite(keys_of(p.k, h, {0, h.s.keys})) && is_finite(keys_of(p.v, h, {0, h.s.keys}));
    for (int64_t g = 0; g < group && yes; ++g)
      yes = is_finite(queries_of(p.q, h, h.key_head * group + g, {0, h.s.queries})) &&
            (!out.grad_out.data ||
             is_finite(queries_of(out.grad_out, h, h.key_head * group + g, {0, h.s.queries})));
    return yes;
  }

  // The only row of m, converted where it must be.
  const R* row_of(const Matrix& m, R* converted) const {
    if (m.type == (std::is_same_v<R, double> ? Type::f64 : Type::f32)) return static_cast<const R*>(m.data);
    crf::load_row({m.data, m.type, 1, 1, p.D, 0, 0}, 0, 0, converted);
    return converted;
  }

  // lse, infinite where nothing was visible, which makes all probabilities 0; and what the softmax'
  // gradient subtracts.
  void prepare_rows(const Head& h, Scratch& x) const {
    std::vector<R> a(p.D), b(p.D);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < h.s.queries; ++i) {
        const int64_t head = h.key_head * group + g, at = g * h.s.queries + i;
        const int64_t row = (h.s.row * p.query_heads + head) * p.queries + h.s.first_query + i;
        const R lse = static_cast<const R*>(out.lse)[row];
        R delta = out.grad_lse ? -static_cast<const R*>(out.grad_lse)[row] : 0;
        if (out.grad_out.data) {
          const R* d = row_of(queries_of(out.grad_out, h, head, {i, i + 1}), a.data());
          delta += dot(d, row_of(queries_of(out.out, h, head, {i, i + 1}), b.data()), p.D);
        }
        x.lse[at] = lse == kForbidden<R> ? -kForbidden<R> : lse;
        x.delta[at] = lse == kForbidden<R> ? 0 : delta;
      }
    }
  }

  void part_of_keys(const Head& h, Range keys, Scratch& x) const {
    const int64_t ld = padded<E>(p.D);
    const Panels<E> k = pack_transposed<E>(keys_of(p.k, h, keys), x.k_transposed);
    const Panels<E> v = pack_transposed<E>(keys_of(p.v, h, keys), x.v_transposed);
    const Panels<E> k_columns = pack_columns<E>(keys_of(p.k, h, keys), x.k_columns);
    std::fill_n(static_cast<R*>(x.dk), keys.size() * ld, R(0));
    std::fill_n(static_cast<R*>(x.dv), keys.size() * ld, R(0));
    const int64_t step = block_rows(h.s.queries);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = h.key_head * group + g;
      const Scores<R> scores(p, h.s, head);
      for (int64_t i = 0; i < h.s.queries; i += step) {
        const Range queries{i, std::min(h.s.queries, i + step)}, seen = visible(p, h.s, queries);
        const Range columns{std::max(keys.begin, seen.begin), std::min(keys.end, seen.end)};
        if (columns.begin >= columns.end) continue;
        make_products(h, head, queries, columns, keys.begin, k, v, x);
        for (int64_t r = 0; r < queries.size(); ++r)
          differentiate_row(h, scores, g, head, queries.begin + r, columns, x, r);
        add_gradients(h, scores, g, head, queries, columns, keys.begin, k_columns, x);
      }
    }
    for (int64_t j = 0; j < keys.size(); ++j) {
      const int64_t token = h.s.first_key + keys.begin + j;
      store(out.dk, p.keys, p.key_heads, h.s.row, token, h.key_head, x.dk + j * ld, R(p.scale));
      store(out.dv, p.keys, p.key_heads, h.s.row, token, h.key_head, x.dv + j * ld, R(dropout.factor()));
    }
  }

  // p = q k^T and d = grad_out v^T
  void make_products(const Head& h, int64_t head, Range queries, Range columns, int64_t first,
                     const Panels<E>& k, const Panels<E>& v, Scratch& x) const {
    const int64_t rows = queries.size(), ld = steps<E>(p.D);
    const Range here{columns.begin - first, columns.end - first};
    pack_rows<E>(queries_of(p.q, h, head, queries), x.q_rows, ld);
    product<E, Rows::contiguous>(rows, x.q_rows, ld, k, {0, ld}, here, x.p - here.begin, x.width, false);
    if (out.grad_out.data) {
      pack_rows<E>(queries_of(out.grad_out, h, head, queries), x.do_rows, ld);
      product<E, Rows::contiguous>(rows, x.do_rows, ld, v, {0, ld}, here, x.d - here.begin, x.width, false);
    } else {
      std::fill_n(static_cast<R*>(x.d), rows * x.width, R(0));
    }
  }

  // Row r of p becomes the probabilities, but for dropout's factor, and that of d the gradient of what the
  // scale then multiplies.
  void differentiate_row(const Head& h, const Scores<R>& scores, int64_t g, int64_t head, int64_t i,
                         Range columns, Scratch& x, int64_t r) const {
    R *row = x.p + r * x.width, *d = x.d + r * x.width;
    const int64_t n = round_up(columns.size(), 32), at = g * h.s.queries + i;
    const bool capped = p.softcap > 0;
    scores.prepare(row, i, columns, x.row, capped ? static_cast<R*>(x.steepness) : nullptr);
    std::fill(d + columns.size(), d + n, R(0));
    const uint32_t* kept = nullptr;
    if (dropout.any()) {
      keep_bits(dropout, HeadMask(dropout, h.s.n * p.query_heads + head), i, columns.begin, n / 32, x.kept);
      kept = x.kept;
    }
    differentiate(row, d, n, scores.factor(), x.lse[at], R(dropout.factor()), x.delta[at], kept);
    for (int64_t c = 0; c < columns.size() && h.careful; ++c)
      if (x.lse[at] == -kForbidden<R> || !scores.sees(i, columns.begin + c)) row[c] = d[c] = 0;
    if (h.dbias) bias.add(h.dbias, g, i, columns, d);
    for (int64_t c = 0; c < n && capped; ++c) d[c] *= x.steepness[c];
  }

  // dv += p^T grad_out, dk += d^T q, dq += d k
  void add_gradients(const Head& h, const Scores<R>& scores, int64_t g, int64_t head, Range queries,
                     Range columns, int64_t first, const Panels<E>& k_columns, Scratch& x) const {
    const Matrix q = queries_of(p.q, h, head, queries);
    const int64_t ld = padded<E>(p.D), rows = queries.size();
    R* dq = x.dq + (g * h.s.queries + queries.begin) * ld;
    R *dk = x.dk + (columns.begin - first) * ld, *dv = x.dv + (columns.begin - first) * ld;
    if (h.careful) return add_careful(h, scores, g, queries, columns, dq, dk, dv, x);
    const E *p_rows, *d_rows, *d_along;
    if constexpr (kRounds) {
      round_pairs(x.p, x.width, rows, {0, columns.size()}, nullptr, x.p_across, x.width);
      round_pairs(x.d, x.width, rows, {0, columns.size()}, x.along, x.d_across, x.width);
      p_rows = x.p_across, d_rows = x.d_across, d_along = x.along;
    } else {
      p_rows = x.p, d_rows = d_along = x.d;
    }
    if (out.grad_out.data) {
      const Panels<E> d = pack_columns<E>(queries_of(out.grad_out, h, head, queries), x.do_columns);
      product<E, Rows::strided>(columns.size(), p_rows, x.width, d, {0, d.depth}, {0, p.D}, dv, ld, true);
    }
    const Panels<E> q_columns = pack_columns<E>(q, x.q_columns);
    product<E, Rows::strided>(columns.size(), d_rows, x.width, q_columns, {0, q_columns.depth}, {0, p.D}, dk,
                              ld, true);
    product<E, Rows::contiguous>(rows, d_along, x.width, k_columns,
                                 {steps<E>(columns.begin - first), steps<E>(columns.end - first)}, {0, p.D},
                                 dq, ld, true);
  }

  // As products, but what a query does not see is left out, and not multiplied by 0: there is a number that
  // is not finite.
  void add_careful(const Head& h, const Scores<R>& scores, int64_t g, Range queries, Range columns, R* dq,
                   R* dk, R* dv, Scratch& x) const {
    const int64_t ld = padded<E>(p.D);
    std::vector<R> q(p.D), k(p.D), d(p.D);
    const auto load = [&](const Matrix& m, std::vector<R>& to) {
      crf::load_row({m.data, m.type, 1, 1, p.D, 0, 0}, 0, 0, to.data());
    };
    for (int64_t r = 0; r < queries.size(); ++r) {
      const int64_t i = queries.begin + r, head = h.key_head * group + g;
      if (x.lse[g * h.s.queries + i] == -kForbidden<R>) continue;
      load(queries_of(p.q, h, head, {i, i + 1}), q);
      if (out.grad_out.data) load(queries_of(out.grad_out, h, head, {i, i + 1}), d);
      for (int64_t c = 0; c < columns.size(); ++c) {
        if (!scores.sees(i, columns.begin + c)) continue;
        load(keys_of(p.k, h, {columns.begin + c, columns.begin + c + 1}), k);
        const R probability = x.p[r * x.width + c], gradient = x.d[r * x.width + c];
        add_scaled(dv + c * ld, probability, d.data(), p.D);
        add_scaled(dk + c * ld, gradient, q.data(), p.D);
        add_scaled(dq + r * ld, gradient, k.data(), p.D);
      }
    }
  }

  const Problem& p;
  const fastseq::attention::Backward& out;
  const int64_t group;
  const Dropout dropout;
  BiasGradient<R> bias;
  int64_t most_keys = 1, most_queries = 0;
};

}  // namespace

void backward(const Problem& problem, const fastseq::attention::Backward& gradients,
              const ParallelFor& parallel) {
  if (problem.type == Type::f64) return Backpropagation<double>(problem, gradients).run(parallel);
#if defined(__AVX512F__)
  if (problem.type == Type::bf16 && has_pairs())
    return Backpropagation<Pair>(problem, gradients).run(parallel);
#endif
  Backpropagation<float>(problem, gradients).run(parallel);
}

}  // namespace fastseq::FASTSEQ_ISA::attention
