// A weighted cross-entropy over V words for N rows, by tiles of words, so that logits never leave the second
// level cache.
//
// Work: the logits are computed twice, so 2 N H V multiply-adds for the values' pass and the gradient's
// logits, and 2 more for the gradients of hidden and weight: 4 N H V, where keeping the logits would need 3
// and 4 N V bytes. The panels of gemm.h run at 85 to 93 % of the peak of a core, a library's products of
// these shapes at half of that, so four cost less than its three. Rows in chunks, all words at a time, need 3
// N H V, but go through weight twice and through its gradient once for each chunk: at 8 MiB of logits, 30
// rows of 50k words, that is 2.8 GB for 400 rows. Traffic here: weight is read twice, its gradient written
// once, 12 V H bytes in float32. Exponentials: 2 N V.
//
// Memory: hidden twice, packed (8 N H bytes); a sum of hidden's gradient for each slot (4 N H bytes each);
// about 1 MiB a thread. Tiles are dealt to slots, and slots added up in order; neither depends on the number
// of threads, so results are the same bits for any number of them.
#include "nll_tiles.h"

#include <algorithm>
#include <limits>
#include <thread>
#include <type_traits>

#include "../common/gemm.h"
#include "../common/one_double.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

using namespace fastseq::pointer;

template <class R>
using Numbers = std::conditional_t<std::is_same_v<R, double>, OneDouble, Wide>;

// What one step of the depth is stored as.
template <class E>
using Scalar = std::conditional_t<std::is_same_v<E, Pair>, uint16_t, E>;

constexpr int64_t kRowsAtOnce = 512;  // of which a tile's logits are held
constexpr int64_t kSumBytes =
    5 << 19;  // for the slots' sums of hidden's gradient, where 2 a processor are fewer
constexpr int64_t kFirstSlots = 32;

// What this machine could run at once. A property of the machine, unlike torch's thread count: slots may
// depend on it.
int64_t processors() {
  static const int64_t n = std::max(1u, std::thread::hardware_concurrency());
  return n;
}

template <class E>
class Tiler {
  using R = typename Element<E>::Sum;
  using S = Scalar<E>;
  using V = Numbers<R>;
  static constexpr int kSteps = Element<E>::kSteps;
  static constexpr int64_t kWords = 96 * kSteps;  // a tile

 public:
  Tiler(Tiles<R>& tiles, const ParallelFor& parallel)
      : t(tiles),
        parallel(parallel),
        count((t.V + kWords - 1) / kWords),
        x_depth_h(padded<E>(t.N) * steps<E>(t.H)),
        x_depth_n(t.gradient ? padded<E>(t.H) * steps<E>(t.N) : 0) {
    pack_hidden();
  }

  // ---- first pass: largest logit and sum of exponentials -------------------------------------------------

  void normalize() {
    const int64_t slots = std::min(count, kFirstSlots);
    std::vector<R> largest(slots * t.N, std::numeric_limits<R>::lowest());
    std::vector<double> sum(slots * t.N), logit_sum(t.sum_logits ? slots * t.N : 0);
    run_tasks(parallel, slots, [&](int64_t slot) {
      const Buffer<S> converted(kWords * steps<E>(t.H) * kSteps);
      const Buffer<R> z(kWords * kPanel<E>);
      const int64_t at = slot * t.N;
      for (int64_t i = slot * count / slots; i < (slot + 1) * count / slots; ++i) {
        const Tile tile = tile_at(i, converted);
        for (int64_t p = 0; p * kPanel<E> < t.N; ++p) {
          logits(tile, p, z, kPanel<E>);
          read_words(tile, p, z);
          add_up(tile, p, z, largest.data() + at, sum.data() + at,
                 t.sum_logits ? logit_sum.data() + at : nullptr);
        }
      }
    });
    for (int64_t n = 0; n < t.N; ++n) {
      R m = largest[n];
      for (int64_t s = 1; s < slots; ++s) m = std::max(m, largest[s * t.N + n]);
      double all = 0, logits = 0;
      for (int64_t s = 0; s < slots; ++s) {
        all += sum[s * t.N + n] * std::exp(double(largest[s * t.N + n]) - double(m));
        if (t.sum_logits) logits += logit_sum[s * t.N + n];
      }
      t.largest[n] = m, t.sum[n] = all;
      if (t.sum_logits) t.logit_sum[n] = logits;
    }
  }

  // ---- second pass: gradients ----------------------------------------------------------------------------

