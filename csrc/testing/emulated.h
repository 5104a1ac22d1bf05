// How a test of kernels in the emulator runs: what the emulator throws is a failure, and says where.
#pragma once
#include <cstdio>
#include <exception>

#include "testing/check.h"

namespace fastseq::testing {

// The exit status of a test `name`, which is `run_all()`.
template <class F>
int run_emulated(const char* name, const F& run_all) {
  try {
    run_all();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", context().c_str(), error.what());
    return 1;
  }
  return summary(name);
}

}  // namespace fastseq::testing
