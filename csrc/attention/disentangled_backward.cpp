// The backward pass. A task is one head of some sequences: the tables' gradients add up over its sequences,
// and over the tasks of a head in their order, which does not depend on the number of threads; nor do
// results. Of each sequence, blocks of 48 queries have their scores again, from lse, and the scores'
// gradient. It is what q, k and v's gradients are products with, and, added up for each slot, those of the
// terms: by query for the block, by key for the sequence.
//
// Work: 10 n^2 D FLOPs, and up to 12 n P' D for the terms (about 3/4 of that, as in the forward pass); n^2
// exponentials. Memory: two times n x P' numbers of each thread, and a table's gradient for each task.
#include <cstring>

#include "disentangled_pieces.h"

namespace fastseq::FASTSEQ_ISA::attention {
namespace {

constexpr int64_t kTasks = 48;  // in which the sequences of all heads are done, where there are as many

template <class E>
class Backward {
  using R = Sum<E>;
  using V = Vector<R>;
  using Gradients = fastseq::attention::DisentangledGradients<R>;
  static constexpr bool kPaired = !std::is_same_v<E, R>;
  static constexpr int kSteps = Element<E>::kSteps;

 public:
  Backward(const Disentangled& problem, const SlotMap& map, const Gradients& gradients,
           const ParallelFor& parallel)
      : p(problem),
        map(map),
        g(gradients),
        parallel(parallel),
        dropout(Dropout::make(p.seed, p.dropout)),
        count(int64_t(p.sequences.size())),
        width(padded<E>(p.D)),
        chunks(std::clamp((kTasks + p.H - 1) / std::max<int64_t>(p.H, 1), int64_t(1),
                          std::max<int64_t>(count, 1))),
        key_table(p, map, p.pos_key, true, true, parallel),
        query_table(p, map, p.pos_query, false, true, parallel),
        key_sums(key_table ? chunks * p.H * map.count * width : 0),
        query_sums(query_table ? chunks * p.H * map.count * width : 0) {}

  void run() const {
    run_with_scratch<Scratch>(parallel, count ? p.H * chunks : 0, *this, [&](int64_t i, Scratch& s) {
      const int64_t h = i / chunks, chunk = i % chunks, size = map.count * width;
      if (key_table) std::fill_n(key_sums + i * size, size, R(0));
      if (query_table) std::fill_n(query_sums + i * size, size, R(0));
      for (int64_t n = chunk * count / chunks; n < (chunk + 1) * count / chunks; ++n)
        if (p.sequences[n].length > 0) differentiate(n, h, key_sums + i * size, query_sums + i * size, s);
    });
    if (p.pos_key.data) add_up(g.pos_key, key_sums, true);
    if (p.pos_query.data) add_up(g.pos_query, query_sums, false);
  }

 private:
  struct Scratch {
    explicit Scratch(const Backward& f)
        : n(longest(f.p)),
          depth(steps<E>(f.p.D)),
          ld(keys_apart<R>(n)),
          slots(slots_apart<R>(f.map)),
          keys(panels_size<E>(depth, n)),
          values(panels_size<E>(depth, n)),
          key_columns(panels_size<E>(steps<E>(n), f.p.D)),
          key_rows(f.query_table ? n * depth : 0),
          query_rows(kBlock * depth),
          grad_rows(kBlock * depth),
          query_columns(panels_size<E>(steps<E>(kBlock), f.p.D)),
          grad_columns(panels_size<E>(steps<E>(kBlock), f.p.D)),
          scores(kBlock * ld),
          grads(kBlock * ld),
          by_query(f.key_table ? kBlock * slots : 0),
          by_key(f.query_table ? round_up(n, kStrip) * slots : 0),
          grad_by_key(f.query_table ? round_up(n, kStrip) * slots : 0),
          along(kPaired ? kBlock * std::max(ld, slots) : 0),
          across(kPaired ? kBlock / 2 * std::max(ld, slots) : 0),
          grad_q(kBlock * f.width),
          grad_k(n * f.width),
          grad_v(n * f.width),
          one(2 * round_up(f.p.D, V::W)),
          kept(n / 32 + 1) {}
    const int64_t n, depth, ld, slots;
    const Buffer<E> keys, values, key_columns, key_rows, query_rows, grad_rows, query_columns, grad_columns;
    const Buffer<R> scores, grads, by_query, by_key, grad_by_key;
    const Buffer<E> along, across;  // a block in both orders
    const Buffer<R> grad_q, grad_k, grad_v, one;
    const Buffer<uint32_t> kept;
    R delta[kBlock];
  };

