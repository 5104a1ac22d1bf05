// What a row has for each slot, read for consecutive distances, and the reverse, which adds up: the gather
// and the scatter of disentangled attention. Slots do not fall as the distance grows, so 16 distances meet
// slots that lie close together, nearly always within 16 places: a load and a permutation in registers read
// them, and sums of equal slots in registers, a load and a store add to them. Rows of the keys' term are
// those of the keys: they go through tiles of 16 x 16, transposed in registers. About 8 instructions for 16
// scores; plain loops without AVX-512, and for float64.
//
// Windows may pass the last distance, by up to SlotMap::kBeyond; up to kPastSlots numbers are read after the
// last slot.
#pragma once
#include <type_traits>

#include "../common/simd.h"
#include "disentangled.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr int64_t kStrip = 16;      // queries that are done together
constexpr int64_t kPastSlots = 16;  // readable numbers that each row has after those of its slots

// Queries first .. first + 16 of a sequence of n positions; those from n on are there in memory, with any
// numbers. Row a of `scores` is query first + a, with an element for each key and room up to a multiple of
// 16; row a of by_query the same query, with its slots in falling order; row j of by_key is key j, up to a
// multiple of 16. by_query and by_key may be null.
template <class R>
struct Strip {
  int64_t first, n;
  const int32_t *rise, *fall;
  bool gentle;  // the slots rise by 1 a step at most
  R* scores;
  int64_t scores_ld;
  R* by_query;
  int64_t by_query_ld;
  R* by_key;
  int64_t by_key_ld;
};

#if defined(__AVX512F__)

// Lane i of r[k] becomes lane k of r[i].
FASTSEQ_INLINE void transpose_tile(__m512 (&r)[16]) {
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    r[i] = low(a, c), r[i + 1] = high(a, c), r[i + 2] = low(b, d), r[i + 3] = high(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    const __m512 d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
    r[i] = _mm512_shuffle_f32x4(a, b, 0x88), r[i + 8] = _mm512_shuffle_f32x4(a, b, 0xDD);
    r[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88), r[i + 12] = _mm512_shuffle_f32x4(c, d, 0xDD);
  }
}

// How the slots of a tile's 31 distances lie: all one apart; none more than one from the next, so that 16 are
// within 16 places; or anyhow.
enum class Slope { one, gentle, any };

// row[map[i]] in lane i.
template <Slope slope>
FASTSEQ_INLINE __m512 read_window(const float* row, const int32_t* map) {
  const int32_t low = map[0];
  if constexpr (slope == Slope::one) return _mm512_loadu_ps(row + low);
  const __m512i slots = _mm512_loadu_si512(map);
  if constexpr (slope == Slope::any) return _mm512_i32gather_ps(slots, row, 4);
  return _mm512_permutexvar_ps(_mm512_sub_epi32(slots, _mm512_set1_epi32(low)), _mm512_loadu_ps(row + low));
}

// Lane i of x goes to lane i + s; the lanes below s become 0.
template <int s>
FASTSEQ_INLINE __m512i moved_up(__m512i x) {
  return _mm512_alignr_epi32(x, _mm512_setzero_si512(), 16 - s);
}

// row[map[i]] += lane i of x.
template <Slope slope>
FASTSEQ_INLINE void add_window(float* row, const int32_t* map, __m512 x) {
  const int32_t low = map[0];
  if constexpr (slope == Slope::one) {
    _mm512_storeu_ps(row + low, _mm512_add_ps(_mm512_loadu_ps(row + low), x));
    return;
  }
  const __m512i slots = _mm512_loadu_si512(map);
  // Sums of runs of equal slots, in four steps: in the end a run's last lane has the whole of it.
  __mmask16 equal = 0;
  const auto add_up = [&](auto s) {
    constexpr int kUp = decltype(s)::value;
    equal = _mm512_cmpeq_epi32_mask(slots, moved_up<kUp>(slots)) & __mmask16(0xFFFF << kUp);
    x = _mm512_mask_add_ps(x, equal, x, _mm512_castsi512_ps(moved_up<kUp>(_mm512_castps_si512(x))));
    return equal != 0;
  };
  add_up(std::integral_constant<int, 1>{});
  const __mmask16 last = __mmask16(~(equal >> 1));
  if (equal && add_up(std::integral_constant<int, 2>{}) && add_up(std::integral_constant<int, 4>{}))
    add_up(std::integral_constant<int, 8>{});
  if constexpr (slope == Slope::any) {
    const __m512 there = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), last, slots, row, 4);
    _mm512_mask_i32scatter_ps(row, last, slots, _mm512_add_ps(there, x), 4);
  } else {
    const __mmask16 used = __mmask16((2u << (map[15] - low)) - 1);
    const __m512 sums = _mm512_maskz_compress_ps(last, x), there = _mm512_maskz_loadu_ps(used, row + low);
    _mm512_mask_storeu_ps(row + low, used, _mm512_add_ps(there, sums));
  }
}

FASTSEQ_INLINE void prefetch_window(const float* row, const int32_t* map) {
  _mm_prefetch(reinterpret_cast<const char*>(row + map[0]), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(row + map[15]), _MM_HINT_T0);
}