  void differentiate() {
    const int64_t width = padded<E>(t.H), row_sums = t.N * width;
    const int64_t affordable = kSumBytes / (row_sums * int64_t(sizeof(R)));
    const int64_t slots =
        std::min(count, std::clamp(affordable / processors(), int64_t(1), int64_t(4)) * processors());
    const Buffer<R> sums(slots * row_sums);
    run_tasks(parallel, slots, [&](int64_t slot) {
      R* hidden = sums + slot * row_sums;
      std::fill_n(hidden, row_sums, R{});
      Scratch scratch(*this);
      for (int64_t i = slot * count / slots; i < (slot + 1) * count / slots; ++i)
        differentiate_tile(i, scratch, hidden);
    });
    run_tasks(parallel, (t.N + 15) / 16, [&](int64_t task) {
      for (int64_t n = task * 16; n < std::min(t.N, task * 16 + 16); ++n) {
        R* first = sums + n * width;
        for (int64_t s = 1; s < slots; ++s)
          for (int64_t h = 0; h < t.H; ++h) first[h] += first[s * row_sums + h];
        crf::store_row(t.hidden_type, t.grad_hidden, t.flat[n] * t.H, t.H, first);
      }
    });
  }

 private:
  // Words first .. first + words, row by row: S scalars, `stride` apart, zero-padded to whole elements.
  struct Tile {
    int64_t first, words;
    const S* rows;
    int64_t stride;
    const R* bias;  // of the first word, or null
  };

  struct Scratch {
    explicit Scratch(const Tiler& tiler)
        : rows(tiler.rows_at_once()),
          ld(apart<E>(rows)),
          converted(kWords * steps<E>(tiler.t.H) * kSteps),
          panels(kWords * padded<E>(tiler.t.H)),
          z(kWords * ld),
          by_word(kSteps == 1 ? 0 : kWords * ld),
          by_row(kSteps == 1 ? 0 : kWords / kSteps * ld),
          weight(kWords * padded<E>(tiler.t.H)),
          bias(kWords) {}
    const int64_t rows, ld;
    const Buffer<S> converted, panels;
    const Buffer<R> z;        // logits, then their gradient: [word][row]
    const Buffer<E> by_word;  // the gradient as elements along the rows: [word][row / 2]
    const Buffer<E> by_row;   // and along the words: [word / 2][row]
    const Buffer<R> weight, bias;
  };

  // ---- operands ------------------------------------------------------------------------------------------

  static S scalar(R x) {
    if constexpr (kSteps == 2)
      return float_to_bf16(x);
    else
      return x;
  }

  // Panels of `columns` columns, each [depth][lanes]: where step k of column c is.
  static int64_t packed_at(int64_t columns, int64_t depth, int64_t k, int64_t c) {
    const int64_t p = c / kPanel<E>, width = panel_vectors<E>(columns, p) * kLanes<E>;
    return ((p * kPanel<E> * steps<E>(depth)) + k / kSteps * width + c % kPanel<E>)*kSteps + k % kSteps;
  }

  void pack_hidden() {
    S* by_h = reinterpret_cast<S*>(static_cast<E*>(x_depth_h));
    S* by_n = reinterpret_cast<S*>(static_cast<E*>(x_depth_n));
    const int64_t rows = round_up(t.N, std::max(kLanes<E>, kSteps));
    run_tasks(parallel, (rows + 31) / 32, [&](int64_t task) {
      std::vector<R> row(padded<E>(steps<E>(t.H) * kSteps));
      for (int64_t n = task * 32; n < std::min(rows, task * 32 + 32); ++n) {
        std::fill(row.begin(), row.end(), R{});
        if (n < t.N) crf::load_row({t.hidden, t.hidden_type, 2, 1, t.H, t.hidden_at[n], 0}, 1, 0, row.data());
        for (int64_t h = 0; h < steps<E>(t.H) * kSteps; ++h) by_h[packed_at(t.N, t.H, h, n)] = scalar(row[h]);
        if (t.gradient && n < steps<E>(t.N) * kSteps)
          for (int64_t h = 0; h < padded<E>(t.H); ++h) by_n[packed_at(t.H, t.N, n, h)] = scalar(row[h]);
      }
    });
  }