  // The operands of a sequence and head.
  struct Operands {
    const Sequence& sequence;
    int64_t h, n;
    Panels<E> keys, values, key_columns;
    HeadMask mask;
  };

  void differentiate(int64_t number, int64_t h, R* key_sum, R* query_sum, Scratch& s) const {
    const Sequence& sequence = p.sequences[number];
    const int64_t n = sequence.length;
    const Matrix k = rows_of(p, p.k, sequence, h, {0, n});
    const Operands x{sequence,
                     h,
                     n,
                     pack_transposed<E>(k, s.keys),
                     pack_transposed<E>(rows_of(p, p.v, sequence, h, {0, n}), s.values),
                     pack_columns<E>(k, s.key_columns),
                     HeadMask(dropout, number * p.H + h)};
    if (query_table) {
      multiply_rising<E>(map, query_table.across(h), n, left_operand<E>(k, s.key_rows), s.by_key, s.slots);
      for (int64_t j = 0; j < n; ++j) {
        const SlotMap::Range r = map.of_keys(n, j / kBlock * kBlock, std::min(n, (j / kBlock + 1) * kBlock));
        std::fill_n(s.grad_by_key + j * s.slots + r.begin / 2 * 2, r.end - r.begin / 2 * 2, R(0));
      }
    }
    for (int64_t begin = 0; begin < n; begin += kBlock)
      differentiate_block(x, {begin, std::min(n, begin + kBlock)}, key_sum, s);
    if (query_table)
      for (int64_t begin = 0; begin < n; begin += kBlock)
        multiply_by_key(x, {begin, std::min(n, begin + kBlock)}, query_sum, s);
    write(x, {0, n}, s.grad_k, g.k);
    write(x, {0, n}, s.grad_v, g.v);
  }

  void differentiate_block(const Operands& x, Range block, R* key_sum, Scratch& s) const {
    const int64_t rows = block.size();
    const Matrix q = rows_of(p, p.q, x.sequence, x.h, block);
    const Panels<E> query_columns = pack_columns<E>(q, s.query_columns);
    const Matrix grad = rows_of(p, g.grad_out, x.sequence, x.h, block);
    const Panels<E> grad_columns = pack_columns<E>(grad, s.grad_columns);
    const auto with_keys = [&](const E* a, const Panels<E>& b, R* c) {
      product<E, Rows::contiguous>(rows, a, b.depth, b, {0, b.depth}, {0, x.n}, c, s.ld, false);
    };
    const E* queries = left_operand<E>(q, s.query_rows);
    with_keys(queries, x.keys, s.scores);
    with_keys(left_operand<E>(grad, s.grad_rows), x.values, s.grads);
    if (key_table) multiply_falling<E>(map, key_table.across(x.h), x.n, block, queries, s.by_query, s.slots);
    find_delta(x, block, s);
    for (int64_t i = block.begin; i < block.end; i += kStrip) differentiate_strip(x, block, i, s);
    multiply_block(x, block, query_columns, grad_columns, s);
    if (key_table) multiply_by_query(x, block, query_columns, key_sum, s);
    write(x, block, s.grad_q, g.q);
  }

  // delta = grad_out . out - grad_lse of each row.
  void find_delta(const Operands& x, Range block, Scratch& s) const {
    const int64_t whole = round_up(p.D, V::W);
    R *grad = s.one, *out = grad + whole;
    std::fill_n(grad, 2 * whole, R(0));
    for (int64_t i = block.begin; i < block.end; ++i) {
      load(rows_of(p, g.grad_out, x.sequence, x.h, {i, i + 1}), grad);
      load(rows_of(p, g.out, x.sequence, x.h, {i, i + 1}), out);
      V all = V::set(0);
      for (int64_t d = 0; d < p.D; d += V::W) all = V::fma(V::load(grad + d), V::load(out + d), all);
      s.delta[i - block.begin] = sum(all) - (g.grad_lse ? g.grad_lse[lse_at(x, i)] : 0);
    }
  }

