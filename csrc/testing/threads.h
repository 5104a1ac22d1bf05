// A ParallelFor with threads of its own, for the C++ tests.
#pragma once
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace fastseq::testing {

// `count` ranges on `count` threads, the last started first: as different from the serial order as can be.
inline ParallelFor threads(int count) {
  return [count](int64_t n, const std::function<void(int64_t, int64_t)>& f) {
    std::vector<std::thread> pool;
    for (int i = count - 1; i >= 0; --i)
      pool.emplace_back([=, &f] { f(n * i / count, n * (i + 1) / count); });
    for (std::thread& thread : pool) thread.join();
  };
}

}  // namespace fastseq::testing
