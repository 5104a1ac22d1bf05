// The little that the C++ tests need: a check that says where and what, and a summary that ctest reads by
// exit status.
#pragma once
#include <cmath>
#include <cstdio>

#include "common/cpu_features.h"

namespace fastseq::testing {

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

inline int summary(const char* what) {
  std::printf("%s (%s): %s, %d failed\n", what, name(chosen_isa()), failures() ? "FAILED" : "ok", failures());
  return failures() != 0;
}

}  // namespace fastseq::testing

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++::fastseq::testing::failures();                                   \
    }                                                                     \
  } while (false)

#define CHECK_CLOSE(a, b, tolerance)                                                            \
  do {                                                                                          \
    const double a_ = (a), b_ = (b);                                                            \
    if (!::fastseq::testing::close(a_, b_, tolerance)) {                                        \
      std::printf("%s:%d: %s is %.9g, wanted %s = %.9g\n", __FILE__, __LINE__, #a, a_, #b, b_); \
      ++::fastseq::testing::failures();                                                         \
    }                                                                                           \
  } while (false)

// At the start of main: ctest sets FASTSEQ_ISA, and takes 77 for "skipped" where this CPU cannot run it.
#define SKIP_UNLESS_ISA_IS_AS_ASKED()                              \
  do {                                                             \
    const char* asked = std::getenv("FASTSEQ_ISA");                \
    if (asked != nullptr && !::fastseq::set_isa(asked)) return 77; \
  } while (false)