  Tile tile_at(int64_t i, S* converted) const {
    const int64_t first = i * kWords, words = std::min(kWords, t.V - first);
    const R* bias = t.bias ? t.bias + first : nullptr;
    const bool same = t.weight_type == (kSteps == 2                 ? Type::bf16
                                        : std::is_same_v<R, double> ? Type::f64
                                                                    : Type::f32) &&
                      (kSteps == 2 || t.hidden_type == t.weight_type);
    const S* there = static_cast<const S*>(t.weight) + first * t.H;
    if (same && t.H % kSteps == 0 && reinterpret_cast<uintptr_t>(there) % alignof(E) == 0)
      return {first, words, there, t.H, bias};
    const int64_t stride = steps<E>(t.H) * kSteps;
    std::vector<R> row(stride);
    for (int64_t v = 0; v < words; ++v) {
      if constexpr (kSteps == 2) {
        if (t.weight_type == Type::f32) {  // the usual case, without a detour
          const float* from = static_cast<const float*>(t.weight) + (first + v) * t.H;
          uint16_t* to = converted + v * stride;
          for (int64_t h = 0; h < t.H; ++h) to[h] = float_to_bf16(from[h]);
          if (stride > t.H) to[t.H] = 0;
          continue;
        }
      }
      crf::load_row({t.weight, t.weight_type, 1, t.V, t.H, 0, t.H}, 0, first + v, row.data());
      S* out = converted + v * stride;
      if (kSteps == 1 && t.hidden_type == Type::bf16)
        for (int64_t h = 0; h < stride; ++h) out[h] = S(bf16_to_float(float_to_bf16(float(row[h]))));
      else if (kSteps == 1 && t.hidden_type == Type::f16)
        for (int64_t h = 0; h < stride; ++h) out[h] = S(half_to_float(float_to_half(float(row[h]))));
      else
        for (int64_t h = 0; h < stride; ++h) out[h] = scalar(row[h]);
    }
    return {first, words, converted, stride, bias};
  }

  // The tile's rows as panels of columns of H, with the words as depth.
  void pack_words(const Tile& tile, S* panels) const {
    for (int64_t p = 0; p * kPanel<E> < t.H; ++p) {
      const int64_t width = panel_vectors<E>(t.H, p) * kLanes<E>, begin = p * kPanel<E>;
      const int64_t here = std::min(width, t.H - begin);
      S* out = panels + begin * steps<E>(tile.words) * kSteps;
      for (int64_t v = 0; v < tile.words; v += kSteps, out += width * kSteps) {
        const S* row = tile.rows + v * tile.stride + begin;
        if constexpr (kSteps == 1) {
          std::copy_n(row, here, out);
        } else {
          const bool two = v + 1 < tile.words;
          const S* next = two ? row + tile.stride : row;
          const uint32_t keep = two ? 0xFFFF0000u : 0;
          for (int64_t c = 0; c < here; ++c) {
            const uint32_t both = uint32_t(row[c]) | ((uint32_t(next[c]) << 16) & keep);
            std::memcpy(out + 2 * c, &both, sizeof both);
          }
        }
        std::fill(out + here * kSteps, out + width * kSteps, S{});
      }
    }
  }

  static const E* elements(const S* p) { return reinterpret_cast<const E*>(p); }

  // ---- logits --------------------------------------------------------------------------------------------

  // z[v * ld + n] for the tile's words and the rows of panel p, without bias.
  void logits(const Tile& tile, int64_t p, R* z, int64_t ld) const {
    const int vectors = panel_vectors<E>(t.N, p);
    const E* panel = x_depth_h + p * kPanel<E> * steps<E>(t.H);
    for (int64_t k = 0; k < steps<E>(t.H); k += kDepth)
      multiply<E, Rows::contiguous>(tile.words, vectors,
                                    {std::min(kDepth, steps<E>(t.H) - k), elements(tile.rows) + k,
                                     tile.stride / kSteps, panel + k * vectors * kLanes<E>, z, ld, k > 0});
  }

  R bias_of(const Tile& tile, int64_t v) const { return tile.bias ? tile.bias[v] : R{}; }

  // Runs f(index in `list`) for those of its words that are in the tile.
  template <class List, class F>
  static void for_words(const Tile& tile, const List& list, const F& f) {
    const auto before = [](const auto& a, int64_t word) { return a.word < word; };
    auto at = std::lower_bound(list.begin(), list.end(), tile.first, before);
    for (; at != list.end() && at->word < tile.first + tile.words; ++at) f(*at);
  }

