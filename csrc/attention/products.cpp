// Packing, and the products themselves: compiled here once for all kernels of attention. Packing costs about
// half a cycle a number, a product 1/16 cycle a multiply-add (float32, 512 bits).
#include "products.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace fastseq::FASTSEQ_ISA::attention {
namespace {

template <class E>
constexpr bool kPaired = std::is_same_v<E, Pair>;

// What is copied as a whole when panels are transposed: 32 or 64 bits.
template <class E>
using Word = std::conditional_t<std::is_same_v<E, double>, double, float>;

const char* row_of(const Matrix& m, int64_t r) {
  return static_cast<const char*>(m.data) + r * m.stride * bytes(m.type);
}

// Row r, converted, with zeros up to `elements`.
template <class E>
void load(const Matrix& m, int64_t r, E* out, int64_t elements) {
  if constexpr (kPaired<E>) {
    if (m.columns % 2) std::memset(out + m.columns / 2, 0, sizeof(E));
    std::memcpy(out, row_of(m, r), size_t(m.columns) * 2);
  } else {
    crf::load_row({m.data, m.type, 1, m.rows, m.columns, 0, m.stride}, 0, r, out);
  }
  std::memset(out + steps<E>(m.columns), 0, size_t(elements - steps<E>(m.columns)) * sizeof(E));
}

// Whether a row is, as it lies there, a row of elements.
template <class E>
bool fits(const Matrix& m) {
  if constexpr (std::is_same_v<E, double>) return m.type == Type::f64;
  if constexpr (std::is_same_v<E, float>) return m.type == Type::f32;
  return m.columns % 2 == 0 && m.stride % 2 == 0 && reinterpret_cast<uintptr_t>(m.data) % 4 == 0;
}

template <class Bits>
bool finite_rows(const Matrix& m, Bits exponent) {
  Bits largest = 0;
  for (int64_t r = 0; r < m.rows; ++r) {
    const Bits* x = reinterpret_cast<const Bits*>(row_of(m, r));
    for (int64_t c = 0; c < m.columns; ++c) largest = std::max(largest, Bits(x[c] & exponent));
  }
  return largest != exponent;
}

template <class R>
void store_any(Type type, void* out, int64_t at, int64_t n, const R* x, R factor) {
  R scaled[64];
  for (int64_t c = 0; c < n; c += 64) {
    const int64_t here = std::min<int64_t>(64, n - c);
    for (int64_t i = 0; i < here; ++i) scaled[i] = x[c + i] * factor;
    crf::store_row(type, out, at + c, here, scaled);
  }
}

#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) void store_bf16(uint16_t* out, int64_t n, const float* x,
                                                      float factor) {
  const auto rounded = [&](int64_t c, __mmask16 here) __attribute__((target("avx512bf16"), always_inline)) {
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, x + c), _mm512_set1_ps(factor));
    return (__m256i)_mm512_cvtneps_pbh(scaled);
  };
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), rounded(c, 0xFFFF));
  const __mmask16 last = __mmask16((1u << (n - c)) - 1);  // a masked store of 16 bits takes its time
  if (c < n) _mm256_mask_storeu_epi16(out + c, last, rounded(c, last));
}
#endif

}  // namespace

