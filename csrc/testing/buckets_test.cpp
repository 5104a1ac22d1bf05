// Plans hold every index once and respect their limits, and equal seeds give equal plans.
#include "host/buckets.h"

#include <algorithm>
#include <random>

#include "testing/check.h"

using fastseq::bucket_plan;
using fastseq::Plan;

namespace {

void check_plan(const std::vector<int64_t>& lengths, int64_t batch_size, int64_t max_tokens, bool drop_last,
                int64_t window) {
  const auto n = int64_t(lengths.size());
  const Plan plan = bucket_plan(lengths.data(), n, batch_size, max_tokens, 7, drop_last, window);
  const Plan again = bucket_plan(lengths.data(), n, batch_size, max_tokens, 7, drop_last, window);
  CHECK(plan.order == again.order && plan.offsets == again.offsets);

  std::vector<int64_t> seen = plan.order;
  std::sort(seen.begin(), seen.end());
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
  CHECK(int64_t(seen.size()) == (drop_last ? n - n % batch_size : n));
  CHECK(seen.empty() || (seen.front() >= 0 && seen.back() < n));

  CHECK(plan.offsets.front() == 0 && plan.offsets.back() == int64_t(plan.order.size()));
  for (size_t i = 0; i + 1 < plan.offsets.size(); ++i) {
    const int64_t size = plan.offsets[i + 1] - plan.offsets[i];
    int64_t longest = 0;
    for (int64_t j = plan.offsets[i]; j < plan.offsets[i + 1]; ++j)
      longest = std::max(longest, lengths[plan.order[j]]);
    CHECK(size > 0);
    CHECK(batch_size == 0 || size <= batch_size);
    CHECK(max_tokens == 0 || size * longest <= max_tokens);
    CHECK(!drop_last || size == batch_size);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int64_t n : {0, 1, 2, 7, 64, 1000}) {
    std::vector<int64_t> lengths(n);
    for (int64_t& length : lengths) length = random() % 50;
    for (int64_t window : {1, 10, 100000}) {
      for (int64_t batch_size : {1, 3, 8, 2000}) {
        check_plan(lengths, batch_size, 0, false, window * batch_size);
        check_plan(lengths, batch_size, 0, true, window * batch_size);
        check_plan(lengths, batch_size, 64, false, window * batch_size);
      }
      check_plan(lengths, 0, 64, false, window);
    }
  }
  return fastseq::testing::summary("buckets");
}