  void read_words(const Tile& tile, int64_t p, const R* z) {
    const int64_t begin = p * kPanel<E>, end = std::min(t.N, begin + kPanel<E>);
    for_words(tile, t.targets, [&](const TargetWord& w) {
      const int64_t v = w.word - tile.first;
      if (w.row >= begin && w.row < end)
        t.target_logit[w.row] = z[v * kPanel<E> + w.row - begin] + bias_of(tile, v);
    });
    for_words(tile, t.sources, [&](const SourceWord<R>& w) {
      const int64_t v = w.word - tile.first;
      for (int64_t n = std::max(begin, w.first); n < std::min(end, w.first + w.count); ++n)
        w.values[n - w.first] = z[v * kPanel<E> + n - begin] + bias_of(tile, v);
    });
  }

  // Adds the exponentials of a panel's logits to the sums of its rows. A row's sums are in float64: of a tile
  // at a time, so that this costs nothing.
  void add_up(const Tile& tile, int64_t p, R* z, R* largest, double* sum, double* logit_sum) const {
    const int64_t begin = p * kPanel<E>, rows = std::min(t.N - begin, int64_t(kPanel<E>));
    R top[kPanel<E>], exponentials[kPanel<E>], plain[kPanel<E>];
    for (int64_t i = 0; i < rows; ++i) top[i] = largest[begin + i];
    std::fill(top + rows, top + kPanel<E>, R{});
    for (int64_t i = 0; i < rows; i += V::W) {
      V most = V::load(top + i), all = V::set(0), logits = V::set(0);
      for (int64_t v = 0; v < tile.words; ++v) {
        R* at = z + v * kPanel<E> + i;
        const V x = V::load(at) + V::set(bias_of(tile, v));
        x.store(at);
        most = max(x, most);
        if (logit_sum && bias_of(tile, v) != -INFINITY) logits = logits + x;
      }
      for (int64_t v = 0; v < tile.words; ++v)
        all = all + V::exp_or_zero(V::load(z + v * kPanel<E> + i) - most);
      most.store(top + i), all.store(exponentials + i), logits.store(plain + i);
    }
    for (int64_t i = 0, n = begin; i < rows; ++i, ++n) {
      if (top[i] != largest[n]) {
        sum[n] *= std::exp(double(largest[n]) - double(top[i]));
        largest[n] = top[i];
      }
      sum[n] += exponentials[i];
      if (logit_sum) logit_sum[n] += plain[i];
    }
  }

  // ---- gradients -----------------------------------------------------------------------------------------

  // Rows are taken in blocks of like size, whole panels each but the last.
  int64_t rows_at_once() const {
    const int64_t blocks = (t.N + kRowsAtOnce - 1) / kRowsAtOnce;
    return round_up((t.N + blocks - 1) / blocks, kPanel<E>);
  }

  void differentiate_tile(int64_t i, Scratch& s, R* hidden) {
    const Tile tile = tile_at(i, s.converted);
    pack_words(tile, s.panels);
    std::fill_n(static_cast<R*>(s.bias), tile.words, R{});
    for (int64_t begin = 0; begin < t.N; begin += s.rows) {
      const int64_t rows = std::min(s.rows, t.N - begin);
      for (int64_t n = 0; n < rows; n += kPanel<E>) {
        logits(tile, (begin + n) / kPanel<E>, s.z + n, s.ld);
        differentiate_logits(tile, begin + n, std::min(rows - n, int64_t(kPanel<E>)), s.z + n, s.ld);
      }
      replace_words(tile, begin, rows, s);
      if (t.grad_bias)
        for (int64_t v = 0; v < tile.words; ++v) s.bias[v] += row_sum(s.z + v * s.ld, rows);
      if constexpr (kSteps == 2) make_pairs(tile.words, rows, s);
      multiply_gradients(tile, begin, rows, s, hidden);
    }
    for (int64_t v = 0; v < tile.words; ++v)
      crf::store_row(t.weight_type, t.grad_weight, (tile.first + v) * t.H, t.H,
                     s.weight + v * padded<E>(t.H));
    if (t.grad_bias) std::copy_n(static_cast<R*>(s.bias), tile.words, t.grad_bias + tile.first);
  }

  void differentiate_logits(const Tile& tile, int64_t begin, int64_t rows, R* z, int64_t ld) const {
    // Lanes without a row come to exactly 0.
    R largest[kPanel<E>], scale[kPanel<E>], shift[kPanel<E>];
    for (int64_t i = 0; i < kPanel<E>; ++i) {
      const bool here = i < rows;
      largest[i] = here ? t.largest[begin + i] : std::numeric_limits<R>::max();
      scale[i] = here ? t.scale[begin + i] : 0;
      shift[i] = here ? -t.shift[begin + i] : 0;
    }
    for (int64_t v = 0; v < tile.words; ++v) {
      const V bias = V::set(bias_of(tile, v));
      for (int64_t i = 0; i < rows; i += V::W) {
        R* at = z + v * ld + i;
        const V e = V::exp_or_zero(V::load(at) + bias - V::load(largest + i));
        V::fma(e, V::load(scale + i), V::load(shift + i)).store(at);
      }
    }
  }

