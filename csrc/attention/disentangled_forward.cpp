// The forward pass: a task is one head of one sequence of n positions. The keys' term is a product of the
// keys with the slots that occur, n x P' numbers that stay in L2, each read once; blocks of 48 queries then
// have their scores, their own term's product and the softmax, in L2 too.
//
// Work: 4 n^2 D FLOPs for the scores and the values, and up to 4 n P' D for the terms: of each panel of slots
// only the rows that are near or far enough to meet it, about 3/4 of them for log buckets. n^2 exponentials.
// Memory traffic: q, k, v and out once. What one sequence and head compute depends on nothing else, so
// results are the same bits for any number of threads.
#include "disentangled_pieces.h"

namespace fastseq::FASTSEQ_ISA::attention {
namespace {

template <class E>
class Forward {
  using R = Sum<E>;
  using V = Vector<R>;
  static constexpr bool kPaired = !std::is_same_v<E, R>;

 public:
  Forward(const Disentangled& problem, const SlotMap& map, const fastseq::attention::Attended<R>& results,
          const ParallelFor& parallel)
      : p(problem),
        map(map),
        out(results),
        parallel(parallel),
        dropout(Dropout::make(p.seed, p.dropout)),
        key_table(p, map, p.pos_key, true, false, parallel),
        query_table(p, map, p.pos_query, false, false, parallel) {}

  void run() const {
    const int64_t count = int64_t(p.sequences.size());
    run_with_scratch<Scratch>(parallel, count * p.H, *this, [&](int64_t i, Scratch& s) {
      if (p.sequences[i % count].length > 0) attend(i % count, i / count, s);
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Forward& f)
        : n(longest(f.p)),
          depth(steps<E>(f.p.D)),
          ld(keys_apart<R>(n)),
          slots(slots_apart<R>(f.map)),
          width(padded<E>(f.p.D)),
          keys(panels_size<E>(depth, n)),
          values(panels_size<E>(steps<E>(n), f.p.D)),
          key_rows(f.query_table ? n * depth : 0),
          query_rows(kBlock * depth),
          scores(kBlock * ld),
          by_query(f.key_table ? kBlock * slots : 0),
          by_key(f.query_table ? round_up(n, kStrip) * slots : 0),
          weights(kPaired ? kBlock * ld : 0),
          attended(kBlock * width),
          kept(n / 32 + 1) {}
    const int64_t n, depth, ld, slots, width;
    const Buffer<E> keys, values, key_rows, query_rows;
    const Buffer<R> scores, by_query, by_key;
    const Buffer<E> weights;
    const Buffer<R> attended;
    const Buffer<uint32_t> kept;
    R factor[kBlock];  // of each row's sum of values
  };

  void attend(int64_t number, int64_t h, Scratch& s) const {
    const Sequence& sequence = p.sequences[number];
    const int64_t n = sequence.length;
    const Panels<E> keys = pack_transposed<E>(rows_of(p, p.k, sequence, h, {0, n}), s.keys);
    const Panels<E> values = pack_columns<E>(rows_of(p, p.v, sequence, h, {0, n}), s.values);
    if (query_table)
      multiply_rising<E>(map, query_table.across(h), n,
                         left_operand<E>(rows_of(p, p.k, sequence, h, {0, n}), s.key_rows), s.by_key,
                         s.slots);
    const HeadMask mask(dropout, number * p.H + h);
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const Range block{begin, std::min(n, begin + kBlock)};
      const E* queries = left_operand<E>(rows_of(p, p.q, sequence, h, block), s.query_rows);
      product<E, Rows::contiguous>(block.size(), queries, keys.depth, keys, {0, keys.depth}, {0, n}, s.scores,
                                   s.ld, false);
      if (key_table) multiply_falling<E>(map, key_table.across(h), n, block, queries, s.by_query, s.slots);
      for (int64_t i = block.begin; i < block.end; i += kStrip) {
        const int64_t a = i - block.begin;
        add_positions<R>({i, n, map.rise(), map.fall(), map.gentle, s.scores + a * s.ld, s.ld,
                          key_table ? s.by_query + a * s.slots : nullptr, s.slots,
                          query_table ? static_cast<R*>(s.by_key) : nullptr, s.slots},
                         R(p.scale));
        for (int64_t row = i; row < std::min(block.end, i + kStrip); ++row)
          normalize(sequence, h, mask, row, s.scores + (row - block.begin) * s.ld, s,
                    s.factor[row - block.begin]);
      }
      multiply_values(values, block.size(), n, s);
      write(sequence, h, block, s);
    }
  }

