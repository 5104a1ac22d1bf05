// What the registrations of ops for CPUs share: torch's threads as a `ParallelFor`, the type of the
// arithmetic, and element types by name.
#pragma once
#include <functional>
#include <string>

#include "../crf/crf.h"
#include "torch_tensor.h"

namespace fastseq {

// (torch has a C function of the name torch_parallel_for.)
inline void torch_threads(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, n, 1, f);
}

// Calls f(R{}) with the type of the arithmetic: double where t is float64, else float.
template <class F>
auto with_arithmetic(const Tensor& t, const F& f) {
  return t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// The element type of the argument `name`.
inline crf::Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return crf::Type::f64;
    case ScalarType::Float:
      return crf::Type::f32;
    case ScalarType::BFloat16:
      return crf::Type::bf16;
    case ScalarType::Half:
      return crf::Type::f16;
    default:
      throw std::runtime_error(std::string("fastseq: ") + name +
                               ": wanted float64, float32, bfloat16 or float16");
  }
}

}  // namespace fastseq