  static void load(const Matrix& m, R* row) {
    crf::load_row({m.data, m.type, 1, 1, m.columns, 0, 0}, 0, 0, row);
  }

  int64_t lse_at(const Operands& x, int64_t i) const {
    return (x.sequence.b * p.H + x.h) * p.S + x.sequence.first + i;
  }

  // The strip's rows of `scores` become the dropped-out probabilities, those of `grads` the scores' gradient,
  // which is also added to what each query and each key has for each slot.
  void differentiate_strip(const Operands& x, Range block, int64_t first, Scratch& s) const {
    const int64_t a = first - block.begin, end = round_up(x.n, 32);
    R *scores = s.scores + a * s.ld, *grads = s.grads + a * s.ld;
    R* by_query = key_table ? s.by_query + a * s.slots : nullptr;
    add_positions<R>({first, x.n, map.rise(), map.fall(), map.gentle, scores, s.ld, by_query, s.slots,
                      query_table ? static_cast<R*>(s.by_key) : nullptr, s.slots},
                     R(p.scale));
    for (int64_t i = 0; i < kStrip; ++i) {
      if (first + i < block.end)
        differentiate_row(x, first + i, scores + i * s.ld, grads + i * s.ld, s.delta[a + i], s);
      else
        std::fill_n(grads + i * s.ld, end, R(0));
    }
    if (!key_table && !query_table) return;
    if (key_table) {
      const Range slots = even(falling_slots(map, x.n, block));
      for (int64_t i = 0; i < kStrip; ++i)
        std::fill_n(by_query + i * s.slots + slots.begin, slots.size(), R(0));
    }
    add_to_positions<R>({first, x.n, map.rise(), map.fall(), map.gentle, grads, s.ld, by_query, s.slots,
                         query_table ? static_cast<R*>(s.grad_by_key) : nullptr, s.slots});
  }

  void differentiate_row(const Operands& x, int64_t i, R* row, R* grad, R delta, Scratch& s) const {
    const int64_t n = x.n, end = round_up(n, 32);
    const R lse = g.lse[lse_at(x, i)];
    if (lse == -std::numeric_limits<R>::infinity()) {  // a row without a probability has no gradient
      std::fill_n(row, end, R(0));
      std::fill_n(grad, end, R(0));
      return;
    }
    std::fill(row + n, row + end, -std::numeric_limits<R>::infinity());
    const V top = V::set(lse), scale = V::set(R(p.scale)), shift = V::set(R(-p.scale) * delta);
    if (!dropout.any()) {
      for (int64_t c = 0; c < n; c += V::W) {
        const V w = weight(V::load(row + c) - top);
        w.store(row + c);
        (w * V::fma(V::load(grad + c), scale, shift)).store(grad + c);
      }
      return;
    }
    const V factor = V::set(R(dropout.factor())), scaled = factor * scale;
    keep_bits(dropout, x.mask, i, 0, end / 32, s.kept);
    for (int64_t c = 0; c < n; c += V::W) {
      const V w = weight(V::load(row + c) - top);
      kept_or_zero(s.kept, c, w * factor).store(row + c);
      (w * V::fma(kept_or_zero(s.kept, c, V::load(grad + c)), scaled, shift)).store(grad + c);
    }
  }

  static Range even(Range r) { return {r.begin / kSteps * kSteps, r.end}; }

  // A block of numbers as left operand, by rows and (strided) by columns, of columns `range`.
  struct Block {
    const E *along, *across;
    int64_t ld;
  };
  Block as_operands(const R* from, int64_t ld, int64_t rows, Range range, bool along, Scratch& s) const {
    if constexpr (kPaired) {
      round_pairs(from, ld, rows, range, along ? static_cast<E*>(s.along) : nullptr, s.across, ld);
      return {s.along + range.begin / 2, s.across + range.begin, ld};
    } else {
      return {from + range.begin, from + range.begin, ld};
    }
  }

