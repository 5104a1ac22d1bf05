// The words of each source, sorted: S log S comparisons a row of the batch.
#include <algorithm>
#include <utility>

#include "distribution.h"

namespace fastseq::pointer {

SourceWords::SourceWords(const int64_t* ids, int64_t B, int64_t S) : first{0} {
  std::vector<std::pair<int64_t, int32_t>> sorted;  // no two are equal: any sort gives this order
  for (int64_t b = 0; b < B; ++b) {
    sorted.clear();
    for (int64_t i = 0; i < S; ++i)
      if (ids[b * S + i] >= 0) sorted.emplace_back(ids[b * S + i], int32_t(i));
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 0; i < sorted.size(); ++i) {
      if (i == 0 || sorted[i].first != sorted[i - 1].first) {
        words.push_back(sorted[i].first);
        begin.push_back(int64_t(order.size()));
      }
      order.push_back(sorted[i].second);
    }
    first.push_back(int64_t(words.size()));
  }
  begin.push_back(int64_t(order.size()));  // where the last word ends
}

}  // namespace fastseq::pointer
