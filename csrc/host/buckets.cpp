#include "host/buckets.h"

#include <algorithm>
#include <numeric>

namespace fastseq {
namespace {

// splitmix64's output function and increment: a good 64-bit hash of a counter, and as easy to write in numpy.
constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// 0 ... n-1 in an order that depends on the seed and the stream only.
std::vector<int64_t> shuffled(int64_t n, uint64_t seed, uint64_t stream) {
  const uint64_t start = mix(seed + (stream + 1) * kGamma);
  std::vector<uint64_t> key(n);
  for (int64_t i = 0; i < n; ++i) key[i] = mix(start + (uint64_t(i) + 1) * kGamma);
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  return order;
}

// Where the one batch that is not full goes: the place, in full batches before it, that pads least. `sorted`
// ascends.
int64_t place_of_remainder(const std::vector<int64_t>& sorted, int64_t batch_size) {
  const int64_t n = int64_t(sorted.size()), full = n / batch_size, rest = n % batch_size;
  // Moving it one place up turns [rest][batch] into [batch][rest]: only these two batches' longest sequences
  // change.
  int64_t best = 0, cost = 0, least = 0;
  for (int64_t j = 0; j < full; ++j) {
    const int64_t begin = j * batch_size;
    const int64_t end = sorted[begin + batch_size + rest - 1];
    cost += batch_size * (sorted[begin + batch_size - 1] - end) + rest * (end - sorted[begin + rest - 1]);
    if (cost < least) best = j + 1, least = cost;
  }
  return best;
}

void cut_by_count(const std::vector<int64_t>& sorted, int64_t batch_size, std::vector<int64_t>& sizes) {
  const int64_t full = int64_t(sorted.size()) / batch_size, rest = int64_t(sorted.size()) % batch_size;
  const int64_t place = rest == 0 ? -1 : place_of_remainder(sorted, batch_size);
  for (int64_t j = 0; j <= full; ++j) {
    if (j == place) sizes.push_back(rest);
    if (j < full) sizes.push_back(batch_size);
  }
}

void cut_by_tokens(const std::vector<int64_t>& sorted, int64_t batch_size, int64_t max_tokens,
                   std::vector<int64_t>& sizes) {
  int64_t size = 0;
  for (int64_t length : sorted) {
    const bool full = (batch_size > 0 && size == batch_size) || (size + 1) * length > max_tokens;
    if (size > 0 && full) {
      sizes.push_back(size);
      size = 0;
    }
    ++size;
  }
  if (size > 0) sizes.push_back(size);
}

}  // namespace

Plan bucket_plan(const int64_t* lengths, int64_t n, int64_t batch_size, int64_t max_tokens, uint64_t seed,
                 bool drop_last, int64_t window) {
  std::vector<int64_t> order = shuffled(n, seed, 0);
  if (drop_last) order.resize(n - n % batch_size);
  const auto total = int64_t(order.size());

  std::vector<int64_t> sizes, sorted;
  for (int64_t begin = 0; begin < total; begin += window) {
    const int64_t end = std::min(total, begin + window);
    std::stable_sort(order.begin() + begin, order.begin() + end,
                     [&](int64_t a, int64_t b) { return lengths[a] < lengths[b]; });
    sorted.clear();
    for (int64_t i = begin; i < end; ++i) sorted.push_back(lengths[order[i]]);
    if (max_tokens > 0)
      cut_by_tokens(sorted, batch_size, max_tokens, sizes);
    else
      cut_by_count(sorted, batch_size, sizes);
  }

  std::vector<int64_t> starts(sizes.size());
  std::exclusive_scan(sizes.begin(), sizes.end(), starts.begin(), int64_t{0});
  Plan plan;
  plan.order.reserve(total);
  plan.offsets.reserve(sizes.size() + 1);
  plan.offsets.push_back(0);
  for (int64_t j : shuffled(int64_t(sizes.size()), seed, 1)) {
    plan.order.insert(plan.order.end(), order.begin() + starts[j], order.begin() + starts[j] + sizes[j]);
    plan.offsets.push_back(int64_t(plan.order.size()));
  }
  return plan;
}

}  // namespace fastseq
