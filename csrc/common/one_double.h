// float64 behind the names of a vector of floats (simd.h), for code that is written once for both.
#pragma once
#include <cmath>

#include "simd.h"

namespace fastseq::FASTSEQ_ISA {

// Right, and as slow as std::exp.
struct OneDouble {
  static constexpr int W = 1;
  double v;
  static OneDouble set(double x) { return {x}; }
  static OneDouble load(const double* p) { return {*p}; }
  void store(double* p) const { *p = v; }
  friend OneDouble operator+(OneDouble a, OneDouble b) { return {a.v + b.v}; }
  friend OneDouble operator-(OneDouble a, OneDouble b) { return {a.v - b.v}; }
  friend OneDouble max(OneDouble a, OneDouble b) { return {a.v > b.v ? a.v : b.v}; }
  static OneDouble fma(OneDouble a, OneDouble b, OneDouble c) { return {a.v * b.v + c.v}; }
  static OneDouble exp_or_zero(OneDouble x) { return {std::exp(x.v)}; }
  friend double sum(OneDouble a) { return a.v; }
};

}  // namespace fastseq::FASTSEQ_ISA
