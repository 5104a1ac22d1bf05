// DeBERTa's disentangled attention on raw pointers: what registration, kernels and tests share. Mathematics:
// fastseq/ops/attention/disentangled/__init__.py.
#pragma once
#include <vector>

#include "../common/half.h"
#include "../common/parallel.h"

namespace fastseq::attention {

using crf::Type;

// Element (b, s, h, d) of a tensor (B,S,H,D) lies at b * row + s * position + h * head + d.
struct Heads {
  const void* data;
  int64_t row, position, head;
};

// Element (p, h, d) of a table (P,H,D) at p * slot + h * head + d; null data: there is no such term.
struct Table {
  const void* data;
  int64_t slot, head;
};

// Positions first .. first + length of row b.
struct Sequence {
  int64_t b, first, length;
};

struct Disentangled {
  int64_t B, S, H, D, P;
  Type type;  // of q, k, v, the tables, the output and the gradients
  Heads q, k, v;
  Table pos_key, pos_query;
  const int32_t* slots;  // of distance 0: slots[d] for |d| < every length, in [0,P), non-decreasing
  std::vector<Sequence> sequences;
  double scale;
  double dropout;
  int64_t seed;
};

// Written whole and dense: out (B,S,H,D), lse (B,H,S).
template <class R>
struct Attended {
  void* out;
  R* lse;
};

// `grad_out` and `grad_lse` may be null. Written whole and dense: dq, dk, dv (B,S,H,D), and (P,H,D) for each
// table.
template <class R>
struct DisentangledGradients {
  Heads grad_out, out;
  const R *grad_lse, *lse;  // (B,H,S), dense
  void *q, *k, *v, *pos_key, *pos_query;
};

// The distances that sequences of up to `longest` positions have, |d| < longest, and the slots that these
// meet, counted from the first.
class SlotMap {
 public:
  static constexpr int64_t kBeyond = 64;  // distances past the last, at either end, with the slot of the last

  SlotMap(const int32_t* slots, int64_t longest);

  int64_t first_slot, count = 0;  // the slots first_slot .. first_slot + count
  bool gentle = true;             // they rise by 1 a step at most

  // rise()[d]: the slot of distance d = i - j. fall()[e], e = j - i: the same, counted from the last
  // backwards.
  const int32_t* rise() const { return rise_.data() + longest_ - 1 + kBeyond; }
  const int32_t* fall() const { return fall_.data() + longest_ - 1 + kBeyond; }

  // The positions i < n from which some j < n is at a distance whose slot is in [begin, end), and the
  // positions j to which some i is.
  struct Range {
    int64_t begin, end;
  };
  Range queries(int64_t n, int64_t begin, int64_t end) const;
  Range keys(int64_t n, int64_t begin, int64_t end) const;
  // The slots that queries, or keys, [begin, end) of n positions meet.
  Range of_queries(int64_t n, int64_t begin, int64_t end) const {
    return {rise()[begin - (n - 1)], rise()[end - 1] + 1};
  }
  Range of_keys(int64_t n, int64_t begin, int64_t end) const {
    return {rise()[-(end - 1)], rise()[n - 1 - begin] + 1};
  }

 private:
  int64_t longest_;
  std::vector<int32_t> rise_, fall_;
  std::vector<int64_t> least_, most_;  // of slot p: the distances whose slot is >= p, <= p
};

template <class R>
void disentangled(const Disentangled& problem, const Attended<R>& results, const ParallelFor& parallel_for);
template <class R>
void disentangled_grad(const Disentangled& problem, const DisentangledGradients<R>& gradients,
                       const ParallelFor& parallel_for);

}  // namespace fastseq::attention

namespace fastseq {

#define FASTSEQ_DECLARE(isa)                                                                \
  namespace isa::attention {                                                                \
  template <class R>                                                                        \
  void disentangled_forward(const fastseq::attention::Disentangled& problem,                \
                            const fastseq::attention::SlotMap& map,                         \
                            const fastseq::attention::Attended<R>& results,                 \
                            const ParallelFor& parallel_for);                               \
  template <class R>                                                                        \
  void disentangled_backward(const fastseq::attention::Disentangled& problem,               \
                             const fastseq::attention::SlotMap& map,                        \
                             const fastseq::attention::DisentangledGradients<R>& gradients, \
                             const ParallelFor& parallel_for);                              \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
#undef FASTSEQ_DECLARE

}  // namespace fastseq
