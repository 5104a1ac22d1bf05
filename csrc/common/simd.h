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
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))

namespace fastseq::FASTSEQ_ISA {

// Below this exponent, 2^-90, a scaled quantity is not trusted: exp_or_zero gives exactly 0, and the kernels
// look closer.
constexpr float kTiny = 8.077935669463161e-28f;  // 2^-90
constexpr float kLogTiny = -62.383246250395075f;

// Portable lanes: the compiler turns the loops into whatever the baseline has.
template <int N>
struct Lanes {
  static constexpr int W = N;
  float v[N];
  template <class F>
  static FASTSEQ_INLINE Lanes make(F f) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = f(i);
    return r;
  }
  static FASTSEQ_INLINE Lanes set(float x) {
    return make([&](int) { return x; });
  }
  static FASTSEQ_INLINE Lanes load(const float* p) {
    return make([&](int i) { return p[i]; });
  }
  FASTSEQ_INLINE void store(float* p) const { std::memcpy(p, v, sizeof v); }
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
    return make([&](int i) { return a.v[i] > 0 ? x.v[i] : 0.f; });
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
  friend FASTSEQ_INLINE float sum(Lanes a) {
    float s[N];
    std::memcpy(s, a.v, sizeof s);
    for (int h = N / 2; h; h /= 2)
      for (int i = 0; i < h; ++i) s[i] += s[i + h];
    return s[0];
  }
  friend FASTSEQ_INLINE float largest(Lanes a) {
    float m = a.v[0];
    for (int i = 1; i < N; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }
};

#ifdef __AVX2__
struct Lanes8 {
  static constexpr int W = 8;
  __m256 v;
  static FASTSEQ_INLINE Lanes8 set(float x) { return {_mm256_set1_ps(x)}; }
  static FASTSEQ_INLINE Lanes8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FASTSEQ_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
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
  __m512 v;
  static FASTSEQ_INLINE Lanes16 set(float x) { return {_mm512_set1_ps(x)}; }
  static FASTSEQ_INLINE Lanes16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FASTSEQ_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
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
