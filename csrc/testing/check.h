// The little that the C++ tests need: checks that say where and what, and a summary that ctest reads by exit
// status.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "common/cpu_features.h"

namespace fastseq::testing {

inline int& failures() {
  static int count = 0;
  return count;
}

// A crash must not take with it what was said before.
inline const bool says_at_once = std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ) == 0;

// What is being checked, for the messages: a test of many cases sets it in each.
inline std::string& context() {
  static std::string text;
  return text;
}

// Relative to b where b is large. An infinity is close to itself alone, as is NaN.
inline bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

// Counts a failure, and says whether to print it: of one case the first few, as what is broken fails a
// thousand times.
inline bool report(const char* file, int line) {
  static std::string last;
  static int printed = 0, printed_here = 0;
  ++failures();
  if (last != context()) last = context(), printed_here = 0;
  if (printed >= 60 || printed_here >= 3) return false;
  ++printed, ++printed_here;
  std::printf("%s:%d: %s: ", file, line, context().c_str());
  return true;
}

inline int summary(const char* what) {
  std::printf("%s (%s): %s, %d failed\n", what, name(chosen_isa()), failures() ? "FAILED" : "ok", failures());
  return failures() != 0;
}

}  // namespace fastseq::testing

#define CHECK(condition)                                                                                     \
  do {                                                                                                       \
    if (!(condition) && ::fastseq::testing::report(__FILE__, __LINE__)) std::printf("not %s\n", #condition); \
  } while (false)

#define CHECK_CLOSE(a, b, tolerance)                                                                     \
  do {                                                                                                   \
    const double a_ = (a), b_ = (b);                                                                     \
    if (!::fastseq::testing::close(a_, b_, tolerance) && ::fastseq::testing::report(__FILE__, __LINE__)) \
      std::printf("%s is %.9g, wanted %s = %.9g\n", #a, a_, #b, b_);                                     \
  } while (false)

// At the start of main: ctest sets FASTSEQ_ISA, and takes 77 for "skipped" where this CPU cannot run it.
#define SKIP_UNLESS_ISA_IS_AS_ASKED()                              \
  do {                                                             \
    const char* asked = std::getenv("FASTSEQ_ISA");                \
    if (asked != nullptr && !::fastseq::set_isa(asked)) return 77; \
  } while (false)
