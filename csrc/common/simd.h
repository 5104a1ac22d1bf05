// One vector-of-floats type per width, with the few operations that the kernels need. A translation unit is
// compiled once per instruction set (FASTSEQ_ISA): `Wide` is the widest type there, `Narrow` the one for
// lanes that are sequences, of which a batch has few: 8 lanes were never slower than 16 (and 1.5 times faster
// at K = 9 on a Zen 4). Every name is inside the namespace of the instruction set, so that no inline function
// of one variant can be linked into another.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))

namespace fastseq::FASTSEQ_ISA {

// Below this exponent, 2^-90, a scaled quantity is not trusted: exp_or_zero gives exactly 0, and the kernels
// look closer.
constexpr float kTiny = 8.077935669463161e-28f;  // 2^-90
constexpr float kLogTiny = -62.383246250395075f;

// 2^x = poly(x - n) 2^n with n the integer nearest to x; the polynomial, fitted to the least relative error
// (9e-8).
constexpr float kExp2[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 0.240222424f, 0.693147004f, 1.f};
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits hold

// Portable lanes: the compiler turns the loops into whatever the baseline has. R is float, or double where
// accuracy is all that counts.
template <int N, class R = float>
struct Lanes {
  static constexpr int W = N;
  using Scalar = R;
  R v[N];
  template <class F>
  static FASTSEQ_INLINE Lanes make(F f) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = f(i);
    return r;
  }
  static FASTSEQ_INLINE Lanes set(R x) {
    return make([&](int) { return x; });
  }
  static FASTSEQ_INLINE Lanes load(const R* p) {
    return make([&](int i) { return p[i]; });
  }
  FASTSEQ_INLINE void store(R* p) const { std::memcpy(p, v, sizeof v); }
  // The first n < W lanes, and nothing else, are read or written; the lanes not read are 0.
  static FASTSEQ_INLINE Lanes load(const R* p, int64_t n) {
    Lanes r = set(0);
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  FASTSEQ_INLINE void store(R* p, int64_t n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  friend FASTSEQ_INLINE Lanes operator+(Lanes a, Lanes b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend FASTSEQ_INLINE Lanes operator-(Lanes a, Lanes b) {
    return make([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend FASTSEQ_INLINE Lanes operator*(Lanes a, Lanes b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend FASTSEQ_INLINE Lanes operator/(Lanes a, Lanes b) {
    return make([&](int i) { return a.v[i] / b.v[i]; });
  }
  // a where a > b, else b: of a NaN and a number, b.
  friend FASTSEQ_INLINE Lanes max(Lanes a, Lanes b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static FASTSEQ_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  // Bit i: not (a[i] >= b[i]), so that NaN counts.
  static FASTSEQ_INLINE uint32_t not_ge(Lanes a, Lanes b) {
    uint32_t m = 0;
    for (int i = 0; i < N; ++i) m |= uint32_t(!(a.v[i] >= b.v[i])) << i;
    return m;
  }
  static FASTSEQ_INLINE Lanes where_positive(Lanes a, Lanes x) {
    return make([&](int i) { return a.v[i] > 0 ? x.v[i] : R(0); });
  }
  // x where a < b, else y.
  static FASTSEQ_INLINE Lanes where_less(Lanes a, Lanes b, Lanes x, Lanes y) {
    return make([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
  }
  // x * 2^n for integers n in [-252, 252]; infinity, 0 and what lies between 0 and FLT_MIN come out right.
  static FASTSEQ_INLINE Lanes scale(Lanes x, Lanes n) {
    return make([&](int i) {
      const int32_t e = int32_t(n.v[i] == n.v[i] ? n.v[i] : R(0)), half = e >> 1;
      const int32_t bits[2] = {(half + 127) << 23, (e - half + 127) << 23};
      float power[2];
      std::memcpy(power, bits, sizeof power);
      return x.v[i] * power[0] * power[1];
    });
  }
  static FASTSEQ_INLINE Lanes round(Lanes x) {
    return make([&](int i) { return x.v[i] + kRound - kRound; });
  }
  // 1 / (1 + 2^x), with an absolute error of 1e-7 (R = double: 1e-16), for any x.
  static FASTSEQ_INLINE Lanes one_over_one_plus_exp2(Lanes x) {
    if constexpr (sizeof(R) == 8) {
      return make([&](int i) { return 1 / (1 + std::exp2(x.v[i])); });
    } else {
      return make([&](int i) {
        const float low = x.v[i] < -126.f ? -126.f : x.v[i], y = low > 126.f ? 126.f : low;
        const float shifted = y + kRound, r = y - (shifted - kRound);
        float p = kExp2[0];
        for (int k = 1; k < 6; ++k) p = p * r + kExp2[k];
        int32_t bits, up;
        std::memcpy(&bits, &p, 4);
        std::memcpy(&up, &shifted, 4);
        bits = int32_t(uint32_t(bits) + (uint32_t(up) << 23));
        std::memcpy(&p, &bits, 4);
        return y != y ? y : 1 / (1 + p);
      });
    }
  }
  // exp(x) for x <= 0; exactly 0 where x < log 2^-90; NaN stays. About 1 ulp (Cephes expf).
  static FASTSEQ_INLINE Lanes exp_or_zero(Lanes x) {
    return make([&](int i) {
      const float n = std::nearbyint(x.v[i] * 1.44269504088896341f);
      float r = x.v[i] - n * 0.693359375f;
      r = r + n * 2.12194440e-4f;
      float p = 1.9875691500E-4f;
      p = p * r + 1.3981999507E-3f;
      p = p * r + 8.3334519073E-3f;
      p = p * r + 4.1665795894E-2f;
      p = p * r + 1.6666665459E-1f;
      p = p * r + 5.0000001201E-1f;
      p = p * (r * r) + (r + 1.f);
      const float clamped = n < -126.f ? -126.f : n;
      const int32_t bits = (int32_t(clamped == clamped ? clamped : 0.f) + 127) << 23;
      float scale;
      std::memcpy(&scale, &bits, 4);
      return x.v[i] < kLogTiny ? 0.f : p * scale;
    });
  }
  friend FASTSEQ_INLINE R sum(Lanes a) {
    R s[N];
    std::memcpy(s, a.v, sizeof s);
    for (int h = N / 2; h; h /= 2)
      for (int i = 0; i < h; ++i) s[i] += s[i + h];
    return s[0];
  }
  friend FASTSEQ_INLINE R largest(Lanes a) {
    R m = a.v[0];
    for (int i = 1; i < N; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }
};

#ifdef __AVX2__
struct Lanes8 {
  static constexpr int W = 8;
  using Scalar = float;
  __m256 v;
  static FASTSEQ_INLINE Lanes8 set(float x) { return {_mm256_set1_ps(x)}; }
  static FASTSEQ_INLINE Lanes8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FASTSEQ_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  static FASTSEQ_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTSEQ_INLINE Lanes8 load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  FASTSEQ_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  friend FASTSEQ_INLINE Lanes8 operator+(Lanes8 a, Lanes8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes8 operator-(Lanes8 a, Lanes8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes8 operator*(Lanes8 a, Lanes8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes8 operator/(Lanes8 a, Lanes8 b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes8 max(Lanes8 a, Lanes8 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static FASTSEQ_INLINE Lanes8 fma(Lanes8 a, Lanes8 b, Lanes8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static FASTSEQ_INLINE uint32_t not_ge(Lanes8 a, Lanes8 b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NGE_UQ)));
  }
  static FASTSEQ_INLINE Lanes8 where_positive(Lanes8 a, Lanes8 x) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ), x.v)};
  }
  static FASTSEQ_INLINE Lanes8 where_less(Lanes8 a, Lanes8 b, Lanes8 x, Lanes8 y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  static FASTSEQ_INLINE Lanes8 round(Lanes8 x) {
    return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static FASTSEQ_INLINE Lanes8 scale(Lanes8 x, Lanes8 n) {
#ifdef __AVX512VL__
    return {_mm256_scalef_ps(x.v, n.v)};
#else
    const __m256i e = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
    const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
    return {_mm256_mul_ps(_mm256_mul_ps(x.v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b))};
#endif
  }
  static FASTSEQ_INLINE Lanes8 one_over_one_plus_exp2(Lanes8 x) {
    // The variable comes second: of a number and a NaN, these return the second.
    const __m256 y = _mm256_min_ps(_mm256_set1_ps(126.f), _mm256_max_ps(_mm256_set1_ps(-126.f), x.v));
    const __m256 shifted = _mm256_add_ps(y, _mm256_set1_ps(kRound));
    const __m256 r = _mm256_sub_ps(y, _mm256_sub_ps(shifted, _mm256_set1_ps(kRound)));
    __m256 p = _mm256_set1_ps(kExp2[0]);
    for (int k = 1; k < 6; ++k) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp2[k]));
    const __m256i up = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), up));
    const __m256 one = _mm256_set1_ps(1.f);
    // p of NaN is NaN, but its bits plus an exponent need not be: NaN is added back.
    return {_mm256_div_ps(one, _mm256_add_ps(_mm256_add_ps(power, one), _mm256_sub_ps(y, y)))};
  }
  static FASTSEQ_INLINE Lanes8 exp_or_zero(Lanes8 x) {
    const __m256 keep = _mm256_cmp_ps(x.v, _mm256_set1_ps(kLogTiny), _CMP_NLT_UQ);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x.v, _mm256_set1_ps(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x.v);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500E-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507E-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073E-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894E-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459E-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201E-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.f)));
#ifdef __AVX512VL__
    return {_mm256_and_ps(keep, _mm256_scalef_ps(p, n))};
#else
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return {_mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(e)))};
#endif
  }
  friend FASTSEQ_INLINE float sum(Lanes8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  friend FASTSEQ_INLINE float largest(Lanes8 a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};
#endif

#ifdef __AVX512F__
struct Lanes16 {
  static constexpr int W = 16;
  using Scalar = float;
  __m512 v;
  static FASTSEQ_INLINE Lanes16 set(float x) { return {_mm512_set1_ps(x)}; }
  static FASTSEQ_INLINE Lanes16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FASTSEQ_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  static FASTSEQ_INLINE __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
  static FASTSEQ_INLINE Lanes16 load(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  FASTSEQ_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  friend FASTSEQ_INLINE Lanes16 operator+(Lanes16 a, Lanes16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes16 operator-(Lanes16 a, Lanes16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes16 operator*(Lanes16 a, Lanes16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes16 operator/(Lanes16 a, Lanes16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend FASTSEQ_INLINE Lanes16 max(Lanes16 a, Lanes16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static FASTSEQ_INLINE Lanes16 fma(Lanes16 a, Lanes16 b, Lanes16 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  static FASTSEQ_INLINE uint32_t not_ge(Lanes16 a, Lanes16 b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ);
  }
  static FASTSEQ_INLINE Lanes16 where_positive(Lanes16 a, Lanes16 x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), x.v)};
  }
  static FASTSEQ_INLINE Lanes16 where_less(Lanes16 a, Lanes16 b, Lanes16 x, Lanes16 y) {
    return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
  }
  static FASTSEQ_INLINE Lanes16 round(Lanes16 x) {
    return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static FASTSEQ_INLINE Lanes16 scale(Lanes16 x, Lanes16 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
  static FASTSEQ_INLINE Lanes16 one_over_one_plus_exp2(Lanes16 x) {
    // Of -infinity the reduced argument and the power are 0. The power must not be infinite: the reciprocal's
    // Newton step, which is a quarter of a division, would make it NaN. The minimum of a number and a NaN is
    // the second.
    const __m512 y = _mm512_min_ps(_mm512_set1_ps(126.f), x.v);
    const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(kExp2[0]);
    for (int k = 1; k < 6; ++k) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp2[k]));
    const __m512 one = _mm512_set1_ps(1.f), power = _mm512_scalef_ps(p, _mm512_sub_ps(y, r));
    const __m512 d = _mm512_add_ps(power, one), q = _mm512_rcp14_ps(d);
    return {_mm512_mul_ps(q, _mm512_fnmadd_ps(d, q, _mm512_set1_ps(2.f)))};
  }
  static FASTSEQ_INLINE Lanes16 exp_or_zero(Lanes16 x) {
    const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kLogTiny), _CMP_NLT_UQ);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x.v, _mm512_set1_ps(1.44269504088896341f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x.v);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500E-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507E-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073E-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894E-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459E-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201E-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return {_mm512_maskz_scalef_ps(keep, p, n)};
  }
  friend FASTSEQ_INLINE float sum(Lanes16 a) { return _mm512_reduce_add_ps(a.v); }
  friend FASTSEQ_INLINE float largest(Lanes16 a) { return _mm512_reduce_max_ps(a.v); }
};
#endif

#if defined(__AVX512F__)
using Wide = Lanes16;
using Narrow = Lanes8;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
using Wide = Lanes8;
using Narrow = Lanes8;
constexpr int kRegisters = 16;
#else
using Wide = Lanes<4>;
using Narrow = Lanes<4>;
constexpr int kRegisters = 16;
#endif

// Doubles for the float64 kernels, which are there for accuracy.
using WideDouble = Lanes<4, double>;

// exp, sigmoid and tanh over the whole range, to about 2 ulp; NaN stays NaN. exp underflows gradually.
template <class V>
FASTSEQ_INLINE V vexp(V x) {
  if constexpr (sizeof(typename V::Scalar) == 8) {
    return V::make([&](int i) { return std::exp(x.v[i]); });
  } else {
    // The comparisons are such that NaN passes.
    x = V::where_less(V::set(89.f), x, V::set(89.f), x);
    x = V::where_less(x, V::set(-105.f), V::set(-105.f), x);
    const V n = V::round(x * V::set(1.44269504088896341f));
    V r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    V p = V::set(1.9875691500E-4f);
    for (const float c :
         {1.3981999507E-3f, 8.3334519073E-3f, 4.1665795894E-2f, 1.6666665459E-1f, 5.0000001201E-1f})
      p = V::fma(p, r, V::set(c));
    return V::scale(V::fma(p, r * r, r + V::set(1.f)), n);
  }
}

template <class V>
FASTSEQ_INLINE V vsigmoid(V x) {
  const V one = V::set(1);
  return one / (one + vexp(V::set(0) - x));
}

// Odd, and exactly 1 from 9.02 on. Below 0.625 the polynomial of Cephes' tanhf; above, 1 - 2 / (e^2|x| + 1).
template <class V>
FASTSEQ_INLINE V vtanh(V x) {
  if constexpr (sizeof(typename V::Scalar) == 8) {
    return V::make([&](int i) { return std::tanh(x.v[i]); });
  } else {
    const V zero = V::set(0.f), one = V::set(1.f), two = V::set(2.f);
    const V magnitude = V::where_less(x, zero, zero - x, x), z = x * x;
    V p = V::set(-5.70498872745E-3f);
    for (const float c : {2.06390887954E-2f, -5.37397155531E-2f, 1.33314422036E-1f, -3.33332819422E-1f})
      p = V::fma(p, z, V::set(c));
    const V large = one - two / (vexp(magnitude + magnitude) + one);
    return V::where_less(magnitude, V::set(0.625f), V::fma(p * z, x, x),
                         V::where_less(x, zero, zero - large, large));
  }
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// to(k)[r] = from(r)[k] for r < V::W, k < n; from and to give pointers to rows of floats. In blocks of 8 x 8
// where there are 8 lanes. Reads from(r)[0..n) and writes to(k)[0..V::W), nothing else.
template <class V, class From, class To>
FASTSEQ_INLINE void transpose(int n, const From& from, const To& to) {
  int k = 0;
#ifdef __AVX2__
  if constexpr (V::W == 8) {
    for (; k + 8 <= n; k += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from(i) + k);
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
      }
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to(k + i), _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to(k + i + 4), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
      }
    }
  }
#endif
  for (; k < n; ++k)
    for (int r = 0; r < V::W; ++r) to(k)[r] = from(r)[k];
}

}  // namespace fastseq::FASTSEQ_ISA
