// Work in phases, each of which needs all of the one before: one parallel_for for a whole recurrence, where
// one for each phase would cost microseconds each. A phase costs some 100 ns.
//
// There is no barrier, since nobody promises how many of the ranges that parallel_for was asked for run at
// the same time. Whoever is free takes the next ticket. Its task waits until all tasks of the phases before
// have ended, and those are in the hands of threads that run: the earliest of them waits for nothing. So one
// thread alone comes to the end, and so does any number.
#pragma once
#include <thread>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "parallel.h"

namespace fastseq {

// Waits until `done` is at least `wanted`: at first without a system call, for as long as a phase may take.
static inline void wait_for(const std::atomic<int64_t>& done, int64_t wanted) {
  for (int spins = 0; done.load(std::memory_order_acquire) < wanted; ++spins) {
    if (spins > 4000) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#endif
  }
}

// Runs task(phase, i) for every phase < phases and i < count(phase); what one phase writes, the later ones
// may read. What a task computes must not depend on the thread that runs it. Tasks must not throw.
template <class Count, class Task>
void run_phases(const ParallelFor& parallel_for, int64_t phases, const Count& count, const Task& task) {
  int64_t widest = 0;
  for (int64_t phase = 0; phase < phases; ++phase) widest = count(phase) > widest ? count(phase) : widest;
  if (widest == 0) return;
  struct Counter {
    alignas(64) std::atomic<int64_t> value{0};
  } next, done;
  parallel_for(widest, [&](int64_t, int64_t) {
    int64_t phase = 0, begin = 0, end = count(0);  // the tickets of this phase
    while (true) {
      const int64_t ticket = next.value.fetch_add(1, std::memory_order_relaxed);
      while (ticket >= end) {
        if (++phase == phases) return;
        begin = end;
        end += count(phase);
      }
      wait_for(done.value, begin);
      task(phase, ticket - begin);
      done.value.fetch_add(1, std::memory_order_release);
    }
  });
}

}  // namespace fastseq