// The tile of the strip's 16 queries and the keys from j on.
template <Slope slope>
FASTSEQ_INLINE void add_tile(const Strip<float>& s, int64_t j, __m512 scale) {
  __m512 r[16];
  const int32_t* rise = s.rise + (s.first - j);
  const int32_t* fall = s.fall + (j - s.first);
  if (s.by_key) {
    const float* from = s.by_key + j * s.by_key_ld;
    const int64_t ld = s.by_key_ld;
    if (j + 16 < s.n)  // the rows of the next tile, which are in L2
#pragma GCC unroll 16
      for (int b = 16; b < 32; ++b) prefetch_window(from + b * ld, rise - b);
#pragma GCC unroll 16
    for (int b = 0; b < 16; ++b) r[b] = read_window<slope>(from + b * ld, rise - b);
    transpose_tile(r);
  } else {
    for (__m512& x : r) x = _mm512_setzero_ps();
  }
  float* to = s.scores + j;
  const int64_t ld = s.scores_ld, query_ld = s.by_query_ld;
  if (const float* from = s.by_query) {
#pragma GCC unroll 16
    for (int a = 0; a < 16; ++a) {
      const __m512 x = read_window<slope>(from + a * query_ld, fall - a);
      _mm512_storeu_ps(to + a * ld, scale * (_mm512_loadu_ps(to + a * ld) + r[a] + x));
    }
  } else {
#pragma GCC unroll 16
    for (int a = 0; a < 16; ++a) _mm512_storeu_ps(to + a * ld, scale * (_mm512_loadu_ps(to + a * ld) + r[a]));
  }
}

template <Slope slope>
FASTSEQ_INLINE void scatter_tile(const Strip<float>& s, int64_t j) {
  __m512 r[16];
  const float* from = s.scores + j;
  const int64_t ld = s.scores_ld, query_ld = s.by_query_ld, key_ld = s.by_key_ld;
  const int32_t* rise = s.rise + (s.first - j);
  const int32_t* fall = s.fall + (j - s.first);
#pragma GCC unroll 16
  for (int a = 0; a < 16; ++a) r[a] = _mm512_loadu_ps(from + a * ld);
  if (float* to = s.by_query)
#pragma GCC unroll 16
    for (int a = 0; a < 16; ++a) add_window<slope>(to + a * query_ld, fall - a, r[a]);
  if (!s.by_key) return;
  float* to = s.by_key + j * key_ld;
  if (j + 16 < s.n)
#pragma GCC unroll 16
    for (int b = 16; b < 32; ++b) prefetch_window(to + b * key_ld, rise - b);
  transpose_tile(r);
#pragma GCC unroll 16
  for (int b = 0; b < 16; ++b) add_window<slope>(to + b * key_ld, rise - b, r[b]);
}

// Runs f with the slope of each tile of the strip: f(slope, first key).
template <class F>
FASTSEQ_INLINE void for_tiles(const Strip<float>& s, const F& f) {
  for (int64_t j = 0; j < s.n; j += 16) {
    const int32_t* middle = s.rise + (s.first - j);
    if (s.gentle && middle[15] - middle[-15] == 30)
      f(std::integral_constant<Slope, Slope::one>{}, j);
    else if (s.gentle)
      f(std::integral_constant<Slope, Slope::gentle>{}, j);
    else
      f(std::integral_constant<Slope, Slope::any>{}, j);
  }
}

#endif

// scores[a][j] = scale * (scores[a][j] + by_query[a][fall[j - i]] + by_key[j][rise[i - j]]), i = first + a.
template <class R>
void add_positions(const Strip<R>& s, R scale) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>) {
    const __m512 factor = _mm512_set1_ps(scale);
    for_tiles(s, [&](auto slope, int64_t j) { add_tile<decltype(slope)::value>(s, j, factor); });
    return;
  }
#endif
  for (int64_t a = 0; a < std::min(kStrip, s.n - s.first); ++a) {
    for (int64_t j = 0, i = s.first + a; j < s.n; ++j) {
      R x = s.scores[a * s.scores_ld + j];
      if (s.by_query) x += s.by_query[a * s.by_query_ld + s.fall[j - i]];
      if (s.by_key) x += s.by_key[j * s.by_key_ld + s.rise[i - j]];
      s.scores[a * s.scores_ld + j] = scale * x;
    }
  }
}

// The reverse: by_query[a][fall[j - i]] += scores[a][j], and by_key[j][rise[i - j]] += scores[a][j]. The
// scores of queries and of keys from n on must be 0.
template <class R>
void add_to_positions(const Strip<R>& s) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>) {
    for_tiles(s, [&](auto slope, int64_t j) { scatter_tile<decltype(slope)::value>(s, j); });
    return;
  }
#endif
  for (int64_t a = 0; a < std::min(kStrip, s.n - s.first); ++a) {
    for (int64_t j = 0, i = s.first + a; j < s.n; ++j) {
      const R x = s.scores[a * s.scores_ld + j];
      if (s.by_query) s.by_query[a * s.by_query_ld + s.fall[j - i]] += x;
      if (s.by_key) s.by_key[j * s.by_key_ld + s.rise[i - j]] += x;
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