  // The gradients of q, k and v by the scores'.
  void multiply_block(const Operands& x, Range block, const Panels<E>& query_columns,
                      const Panels<E>& grad_columns, Scratch& s) const {
    const int64_t rows = block.size();
    const bool add = block.begin > 0;
    const auto with_rows = [&](const Block& a, const Panels<E>& b, R* c) {
      product<E, Rows::strided>(x.n, a.across, a.ld, b, {0, steps<E>(rows)}, {0, p.D}, c, width, add);
    };
    with_rows(as_operands(s.scores, s.ld, rows, {0, x.n}, false, s), grad_columns, s.grad_v);
    const Block grads = as_operands(s.grads, s.ld, rows, {0, x.n}, true, s);
    with_rows(grads, query_columns, s.grad_k);
    product<E, Rows::contiguous>(rows, grads.along, grads.ld, x.key_columns, {0, x.key_columns.depth},
                                 {0, p.D}, s.grad_q, width, false);
  }

  // The gradients of q and of pos_key by what each query has for each slot.
  void multiply_by_query(const Operands& x, Range block, const Panels<E>& query_columns, R* sum,
                         Scratch& s) const {
    const Range slots = even(falling_slots(map, x.n, block));
    const Block a = as_operands(s.by_query, s.slots, block.size(), slots, true, s);
    product<E, Rows::contiguous>(block.size(), a.along, a.ld, key_table.along(x.h),
                                 {slots.begin / kSteps, steps<E>(slots.end)}, {0, p.D}, s.grad_q, width,
                                 true);
    product<E, Rows::strided>(slots.size(), a.across, a.ld, query_columns, {0, query_columns.depth}, {0, p.D},
                              sum + slots.begin * width, width, true);
  }

  // The gradients of k and of pos_query by what the keys [block) have for each slot.
  void multiply_by_key(const Operands& x, Range block, R* sum, Scratch& s) const {
    const SlotMap::Range r = map.of_keys(x.n, block.begin, block.end);
    const Range slots = even({r.begin, r.end});
    const Block a = as_operands(s.grad_by_key + block.begin * s.slots, s.slots, block.size(), slots, true, s);
    product<E, Rows::contiguous>(block.size(), a.along, a.ld, query_table.along(x.h),
                                 {slots.begin / kSteps, steps<E>(slots.end)}, {0, p.D},
                                 s.grad_k + block.begin * width, width, true);
    product<E, Rows::strided>(slots.size(), a.across, a.ld, x.key_columns,
                              {block.begin / kSteps, steps<E>(block.end)}, {0, p.D},
                              sum + slots.begin * width, width, true);
  }

  void write(const Operands& x, Range positions, const R* from, void* to) const {
    for (int64_t i = positions.begin; i < positions.end; ++i, from += width)
      crf::store_row(p.type, to, ((x.sequence.b * p.S + x.sequence.first + i) * p.H + x.h) * p.D, p.D, from);
  }

  // The tasks' parts of a table's gradient, in their order.
  void add_up(void* to, R* sums, bool falling) const {
    const int64_t all = p.P * p.H * p.D * bytes(p.type), size = map.count * width;
    if (all > 0) std::memset(to, 0, all);
    run_tasks(parallel, map.count, [&](int64_t slot) {
      const int64_t row = falling ? map.count - 1 - slot : slot;
      for (int64_t h = 0; h < p.H; ++h) {
        R* first = sums + h * chunks * size + row * width;
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
          for (int64_t d = 0; d < p.D; ++d) first[d] += first[chunk * size + d];
        crf::store_row(p.type, to, ((map.first_slot + slot) * p.H + h) * p.D, p.D, first);
      }
    });
  }

  const Disentangled& p;
  const SlotMap& map;
  const Gradients& g;
  const ParallelFor& parallel;
  const Dropout dropout;
  const int64_t count, width, chunks;  // chunks: the tasks of a head
  const PackedTable<E> key_table, query_table;
  const Buffer<R> key_sums, query_sums;
};

}  // namespace

template <class R>
void disentangled_backward(const Disentangled& problem, const SlotMap& map,
                           const fastseq::attention::DisentangledGradients<R>& gradients,
                           const ParallelFor& parallel) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>)
    if (problem.type == Type::bf16 && has_pairs())
      return Backward<Pair>(problem, map, gradients, parallel).run();
#endif
  Backward<R>(problem, map, gradients, parallel).run();
}

template void disentangled_backward<float>(const Disentangled&, const SlotMap&,
                                           const fastseq::attention::DisentangledGradients<float>&,
                                           const ParallelFor&);
template void disentangled_backward<double>(const Disentangled&, const SlotMap&,
                                            const fastseq::attention::DisentangledGradients<double>&,
                                            const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA::attention