  void replace_words(const Tile& tile, int64_t begin, int64_t rows, Scratch& s) const {
    for_words(tile, t.targets, [&](const TargetWord& w) {
      if (w.row >= begin && w.row < begin + rows)
        s.z[(w.word - tile.first) * s.ld + w.row - begin] = t.at_target[w.row];
    });
    for_words(tile, t.sources, [&](const SourceWord<R>& w) {
      const int64_t end = std::min(begin + rows, w.first + w.count);
      for (int64_t n = std::max(begin, w.first); n < end; ++n)
        s.z[(w.word - tile.first) * s.ld + n - begin] += w.values[n - w.first];
    });
  }

  static R row_sum(const R* x, int64_t n) {
    V all = V::set(0);
    int64_t i = 0;
    for (; i + V::W <= n; i += V::W) all = all + V::load(x + i);
    R total = sum(all);
    for (; i < n; ++i) total += x[i];
    return total;
  }

  // The gradient of the logits, rounded, in both orders.
  static void make_pairs(int64_t words, int64_t rows, Scratch& s) {
    const int64_t columns = round_up(rows, 2);
    for (int64_t v = 0; v < words; v += 2) {
      const R *even = s.z + v * s.ld, *odd = even + s.ld;
      if (v + 1 == words) std::fill_n(s.z + (v + 1) * s.ld, columns, R{});
      uint16_t* rows_even = reinterpret_cast<uint16_t*>(s.by_word + v * s.ld);
      uint16_t* rows_odd = rows_even + 2 * s.ld;
      E* both = s.by_row + v / 2 * s.ld;
      for (int64_t n = 0; n < columns; ++n) {
        const uint16_t a = float_to_bf16(even[n]), b = float_to_bf16(odd[n]);
        rows_even[n] = a;
        rows_odd[n] = b;
        both[n].bits = uint32_t(a) | uint32_t(b) << 16;
      }
    }
  }

  void multiply_gradients(const Tile& tile, int64_t begin, int64_t rows, Scratch& s, R* hidden) const {
    const int64_t width = padded<E>(t.H);
    const E *by_word, *by_row;
    if constexpr (kSteps == 1)
      by_word = by_row = s.z;
    else
      by_word = s.by_word, by_row = s.by_row;
    for (int64_t p = 0; p * kPanel<E> < t.H; ++p) {
      const int64_t column = p * kPanel<E>;
      const int vectors = panel_vectors<E>(t.H, p);
      const E* x = x_depth_n + column * steps<E>(t.N) + begin / kSteps * vectors * kLanes<E>;
      for (int64_t k = 0; k < steps<E>(rows); k += kDepth)
        multiply<E, Rows::contiguous>(tile.words, vectors,
                                      {std::min(kDepth, steps<E>(rows) - k), by_word + k, s.ld,
                                       x + k * vectors * kLanes<E>, s.weight + column, width, begin + k > 0});
      multiply<E, Rows::strided>(
          rows, vectors,
          {steps<E>(tile.words), by_row, s.ld, elements(s.panels) + column * steps<E>(tile.words),
           hidden + begin * width + column, width, true});
    }
  }

  Tiles<R>& t;
  const ParallelFor& parallel;
  const int64_t count;  // of tiles
  const Buffer<E> x_depth_h,
      x_depth_n;  // hidden as panels of rows with depth H, and of columns of H with depth N
};

template <class E>
void run(Tiles<typename Element<E>::Sum>& tiles, const std::function<void()>& between,
         const ParallelFor& parallel) {
  Tiler<E> tiler(tiles, parallel);
  tiler.normalize();
  between();
  if (tiles.gradient) tiler.differentiate();
}

}  // namespace

template <class R>
void run_tiles(Tiles<R>& tiles, const std::function<void()>& between, const ParallelFor& parallel) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>)
    if (tiles.hidden_type == Type::bf16 && __builtin_cpu_supports("avx512bf16"))
      return run<Pair>(tiles, between, parallel);
#endif
  run<R>(tiles, between, parallel);
}

template void run_tiles<float>(Tiles<float>&, const std::function<void()>&, const ParallelFor&);
template void run_tiles<double>(Tiles<double>&, const std::function<void()>&, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
