// half.h: every 16-bit value there and back, and rounding to nearest even of many floats.
#include "common/half.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "testing/check.h"

namespace {

using namespace fastseq;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double half_value(uint32_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? kNaN : sign * kInf;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// Nearest to f, and even between two: `next` is the value after the largest, had the exponent not ended.
template <class Value>
bool nearest_even(double f, uint16_t h, uint16_t infinity, double next, Value value) {
  const auto at = [&](uint32_t m) { return m >= infinity ? next : std::abs(value(m)); };
  const uint32_t m = h & 0x7FFF;
  if (m > infinity || std::signbit(f) != (h >> 15)) return false;
  const double a = std::min(std::abs(f), next), here = std::abs(a - at(m));
  const double down = m > 0 ? std::abs(a - at(m - 1)) : kInf,
               up = m < infinity ? std::abs(a - at(m + 1)) : kInf;
  return here <= down && here <= up && (m % 2 == 0 || (here < down && here < up));
}

void test_halves() {
  const auto bf16_value = [](uint32_t h) {
    return static_cast<double>(bf16_to_float(static_cast<uint16_t>(h)));
  };
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const double value = half_to_float(bits), want = half_value(h);
    CHECK(std::isnan(want) ? std::isnan(value) : value == want && std::signbit(value) == (h >> 15));
    if (!std::isnan(want)) CHECK(float_to_half(half_to_float(bits)) == h);
    if (!std::isnan(bf16_value(h))) CHECK(float_to_bf16(bf16_to_float(bits)) == h);
    if (std::isnan(bf16_value(h))) CHECK(std::isnan(bf16_value(float_to_bf16(bf16_to_float(bits)))));
  }
  std::mt19937 random(3);
  for (int i = 0; i < 300000; ++i) {
    uint32_t bits = random();
    if (i % 3 == 0) bits &= 0xFFFFE000u >> (i % 4);                       // exact values and halfway cases
    if (i % 2 == 0) bits = (bits & 0x81FFFFFF) | (0x37u + i % 18) << 24;  // the exponents of float16
    const float f = bits_as<float>(bits);
    if (std::isnan(f)) {
      CHECK(std::isnan(half_to_float(float_to_half(f))) && std::isnan(bf16_to_float(float_to_bf16(f))));
      continue;
    }
    CHECK(nearest_even(f, float_to_half(f), 0x7C00, 65536.0, half_value));
    CHECK(nearest_even(f, float_to_bf16(f), 0x7F80, 0x1p128, bf16_value));
  }
}

}  // namespace

int main() {
  test_halves();
  return testing::summary("half");
}
