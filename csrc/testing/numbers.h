// Numbers of any type as tests keep them, in float64, and as kernels have them in memory; and how near they
// must be.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/half.h"
#include "crf/crf.h"
#include "testing/check.h"
#include "testing/memory.h"

namespace fastseq::testing {

using crf::Type;

inline Memory<char> stored(const std::vector<double>& from, Type type) {
  Memory<char> out(int64_t(from.size()) * bytes(type));
  crf::store_row(type, out.data(), 0, int64_t(from.size()), from.data());
  return out;
}

inline std::vector<double> loaded(const Memory<char>& from, Type type) {
  const int64_t n = from.size() / bytes(type);
  std::vector<double> out(n);
  crf::load_row({from.data(), type, 1, 1, n, 0, 0}, 0, 0, out.data());
  return out;
}

// `close`, or near relative to the largest number.
inline void check_near(const char* what, const std::vector<double>& got, const std::vector<double>& want,
                       double tolerance) {
  CHECK(got.size() == want.size());
  double size = 0;
  for (const double x : want)
    if (std::isfinite(x)) size = std::max(size, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    if (close(got[i], want[i], tolerance)) continue;
    if (std::isfinite(want[i]) && std::fabs(got[i] - want[i]) <= tolerance * size) continue;
    if (report(__FILE__, __LINE__)) std::printf("%s[%zu] is %.9g, wanted %.9g\n", what, i, got[i], want[i]);
  }
}

}  // namespace fastseq::testing
