// The slots that occur, and the results of positions that belong to no sequence. O(P + S) and one pass of
// stores; the work is in disentangled_forward.cpp and disentangled_backward.cpp.
#include "disentangled.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "../common/cpu_features.h"

namespace fastseq::attention {

SlotMap::SlotMap(const int32_t* slots, int64_t longest) : longest_(longest) {
  if (longest == 0) {
    first_slot = 0;
    return;
  }
  const int64_t reach = longest - 1;
  first_slot = slots[-reach], count = slots[reach] - first_slot + 1;
  for (int64_t d = -reach - kBeyond; d <= reach + kBeyond; ++d) {
    rise_.push_back(int32_t(slots[std::clamp(d, -reach, reach)] - first_slot));
    fall_.push_back(int32_t(count - 1 - (slots[std::clamp(-d, -reach, reach)] - first_slot)));
  }
  for (int64_t d = -reach; d < reach; ++d) gentle = gentle && slots[d + 1] - slots[d] <= 1;
  least_.resize(count), most_.resize(count);
  for (int64_t p = 0, d = -reach; p < count; ++p) {
    while (rise()[d] < p) ++d;
    least_[p] = d;
  }
  for (int64_t p = count - 1, d = reach; p >= 0; --p) {
    while (rise()[d] > p) --d;
    most_[p] = d;
  }
}

SlotMap::Range SlotMap::queries(int64_t n, int64_t begin, int64_t end) const {
  const int64_t from = std::max<int64_t>(0, least_[begin]), to = n + std::min<int64_t>(0, most_[end - 1]);
  return {from, std::max(from, to)};
}

SlotMap::Range SlotMap::keys(int64_t n, int64_t begin, int64_t end) const {
  const int64_t from = std::max<int64_t>(0, -most_[end - 1]), to = n - std::max<int64_t>(0, least_[begin]);
  return {from, std::max(from, to)};
}

namespace {

SlotMap map_of(const Disentangled& p) {
  int64_t longest = 0;
  for (const Sequence& s : p.sequences) longest = std::max(longest, s.length);
  if (p.pos_key.data || p.pos_query.data) return SlotMap(p.slots, longest);
  const std::vector<int32_t> one(2 * longest + 1);  // without a table nobody knows what a slot may be
  return SlotMap(one.data() + longest, longest);
}

// Runs f(b, first, count) for the positions of each row that are in no sequence. Sequences come in order.
template <class F>
void for_gaps(const Disentangled& p, const F& f) {
  size_t next = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    int64_t at = 0;
    for (; next < p.sequences.size() && p.sequences[next].b == b; ++next) {
      const Sequence& s = p.sequences[next];
      if (s.first > at) f(b, at, s.first - at);
      at = s.first + s.length;
    }
    if (at < p.S) f(b, at, p.S - at);
  }
}

void clear(const Disentangled& p, void* heads, int64_t b, int64_t first, int64_t count) {
  const int64_t position = p.H * p.D * bytes(p.type);
  if (count * position > 0)
    std::memset(static_cast<char*>(heads) + (b * p.S + first) * position, 0, count * position);
}

}  // namespace

template <class R>
void disentangled(const Disentangled& problem, const Attended<R>& results, const ParallelFor& parallel_for) {
  for_gaps(problem, [&](int64_t b, int64_t first, int64_t count) {
    clear(problem, results.out, b, first, count);
    for (int64_t h = 0; h < problem.H; ++h)
      std::fill_n(results.lse + (b * problem.H + h) * problem.S + first, count,
                  -std::numeric_limits<R>::infinity());
  });
  FASTSEQ_SELECT(attention::disentangled_forward<R>)(problem, map_of(problem), results, parallel_for);
}

template <class R>
void disentangled_grad(const Disentangled& problem, const DisentangledGradients<R>& gradients,
                       const ParallelFor& parallel_for) {
  for_gaps(problem, [&](int64_t b, int64_t first, int64_t count) {
    for (void* heads : {gradients.q, gradients.k, gradients.v}) clear(problem, heads, b, first, count);
  });
  const std::vector<double> zeros(problem.D);  // a row of any type
  DisentangledGradients<R> whole = gradients;
  if (!whole.grad_out.data) whole.grad_out = {zeros.data(), 0, 0, 0};
  FASTSEQ_SELECT(attention::disentangled_backward<R>)(problem, map_of(problem), whole, parallel_for);
}

template void disentangled<float>(const Disentangled&, const Attended<float>&, const ParallelFor&);
template void disentangled<double>(const Disentangled&, const Attended<double>&, const ParallelFor&);
template void disentangled_grad<float>(const Disentangled&, const DisentangledGradients<float>&,
                                       const ParallelFor&);
template void disentangled_grad<double>(const Disentangled&, const DisentangledGradients<double>&,
                                        const ParallelFor&);

}  // namespace fastseq::attention