  // The exponentials of a row's scores, 0 where dropped; its lse, and what the sum over them is to be
  // multiplied by.
  void normalize(const Sequence& sequence, int64_t h, const HeadMask& mask, int64_t i, R* row, Scratch& s,
                 R& factor) const {
    const int64_t n = sequence.length, end = round_up(n, 32);
    std::fill(row + n, row + end, -std::numeric_limits<R>::infinity());
    V most = V::set(std::numeric_limits<R>::lowest()), all = V::set(0);
    for (int64_t c = 0; c < n; c += V::W) most = max(V::load(row + c), most);
    const R top = largest(most);
    most = V::set(top);
    if (dropout.any()) {
      keep_bits(dropout, mask, i, 0, end / 32, s.kept);
      for (int64_t c = 0; c < n; c += V::W) {
        const V x = weight(V::load(row + c) - most);
        all = all + x;
        kept_or_zero(s.kept, c, x).store(row + c);
      }
    } else {
      for (int64_t c = 0; c < n; c += V::W) {
        const V x = weight(V::load(row + c) - most);
        all = all + x;
        x.store(row + c);
      }
    }
    const R total = sum(all);
    factor = total == 0 ? 0 : R(dropout.factor()) / total;
    out.lse[(sequence.b * p.H + h) * p.S + sequence.first + i] = top + std::log(total);
  }

  void multiply_values(const Panels<E>& values, int64_t rows, int64_t n, Scratch& s) const {
    const E* weights;
    if constexpr (kPaired) {
      round_pairs(s.scores, s.ld, rows, {0, n}, s.weights, nullptr, s.ld);
      weights = s.weights;
    } else {
      weights = s.scores;
    }
    product<E, Rows::contiguous>(rows, weights, s.ld, values, {0, values.depth}, {0, p.D}, s.attended,
                                 s.width, false);
  }

  void write(const Sequence& sequence, int64_t h, Range block, Scratch& s) const {
    for (int64_t i = block.begin; i < block.end; ++i) {
      R* row = s.attended + (i - block.begin) * s.width;
      for (int64_t d = 0; d < p.D; ++d) row[d] *= s.factor[i - block.begin];
      const int64_t position = sequence.b * p.S + sequence.first + i;
      crf::store_row(p.type, out.out, (position * p.H + h) * p.D, p.D, row);
    }
  }

  const Disentangled& p;
  const SlotMap& map;
  const fastseq::attention::Attended<R>& out;
  const ParallelFor& parallel;
  const Dropout dropout;
  const PackedTable<E> key_table, query_table;
};

}  // namespace

template <class R>
void disentangled_forward(const Disentangled& problem, const SlotMap& map,
                          const fastseq::attention::Attended<R>& results, const ParallelFor& parallel) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>)
    if (problem.type == Type::bf16 && has_pairs())
      return Forward<Pair>(problem, map, results, parallel).run();
#endif
  Forward<R>(problem, map, results, parallel).run();
}

template void disentangled_forward<float>(const Disentangled&, const SlotMap&,
                                          const fastseq::attention::Attended<float>&, const ParallelFor&);
template void disentangled_forward<double>(const Disentangled&, const SlotMap&,
                                           const fastseq::attention::Attended<double>&, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA::attention
