// phases.h: every task once, and none before all of the phase before have ended, for more, fewer and no
// threads at a time. Under the thread sanitizer: what one phase writes, the next may read.
#include "common/phases.h"

#include <vector>

#include "testing/check.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;

// Each cell of a phase is made of all cells of the phase before.
void test_phases(const char* name, const ParallelFor& parallel) {
  testing::context() = name;
  constexpr int64_t kPhases = 300;
  const auto count = [](int64_t phase) { return phase % 7 == 3 ? int64_t(0) : 1 + phase * 5 % 9; };
  std::vector<std::vector<uint64_t>> cells(kPhases);
  std::vector<std::vector<int>> runs(kPhases);
  for (int64_t p = 0; p < kPhases; ++p) cells[p].resize(count(p)), runs[p].resize(count(p));
  const auto before = [&](int64_t phase) {
    uint64_t sum = 1;
    for (int64_t p = phase - 1; p >= 0 && p >= phase - 2; --p)
      for (const uint64_t cell : cells[p]) sum = sum * 31 + cell;
    return sum;
  };
  run_phases(parallel, kPhases, count, [&](int64_t phase, int64_t i) {
    cells[phase][i] = before(phase) + uint64_t(i);
    ++runs[phase][i];
  });
  for (int64_t p = 0; p < kPhases; ++p)
    for (int64_t i = 0; i < count(p); ++i) CHECK(runs[p][i] == 1 && cells[p][i] == before(p) + uint64_t(i));
}

// As torch does it inside another parallel region: the ranges one after another, on one thread.
void one_after_another(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t i = 0; i < n; ++i) f(i, i + 1);
}

void test_nothing_to_do() {
  testing::context() = "nothing to do";
  int runs = 0;
  const auto run = [&](int64_t, int64_t) { ++runs; };
  run_phases(serial_for, 0, [](int64_t) { return int64_t(3); }, run);
  run_phases(serial_for, 5, [](int64_t) { return int64_t(0); }, run);
  CHECK(runs == 0);
}

}  // namespace

int main() {
  test_phases("serial", serial_for);
  test_phases("one after another", one_after_another);
  for (const int threads : {2, 3, 9}) test_phases("threads", testing::threads(threads));
  test_nothing_to_do();
  return testing::summary("phases");
}
