// bfloat16 and float16 in plain C++, and rows of a tensor of any float type read and written as doubles or
// floats. Rounding is to nearest even, NaN stays NaN. About 10 integer operations an element and no branch,
// so loops vectorise; a row reads its K elements once. Everything is `static`: each translation unit, hence
// each instruction set, has its own. What moves rows is inlined always: its wide instructions then stand in
// functions whose names tell the instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "../crf/crf.h"

namespace fastseq {

template <class To, class From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

static inline float bf16_to_float(uint16_t h) { return bits_as<float>(static_cast<uint32_t>(h) << 16); }

static inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = bits_as<uint32_t>(f);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan =
      (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity, or wrap it to zero
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded);
}

// The exponent is moved by a multiplication, which leaves infinities and NaN what they are; a subnormal is
// its mantissa placed behind 0.5, less 0.5, so that no float32 subnormal occurs and flush-to-zero modes do no
// harm.
static inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFF) << 16;
  const float normal = bits_as<float>((magnitude >> 3) + (224u << 23)) * 0x1p-112f;
  const float subnormal = bits_as<float>((magnitude >> 16) | (126u << 23)) - 0.5f;
  const uint32_t bits = bits_as<uint32_t>(magnitude < (0x400u << 16) ? subnormal : normal);
  return bits_as<float>(bits | (static_cast<uint32_t>(h & 0x8000) << 16));
}

// The addition of a power of two 2^13 times the result's last place rounds to nearest even at that place, for
// normal and subnormal results alike; its sum's mantissa, added to its exponent, carries as it must.
static inline uint16_t float_to_half(float f) {
  const uint32_t bits = bits_as<uint32_t>(f), magnitude = bits & 0x7FFFFFFF;
  const float overflowing = (bits_as<float>(magnitude) * 0x1p112f) * 0x1p-110f;  // infinity from 2^16 on
  const uint32_t exponent = magnitude & 0x7F800000;
  const uint32_t least = 0x38800000;  // 2^-14: below, the last place no longer shrinks
  const uint32_t place = (exponent < least ? least : exponent) + 0x07800000;
  const uint32_t sum = bits_as<uint32_t>(overflowing + bits_as<float>(place));
  const uint32_t rounded = ((sum >> 13) & 0x7C00) + (sum & 0x0FFF);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (magnitude > 0x7F800000 ? 0x7E00 : rounded));
}

namespace crf {

// out[k] = x[b, t, k], k < K, for R float or double.
template <class R>
__attribute__((always_inline)) static inline void load_row(const Emissions& x, int64_t b, int64_t t, R* out) {
  const int64_t at = b * x.stride_b + t * x.stride_t;
  const auto read = [&](const auto* row, auto convert) __attribute__((always_inline)) {
    for (int64_t k = 0; k < x.K; ++k) out[k] = static_cast<R>(convert(row[at + k]));
  };
  switch (x.type) {
    case Type::f64:
      return read(static_cast<const double*>(x.data), [](double v) { return v; });
    case Type::f32:
      return read(static_cast<const float*>(x.data), [](float v) { return v; });
    case Type::bf16:
      return read(static_cast<const uint16_t*>(x.data), bf16_to_float);
    case Type::f16:
      return read(static_cast<const uint16_t*>(x.data), half_to_float);
  }
}

// Element at+k of `data`, k < K, becomes from[k], in the type that `data` has.
template <class R>
__attribute__((always_inline)) static inline void store_row(Type type, void* data, int64_t at, int64_t K,
                                                            const R* from) {
  const auto write = [&](auto* row, auto convert) __attribute__((always_inline)) {
    for (int64_t k = 0; k < K; ++k) row[at + k] = convert(from[k]);
  };
  switch (type) {
    case Type::f64:
      return write(static_cast<double*>(data), [](R v) { return static_cast<double>(v); });
    case Type::f32:
      return write(static_cast<float*>(data), [](R v) { return static_cast<float>(v); });
    case Type::bf16:
      return write(static_cast<uint16_t*>(data), [](R v) { return float_to_bf16(static_cast<float>(v)); });
    case Type::f16:
      return write(static_cast<uint16_t*>(data), [](R v) { return float_to_half(static_cast<float>(v)); });
  }
}

}  // namespace crf
}  // namespace fastseq
