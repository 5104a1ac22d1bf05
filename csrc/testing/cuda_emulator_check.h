// What the tests of the emulator share: its schedules in turn.
#pragma once
#include <functional>
#include <vector>

#include "common/cuda.h"
#include "testing/check.h"

namespace fastseq::testing {

using namespace fastseq::cuda;
using emulator::kAddressSanitizer;
using emulator::kThreadSanitizer;
using emulator::Schedule;

inline const std::vector<Schedule> kSchedules = {Schedule::in_order, Schedule::random, Schedule::warp_first,
                                                 Schedule::mixed};

// Calls f under several seeds of each schedule.
inline void for_schedules(int seeds, const std::function<void()>& f) {
  for (Schedule schedule : kSchedules)
    for (int seed = 0; seed < (schedule == Schedule::in_order ? 1 : seeds); ++seed) {
      emulator::settings().schedule = schedule;
      emulator::settings().seed = seed;
      f();
    }
  emulator::settings() = {};
}

inline int seeds() { return kThreadSanitizer ? 2 : 10; }

__global__ inline void write_shared(int at) {
  FASTSEQ_DYNAMIC_SHARED(volatile int, shared);
  if (threadIdx.x == 0) shared[at] = 1;
}

}  // namespace fastseq::testing
