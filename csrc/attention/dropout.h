// The dropout mask of attention: 16 random bits for each (sequence and head, query, key), from a counter, so
// that backward makes the same mask again and any backend the same one (fastseq/ops/attention/dropout.py).
// The same bits from every instruction set. One hash of 32 bits serves two columns: about 6 integer
// operations of a vector for as many columns as it has lanes.
#pragma once
#include "../common/simd.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr uint32_t kGolden = 0x9E3779B9;

struct Dropout {
  uint32_t low = 0, high = 0;  // of the seed
  uint32_t threshold = 0;      // of 65536: dropped with probability threshold / 65536

  static Dropout make(int64_t seed, double probability) {
    const double threshold = std::floor(probability * 65536 + 0.5);
    return {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32),
            uint32_t(threshold < 0       ? 0
                     : threshold > 65535 ? 65535
                                         : threshold)};
  }
  bool any() const { return threshold != 0; }
  // What the kept ones are multiplied by.
  double factor() const { return 65536. / (65536. - threshold); }
};

FASTSEQ_INLINE uint32_t mixed(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x *= 0x846ca68b;
  return x ^ x >> 16;
}

// Of head `nh` = sequence * heads + head: keys to its rows.
struct HeadMask {
  uint32_t a, b;
  HeadMask(const Dropout& d, int64_t nh)
      : a(mixed(mixed(d.low) + uint32_t(nh))), b(mixed(mixed(d.high ^ kGolden) + uint32_t(nh))) {}
};

// kept[c] for c < words: bit i is 1 where column first + 32 * c + i of row `row` is kept; first a multiple of
// 32. Some columns are beyond the last key: their bits mean nothing.
inline void keep_bits(const Dropout& d, const HeadMask& head, int64_t row, int64_t first, int64_t words,
                      uint32_t* kept) {
  const uint32_t a = mixed(head.a + uint32_t(row)), b = mixed(head.b ^ uint32_t(row));
  uint32_t start = a + uint32_t(first / 2) * kGolden;
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i m1 = _mm512_set1_epi32(0x7feb352d), m2 = _mm512_set1_epi32(int(0x846ca68b));
  const __m512i threshold = _mm512_set1_epi16(short(d.threshold)), added = _mm512_set1_epi32(int(b));
  const __m512i step = _mm512_set1_epi32(int(16 * kGolden));
  alignas(64) uint16_t order[32];  // the low halves first
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i < 16 ? 2 * i : 2 * i - 31);
  const __m512i halves = _mm512_load_si512(order);
  __m512i counter = _mm512_add_epi32(_mm512_set1_epi32(int(start)),
                                     _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(kGolden))));
  for (int64_t c = 0; c < words; ++c, counter = _mm512_add_epi32(counter, step)) {
    __m512i x = _mm512_xor_si512(counter, _mm512_srli_epi32(counter, 16));
    x = _mm512_mullo_epi32(x, m1);
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(_mm512_add_epi32(x, added), m2);
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    kept[c] = _mm512_cmpge_epu16_mask(_mm512_permutexvar_epi16(halves, x), threshold);
  }
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i m1 = _mm256_set1_epi32(0x7feb352d), m2 = _mm256_set1_epi32(int(0x846ca68b));
  const __m256i below = _mm256_set1_epi32(int(d.threshold) - 1), added = _mm256_set1_epi32(int(b));
  const __m256i offsets = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(int(kGolden)));
  for (int64_t c = 0; c < 2 * words; ++c, start += 8 * kGolden) {
    __m256i x = _mm256_add_epi32(_mm256_set1_epi32(int(start)), offsets);
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_mullo_epi32(x, m1);
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
    x = _mm256_mullo_epi32(_mm256_add_epi32(x, added), m2);
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    const auto bits = [&](__m256i v) {
      return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(v, below))));
    };
    const uint32_t low = bits(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF)));
    const uint32_t both = low | bits(_mm256_srli_epi32(x, 16)) << 16;
    kept[c / 2] = c % 2 ? kept[c / 2] | both << 8 : both;
  }
#else
  for (int64_t c = 0; c < words; ++c, start += 16 * kGolden) {
    uint32_t bits = 0;
    for (uint32_t w = 0; w < 16; ++w) {
      uint32_t x = start + w * kGolden;
      x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x += b, x *= 0x846ca68b, x ^= x >> 16;
      bits |= uint32_t((x & 0xFFFF) >= d.threshold) << w | uint32_t(x >> 16 >= d.threshold) << (w + 16);
    }
    kept[c] = bits;
  }
#endif
}

// x in the lanes whose bit is set, else 0; the bits are those from column `c`, a multiple of V::W, on.
template <class V>
FASTSEQ_INLINE V kept_or_zero(const uint32_t* kept, int64_t c, V x) {
  const uint32_t bits = kept[c / 32] >> (c % 32);
#if defined(__AVX512F__)
  if constexpr (V::W == 16) return {_mm512_maskz_mov_ps(__mmask16(bits), x.v)};
#elif defined(__AVX2__)
  if constexpr (V::W == 8) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
    return {_mm256_and_ps(_mm256_castsi256_ps(on), x.v)};
  }
#endif
  if constexpr (V::W < 8)
    return V::make([&](int i) { return bits >> i & 1 ? x.v[i] : typename V::Scalar(0); });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