bool has_pairs() {
#if defined(__AVX512F__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

bool is_finite(const Matrix& m) {
  switch (m.type) {
    case Type::f64:
      return finite_rows<uint64_t>(m, uint64_t{0x7FF} << 52);
    case Type::f32:
      return finite_rows<uint32_t>(m, 0x7F800000);
    case Type::bf16:
      return finite_rows<uint16_t>(m, 0x7F80);
    default:
      return finite_rows<uint16_t>(m, 0x7C00);
  }
}

void store_scaled(Type type, void* out, int64_t at, int64_t n, const float* x, float factor) {
  if (type == Type::f32) {
    float* to = static_cast<float*>(out) + at;
    for (int64_t c = 0; c < n; ++c) to[c] = x[c] * factor;
    return;
  }
#if defined(__AVX512F__)
  if (type == Type::bf16 && has_pairs()) return store_bf16(static_cast<uint16_t*>(out) + at, n, x, factor);
#endif
  store_any(type, out, at, n, x, factor);
}

void store_scaled(Type type, void* out, int64_t at, int64_t n, const double* x, double factor) {
  store_any(type, out, at, n, x, factor);
}

template <class E>
void pack_rows(const Matrix& m, E* out, int64_t ld) {
  if (fits<E>(m) && ld == steps<E>(m.columns)) {
    for (int64_t r = 0; r < m.rows; ++r) std::memcpy(out + r * ld, row_of(m, r), size_t(ld) * sizeof(E));
    return;
  }
  for (int64_t r = 0; r < m.rows; ++r) load<E>(m, r, out + r * ld, ld);
}

template <class E>
Panels<E> pack_transposed(const Matrix& m, E* out) {
  using W = Word<E>;
  using V = std::conditional_t<std::is_same_v<E, double>, Lanes<2, double>, Narrow>;
  constexpr int kGroup = V::W;
  static_assert(kLanes<E> % kGroup == 0);
  const int64_t depth = steps<E>(m.columns);
  const bool direct = fits<E>(m);
  std::vector<E> converted(direct ? 0 : kGroup * depth), zeros(depth);
  for (int64_t c = 0; c < padded<E>(m.rows); c += kGroup) {
    const W* from[kGroup];
    for (int64_t r = 0; r < kGroup; ++r) {
      const E* row = zeros.data();
      if (c + r < m.rows && direct) {
        row = reinterpret_cast<const E*>(row_of(m, c + r));
      } else if (c + r < m.rows) {
        row = converted.data() + r * depth;
        load<E>(m, c + r, converted.data() + r * depth, depth);
      }
      from[r] = reinterpret_cast<const W*>(row);
    }
    const int64_t p = c / kPanel<E>, width = panel_vectors<E>(m.rows, p) * kLanes<E>;
    W* to = reinterpret_cast<W*>(out + p * kPanel<E> * depth + c % kPanel<E>);
    transpose<V>(int(depth), [&](int64_t r) { return from[r]; }, [&](int64_t k) { return to + k * width; });
  }
  return {out, depth, m.rows};
}

template <class E>
Panels<E> pack_columns(const Matrix& m, E* out) {
  const int64_t depth = steps<E>(m.rows), n = m.columns;
  const bool direct = !kPaired<E> && fits<E>(m);
  std::vector<Sum<E>> row(direct || kPaired<E> ? 0 : n);
  for (int64_t k = 0; k < depth; ++k) {
    const void* source = row_of(m, k * Element<E>::kSteps);
    if (!direct && !kPaired<E>) {
      crf::load_row({m.data, m.type, 1, m.rows, n, 0, m.stride}, 0, k, row.data());
      source = row.data();
    }
    for (int64_t begin = 0; begin < n; begin += kPanel<E>) {
      const int64_t width = panel_vectors<E>(n, begin / kPanel<E>) * kLanes<E>;
      const int64_t here = std::min(width, n - begin);
      E* to = out + begin * depth + k * width;
      if constexpr (kPaired<E>) {
        const bool two = 2 * k + 1 < m.rows;
        const uint16_t* even = static_cast<const uint16_t*>(source) + begin;
        const uint16_t* odd = two ? even + m.stride : even;
        const uint32_t keep = two ? 0xFFFF0000u : 0;
        for (int64_t c = 0; c < here; ++c) to[c].bits = even[c] | ((uint32_t(odd[c]) << 16) & keep);
      } else {
        std::memcpy(to, static_cast<const E*>(source) + begin, size_t(here) * sizeof(E));
      }
      std::fill(to + here, to + width, E{});
    }
  }
  return {out, depth, n};
}

template <class E, Rows rows>
void product(int64_t count, const E* a, int64_t a_stride, const Panels<E>& b, Range depth, Range columns,
             Sum<E>* c, int64_t c_stride, bool add) {
  for (int64_t begin = columns.begin; begin < columns.end; begin += kPanel<E>) {
    const int vectors = panel_vectors<E>(b.columns, begin / kPanel<E>);
    const E* panel = b.data + begin * b.depth;
    for (int64_t k = depth.begin; k < depth.end; k += kDepth) {
      const E* from = a + (k - depth.begin) * (rows == Rows::contiguous ? 1 : a_stride);
      multiply<E, rows>(count, vectors,
                        {std::min(kDepth, depth.end - k), from, a_stride, panel + k * vectors * kLanes<E>,
                         c + begin, c_stride, add || k > depth.begin});
    }
  }
}

#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) void round_pairs(const float* x, int64_t ld, int64_t rows,
                                                       Range columns, Pair* along, Pair* across,
                                                       int64_t out_ld) {
  const auto first = [&](int64_t c) {
    const int64_t left = columns.end - c;
    return left >= 16 ? __mmask16(0xFFFF) : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
  };
  for (int64_t r = 0; r < rows; r += 2) {
    const bool two = r + 1 < rows;
    const float *even = x + r * ld, *odd = two ? even + ld : even;
    for (int64_t c = columns.begin; c < columns.end; c += 32) {
      const __mmask16 low = first(c), high = first(c + 16);
      const __m512 e0 = _mm512_maskz_loadu_ps(low, even + c), e1 = _mm512_maskz_loadu_ps(high, even + c + 16);
      const __m512 o0 = _mm512_maskz_loadu_ps(two ? low : 0, odd + c);
      const __m512 o1 = _mm512_maskz_loadu_ps(two ? high : 0, odd + c + 16);
      if (along) {
        _mm512_storeu_si512(along + r * out_ld + c / 2, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
        if (two) _mm512_storeu_si512(along + (r + 1) * out_ld + c / 2, (__m512i)_mm512_cvtne2ps_pbh(o1, o0));
      }
      if (across) {
        const auto pair = [](__m512 a, __m512 b) __attribute__((target("avx512bf16"), always_inline)) {
          const __m512i wide_a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
          const __m512i wide_b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
          return _mm512_or_si512(wide_a, _mm512_slli_epi32(wide_b, 16));
        };
        _mm512_storeu_si512(across + r / 2 * out_ld + c, pair(e0, o0));
        _mm512_storeu_si512(across + r / 2 * out_ld + c + 16, pair(e1, o1));
      }
    }
  }
}
#endif

#define FASTSEQ_INSTANTIATE(E)                                                                           \
  template void pack_rows<E>(const Matrix&, E*, int64_t);                                                \
  template Panels<E> pack_transposed<E>(const Matrix&, E*);                                              \
  template Panels<E> pack_columns<E>(const Matrix&, E*);                                                 \
  template void product<E, Rows::contiguous>(int64_t, const E*, int64_t, const Panels<E>&, Range, Range, \
                                             Sum<E>*, int64_t, bool);                                    \
  template void product<E, Rows::strided>(int64_t, const E*, int64_t, const Panels<E>&, Range, Range,    \
                                          Sum<E>*, int64_t, bool);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
#if defined(__AVX512F__)
FASTSEQ_INSTANTIATE(Pair)
#endif
#undef FASTSEQ_INSTANTIATE

}  // namespace fastseq::FASTSEQ_ISA::attention
