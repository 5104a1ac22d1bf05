// One row of logits in pieces that stay in the nearest cache, and the softmax over it in one pass.
#pragma once
#include <algorithm>
#include <cmath>

#include "../common/half.h"
#include "../common/simd.h"
#include "../crf/log_domain.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int64_t kPiece = 1024;

// exp(x) for x <= 0, about 1 ulp (Cephes expf), subnormal where the result is, and 0 below; NaN stays NaN. No
// branch, so loops over it vectorise.
static FASTSEQ_INLINE float exp_fast(float x) {
  x = x < -104.f ? -104.f : x;
  constexpr float shift = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500E-4f;
  p = p * r + 1.3981999507E-3f;
  p = p * r + 8.3334519073E-3f;
  p = p * r + 4.1665795894E-2f;
  p = p * r + 1.6666665459E-1f;
  p = p * r + 5.0000001201E-1f;
  p = p * (r * r) + (r + 1.f);
  // 2^n as two factors: each has an exponent, even where their product has none.
  const int32_t power = int32_t(bits_as<uint32_t>(shifted) - bits_as<uint32_t>(shift)), half = power >> 1;
  const float a = bits_as<float>(uint32_t(half + 127) << 23);
  return p * a * bits_as<float>(uint32_t(power - half + 127) << 23);
}

// The greatest element, NaN left aside; -inf of none.
static inline float greatest(const float* x, int64_t n) {
  Wide top = Wide::set(-INFINITY);
  int64_t i = 0;
  for (; i + Wide::W <= n; i += Wide::W) top = max(Wide::load(x + i), top);
  float result = largest(top);
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}
static inline double greatest(const double* x, int64_t n) {
  double result = -INFINITY;
  for (int64_t i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// sum_i x_i y_i, or sum_i x_i where y is null.
static inline double sum_of(const float* x, const float* y, int64_t n) {
  Wide total = Wide::set(0);
  int64_t i = 0;
  if (y)
    for (; i + Wide::W <= n; i += Wide::W) total = Wide::fma(Wide::load(x + i), Wide::load(y + i), total);
  else
    for (; i + Wide::W <= n; i += Wide::W) total = total + Wide::load(x + i);
  double result = double(sum(total));
  for (; i < n; ++i) result += double(x[i]) * (y ? double(y[i]) : 1.0);
  return result;
}
static inline double sum_of(const double* x, const double* y, int64_t n) {
  double result = 0;
  for (int64_t i = 0; i < n; ++i) result += y ? x[i] * y[i] : x[i];
  return result;
}

// Logits (b, t, :) plus a bias, if there is one, as R.
template <class R>
class LogitRow {
 public:
  LogitRow(const crf::Emissions& logits, int64_t b, int64_t t, const R* bias = nullptr)
      : logits_(logits), at_(b * logits.stride_b + t * logits.stride_t), bias_(bias) {}

  int64_t size() const { return logits_.K; }

  // Elements begin ... begin + size - 1: where they lie, or in `piece`.
  const R* piece(int64_t begin, int64_t size, R* piece) const {
    constexpr crf::Type same = sizeof(R) == 8 ? crf::Type::f64 : crf::Type::f32;
    if (logits_.type == same && bias_ == nullptr) return static_cast<const R*>(logits_.data) + at_ + begin;
    crf::Emissions part = logits_;
    part.K = size, part.stride_b = 1, part.stride_t = 0;
    crf::load_row(part, at_ + begin, 0, piece);
    if (bias_)
      for (int64_t i = 0; i < size; ++i) piece[i] += bias_[begin + i];
    return piece;
  }

  // out[i] = exp(element begin + i - shift), i < size.
  void powers(int64_t begin, int64_t size, R shift, R* out) const {
    const R* z = piece(begin, size, out);
    for (int64_t i = 0; i < size; ++i) out[i] = exp_fast(z[i] - shift);
  }

  R operator[](int64_t v) const {
    R z;
    return *piece(v, 1, &z);
  }

 private:
  crf::Emissions logits_;
  int64_t at_;
  const R* bias_;
};

// softmax(z)_v = exp(z_v - shift) / total. A row with NaN or +inf has a total of NaN, one of -inf alone has
// 0.
template <class R>
struct Softmax {
  R shift;
  double total, dot;  // dot = sum_v exp(z_v - shift) grad_v
};

// Goes through a row once, and shows each piece to look(begin, size, z).
template <class R, class Look>
static inline Softmax<R> sum_up(const LogitRow<R>& row, const Look& look, const R* grad = nullptr) {
  R buffer[kPiece], powers[kPiece], top = -INFINITY;
  Softmax<R> result{0, 0, 0};
  for (int64_t begin = 0; begin < row.size(); begin += kPiece) {
    const int64_t size = std::min(kPiece, row.size() - begin);
    const R* z = row.piece(begin, size, buffer);
    look(begin, size, z);
    if (const R here = greatest(z, size); here > top) {
      const double less = std::exp(double(top) - double(here));
      result.total *= less, result.dot *= less;
      result.shift = top = here;
    }
    for (int64_t i = 0; i < size; ++i) powers[i] = exp_fast(z[i] - result.shift);
    result.total += sum_of(powers, static_cast<const R*>(nullptr), size);
    if (grad) result.dot += sum_of(powers, grad + begin, size);
  }
  return result;
}

}  // namespace fastseq::FASTSEQ_ISA
