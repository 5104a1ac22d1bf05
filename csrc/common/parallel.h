// How a kernel asks for threads without knowing about torch: the caller hands in a `ParallelFor`.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace fastseq {

// parallel_for(n, f) runs f(begin, end) over disjoint ranges that cover [0, n), on as many threads as the
// host allows.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>&)>;

inline void serial_for(int64_t n, const std::function<void(int64_t, int64_t)>& f) { f(0, n); }

// Runs task(0) ... task(n-1), each once, in increasing order of their start: whichever thread is free takes
// the next, so that one which was late to wake up leaves its share to the others. What a task computes must
// not depend on the thread that runs it: results are then the same for any thread count.
template <class Task>
void run_tasks(const ParallelFor& parallel_for, int64_t n, const Task& task) {
  if (n == 0) return;
  std::atomic<int64_t> next{0};
  parallel_for(n, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(i);
  });
}

}  // namespace fastseq
