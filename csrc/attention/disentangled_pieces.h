// What the forward and the backward pass of disentangled attention share: the operands of a head, and its
// scores in blocks of rows.
#pragma once
#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>

#include "dropout.h"
#include "products.h"
#include "slot_windows.h"

namespace fastseq::FASTSEQ_ISA::attention {

using fastseq::attention::Disentangled;
using fastseq::attention::Heads;
using fastseq::attention::Sequence;
using fastseq::attention::SlotMap;
using fastseq::attention::Table;

// Queries (or keys) of a block: a multiple of the rows of a strip and of those of a product's block.
constexpr int64_t kBlock = 48;

template <class E>
using Vector = std::conditional_t<std::is_same_v<E, double>, WideDouble, Wide>;

template <class V>
FASTSEQ_INLINE V weight(V x) {
  if constexpr (std::is_same_v<V, WideDouble>)
    return vexp(x);
  else
    return V::exp_or_zero(x);
}

// Runs task(i, scratch) for i < n, with a Scratch(owner) for each thread that takes part.
template <class Scratch, class Owner, class Task>
void run_with_scratch(const ParallelFor& parallel_for, int64_t n, const Owner& owner, const Task& task) {
  if (n == 0) return;
  std::atomic<int64_t> next{0};
  parallel_for(n, [&](int64_t, int64_t) {
    std::optional<Scratch> scratch;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      if (!scratch) scratch.emplace(owner);
      task(i, *scratch);
    }
  });
}

inline int64_t longest(const Disentangled& p) {
  int64_t n = 0;
  for (const Sequence& s : p.sequences) n = std::max(n, s.length);
  return n;
}

// Positions [begin, end) of a sequence, of head h.
inline Matrix rows_of(const Disentangled& p, const Heads& x, const Sequence& s, int64_t h, Range r) {
  const int64_t at = s.b * x.row + (s.first + r.begin) * x.position + h * x.head;
  return {static_cast<const char*>(x.data) + at * bytes(p.type), p.type, r.size(), p.D, x.position};
}

// The slots that occur, of head h: rising, or (for the queries' term) falling.
inline Matrix slots_of(const Disentangled& p, const SlotMap& map, const Table& x, int64_t h, bool falling) {
  const int64_t first = falling ? map.first_slot + map.count - 1 : map.first_slot;
  const int64_t at = first * x.slot + h * x.head;
  return {static_cast<const char*>(x.data) + at * bytes(p.type), p.type, map.count, p.D,
          falling ? -x.slot : x.slot};
}

// Rows as left operand of a product, steps<E>(D) apart. (Where they lie, heads apart, they would be in few
// sets of a cache: 8 % slower in all.)
template <class E>
const E* left_operand(const Matrix& m, E* packed) {
  pack_rows<E>(m, packed, steps<E>(m.columns));
  return packed;
}

// Numbers between rows that hold one for each slot.
template <class R>
int64_t slots_apart(const SlotMap& map) {
  return apart<R>(map.count + 2 * kPastSlots);
}
// Between rows that hold one for each key.
template <class R>
int64_t keys_apart(int64_t n) {
  return apart<R>(round_up(n, 64));
}

// A table's operands for all heads: as slots to multiply rows with, and, for the gradient, as what a row's
// gradient for each slot is multiplied with.
template <class E>
class PackedTable {
 public:
  PackedTable(const Disentangled& p, const SlotMap& map, const Table& x, bool falling, bool gradient,
              const ParallelFor& parallel)
      : depth_(steps<E>(p.D)),
        count_(x.data ? map.count : 0),
        columns_(p.D),
        across_size_(panels_size<E>(depth_, count_)),
        along_size_(gradient ? panels_size<E>(steps<E>(count_), p.D) : 0),
        across_(p.H * across_size_),
        along_(p.H * along_size_) {
    if (count_ == 0) return;
    run_tasks(parallel, p.H, [&](int64_t h) {
      const Matrix m = slots_of(p, map, x, h, falling);
      pack_transposed<E>(m, across_ + h * across_size_);
      if (gradient) pack_columns<E>(m, along_ + h * along_size_);
    });
  }
  explicit operator bool() const { return count_ > 0; }
  Panels<E> across(int64_t h) const { return {across_ + h * across_size_, depth_, count_}; }
  Panels<E> along(int64_t h) const { return {along_ + h * along_size_, steps<E>(count_), columns_}; }

 private:
  const int64_t depth_, count_, columns_, across_size_, along_size_;
  const Buffer<E> across_, along_;
};

// out = the rows [rows.begin, rows.end), of which `a` has the first, times the slots in `slots`; of each
// panel of slots only the rows that meet one of them, rows_meeting(begin, end). The other numbers are not
// written.
template <class E, class RowsMeeting>
void multiply_slots(const Panels<E>& table, Range rows, Range slots, const RowsMeeting& rows_meeting,
                    const E* a, Sum<E>* out, int64_t ld) {
  for (int64_t begin = slots.begin / kPanel<E> * kPanel<E>; begin < slots.end; begin += kPanel<E>) {
    const int64_t end = std::min(begin + kPanel<E>, table.columns);
    const SlotMap::Range meeting = rows_meeting(begin, end);
    const Range r{std::max(rows.begin, meeting.begin), std::min(rows.end, meeting.end)};
    if (r.size() <= 0) continue;
    const int64_t from = r.begin - rows.begin;
    product<E, Rows::contiguous>(r.size(), a + from * table.depth, table.depth, table, {0, table.depth},
                                 {begin, end}, out + from * ld, ld, false);
  }
}

// The slots that queries [block) meet, in falling order.
inline Range falling_slots(const SlotMap& map, int64_t n, Range block) {
  const SlotMap::Range r = map.of_queries(n, block.begin, block.end);
  return {map.count - r.end, map.count - r.begin};
}

template <class E>
void multiply_falling(const SlotMap& map, const Panels<E>& table, int64_t n, Range block, const E* a,
                      Sum<E>* out, int64_t ld) {
  multiply_slots(
      table, block, falling_slots(map, n, block),
      [&](int64_t begin, int64_t end) { return map.queries(n, map.count - end, map.count - begin); }, a, out,
      ld);
}

template <class E>
void multiply_rising(const SlotMap& map, const Panels<E>& table, int64_t n, const E* a, Sum<E>* out,
                     int64_t ld) {
  const SlotMap::Range slots = map.of_keys(n, 0, n);
  multiply_slots(
      table, {0, n}, {slots.begin, slots.end},
      [&](int64_t begin, int64_t end) { return map.keys(n, begin, end); }, a, out, ld);
}

}  // namespace fastseq::FASTSEQ_ISA::attention
