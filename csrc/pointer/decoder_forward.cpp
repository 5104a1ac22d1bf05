// The attention decoder, forward. A step is five phases: the LSTM's input; gates and cell; the query; scores,
// their exponentials and the context of each piece of the source; the pieces together.
// Cost of a step and row: S*(A tanh + M FMA), which reads S*(A+M) numbers, and E*M + 4H*(E+H) + 2H*A FMA,
// whose weights are read once for all rows. The tanh's are two thirds of the time.
#include <cmath>

#include "../common/phases.h"
#include "decoder_pieces.h"

namespace fastseq::FASTSEQ_ISA {
namespace decoder {

template <class V, class R = typename V::Scalar>
class Forward {
 public:
  Forward(const pointer::Decoder<R>& in_, const pointer::DecoderOutputs<R>& out_)
      : in(in_), out(out_), pieces(in_) {
    const int64_t n = pieces.count();
    memory.resize(in.B * in.S * 2 + in.B * in.A + n * (2 + in.M) + 2 * in.A);
    R* p = memory.data();
    const auto take = [&](int64_t size) { return p += size, p - size; };
    coverage = take(in.B * in.S), weights = take(in.B * in.S), queries = take(in.B * in.A);
    largest = take(n), sums = take(n), contexts = take(n * in.M);
    w_coverage = take(in.A);
    for (int64_t k = 0; k < in.A && in.w_coverage; ++k) w_coverage[k] = R(kTanhExponent) * in.w_coverage[k];
  }

  void run(const ParallelFor& parallel) {
    const int64_t slice = V::W * 2, wide = 32;
    const auto tasks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t counts[5] = {tasks(in.E, wide), tasks(in.H, slice), tasks(in.A, wide), pieces.count(),
                               in.B};
    // Phase 0 prepares the rows.
    run_phases(
        parallel, 1 + 5 * in.T, [&](int64_t phase) { return phase == 0 ? in.B : counts[(phase - 1) % 5]; },
        [&](int64_t phase, int64_t i) {
          const int64_t t = (phase - 1) / 5;
          if (phase == 0) return begin_row(i);
          switch ((phase - 1) % 5) {
            case 0:
              return input(t, i * wide, std::min(in.E, (i + 1) * wide));
            case 1:
              return cell(t, i * slice, std::min(in.H, (i + 1) * slice));
            case 2:
              return query(t, i * wide, std::min(in.A, (i + 1) * wide));
            case 3:
              return attend(t, i);
            default:
              return combine(t, i);
          }
        });
  }

 private:
  void begin_row(int64_t b) {
    const int64_t m = in.memory_of(b), n = in.on.count(m);
    const int32_t* at = in.on.of(m);
    for (int64_t i = 0; i < n; ++i) coverage[b * in.S + i] = in.coverage[b * in.S + at[i]];
    std::copy_n(in.coverage + b * in.S, in.S, out.coverage + b * in.S);
    if (n < in.S) std::fill_n(out.attention + b * in.T * in.S, in.T * in.S, R(0));
    if (n == 0) std::fill_n(out.contexts + b * in.T * in.M, in.T * in.M, R(0));
    if (n == 0) std::fill_n(out.coverage_loss + b * in.T, in.T, R(0));
  }

  // Row b of a state before step t: its first value, or what the step before left.
  const R* before(const R* first, const R* steps, int64_t size, int64_t b, int64_t t) const {
    return t == 0 ? first + b * size : steps + (b * in.T + t - 1) * size;
  }

  void input(int64_t t, int64_t n0, int64_t n1) {
    dots<V, R>(
        0, in.B, n0, n1,
        [&](int64_t b, int64_t n, R sum) {
          const int64_t at = (b * in.T + t) * in.E + n;
          out.x[at] = in.inputs[at] + sum;
        },
        Term{[&](int64_t b) { return before(in.context, out.contexts, in.M, b, t); }, in.w_context, in.M,
             in.M});
  }

  void cell(int64_t t, int64_t j0, int64_t j1) {
    constexpr int64_t kBlock = 8;
    R gates[4][kBlock][V::W * 2];
    for (int64_t b0 = 0; b0 < in.B; b0 += kBlock) {
      const int64_t b1 = std::min(in.B, b0 + kBlock);
      for (int g = 0; g < 4; ++g)
        dots<V, R>(
            b0, b1, g * in.H + j0, g * in.H + j1,
            [&](int64_t b, int64_t n, R sum) { gates[g][b - b0][n - g * in.H - j0] = in.bias[n] + sum; },
            Term{[&](int64_t b) { return out.x + (b * in.T + t) * in.E; }, in.w_ih, in.E, in.E},
            Term{[&](int64_t b) { return before(in.hidden, out.hiddens, in.H, b, t); }, in.w_hh, in.H, in.H});
      for (int64_t b = b0; b < b1; ++b) {
        const R* c_before = before(in.cell, out.cells, in.H, b, t) + j0;
        const int64_t to = (b * in.T + t) * in.H + j0;
        for_vectors<V>(j1 - j0, [&](int64_t k, auto lanes) {
          const auto gate = [&](int g) { return load<V>(gates[g][b - b0] + k, lanes); };
          const V c =
              V::fma(vsigmoid(gate(1)), load<V>(c_before + k, lanes), vsigmoid(gate(0)) * vtanh(gate(2)));
          store(c, out.cells + to + k, lanes);
          store(vsigmoid(gate(3)) * vtanh(c), out.hiddens + to + k, lanes);
        });
      }
    }
  }

  // The queries, times the factor in the exponent of tanh.
  void query(int64_t t, int64_t n0, int64_t n1) {
    dots<V, R>(
        0, in.B, n0, n1,
        [&](int64_t b, int64_t n, R sum) {
          queries[b * in.A + n] = R(kTanhExponent) * (in.b_query[n] + sum);
        },
        Term{[&](int64_t b) { return out.hiddens + (b * in.T + t) * in.H; }, in.w_query, 2 * in.H, in.H},
        Term{[&](int64_t b) { return out.cells + (b * in.T + t) * in.H; }, in.w_query + in.H, 2 * in.H,
             in.H});
  }

  // Scores of P positions, less the sum of v, which is the same for all and which softmax does not see.
  template <int P>
  FASTSEQ_INLINE void score(int64_t b, const R* features, const int32_t* at, const R* cover,
                            R* scores) const {
    const R* q = queries + b * in.A;
    V acc[P], c[P];
    for (int p = 0; p < P; ++p) acc[p] = V::set(0), c[p] = V::set(cover[p]);
    for_vectors<V>(in.A, [&](int64_t k, auto lanes) {
      const V query = load<V>(q + k, lanes), v = load<V>(in.v + k, lanes), factor = V::set(R(kTanhExponent));
      const V w = in.w_coverage ? load<V>(w_coverage + k, lanes) : V::set(0);
      for (int p = 0; p < P; ++p) {
        V y = V::fma(factor, load<V>(features + at[p] * in.A + k, lanes), query);
        if (in.w_coverage) y = V::fma(c[p], w, y);
        acc[p] = V::fma(v, V::one_over_one_plus_exp2(y), acc[p]);
      }
    });
    for (int p = 0; p < P; ++p) scores[p] = -2 * sum(acc[p]);
  }

  void attend(int64_t, int64_t piece) {
    const auto [b, begin, end] = pieces.all[piece];
    const int64_t m = in.memory_of(b), n = end - begin;
    const int32_t* at = in.on.of(m) + begin;
    const R *features = in.features + m * in.S * in.A, *cover = coverage + b * in.S + begin;
    R* p = weights + b * in.S + begin;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) score<4>(b, features, at + i, cover + i, p + i);
    for (; i < n; ++i) score<1>(b, features, at + i, cover + i, p + i);
    R most = -INFINITY, total = 0;
    for (i = 0; i < n; ++i) most = p[i] > most ? p[i] : most;
    const V shift = V::set(most == -INFINITY ? R(0) : most);
    for_vectors<V>(n,
                   [&](int64_t k, auto lanes) { store(vexp(load<V>(p + k, lanes) - shift), p + k, lanes); });
    for (i = 0; i < n; ++i) total += p[i];
    largest[piece] = most, sums[piece] = total;
    const R* rows = in.memory + m * in.S * in.M;
    R* context = contexts + piece * in.M;
    int64_t k = 0;
    for (; k + 4 * V::W <= in.M; k += 4 * V::W) {
      V acc[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
      for (i = 0; i < n; ++i)
        for (int q = 0; q < 4; ++q)
          acc[q] = V::fma(V::set(p[i]), V::load(rows + at[i] * in.M + k + q * V::W), acc[q]);
      for (int q = 0; q < 4; ++q) acc[q].store(context + k + q * V::W);
    }
    for (; k < in.M; k += V::W) {
      const int64_t lanes = std::min<int64_t>(V::W, in.M - k);
      V acc = V::set(0);
      for (i = 0; i < n; ++i) acc = V::fma(V::set(p[i]), load<V>(rows + at[i] * in.M + k, lanes), acc);
      store(acc, context + k, lanes);
    }
  }

  void combine(int64_t t, int64_t b) {
    const int64_t m = in.memory_of(b), n = in.on.count(m), first = pieces.first[b],
                  last = pieces.first[b + 1];
    if (n == 0) return;
    R most = -INFINITY, total = 0, loss = 0;
    for (int64_t piece = first; piece < last; ++piece) most = std::max(most, largest[piece]);
    // NaN wins over every maximum through its sum; an infinite maximum is NaN, as in torch.softmax.
    const auto factor = [&](int64_t piece) { return std::exp(largest[piece] - most); };
    for (int64_t piece = first; piece < last; ++piece) total += factor(piece) * sums[piece];
    R* context = out.contexts + (b * in.T + t) * in.M;
    R *a = out.attention + (b * in.T + t) * in.S, *p = weights + b * in.S, *cover = coverage + b * in.S;
    const int32_t* at = in.on.of(m);
    std::fill_n(context, in.M, R(0));
    for (int64_t piece = first; piece < last; ++piece) {
      const R scale = factor(piece) / total;
      const R* part = contexts + piece * in.M;
      for (int64_t k = 0; k < in.M; ++k) context[k] += scale * part[k];
      for (int64_t i = pieces.all[piece].begin; i < pieces.all[piece].end; ++i) p[i] *= scale;
    }
    for (int64_t i = 0; i < n; ++i) {
      loss += p[i] <= cover[i] || p[i] != p[i] ? p[i] : cover[i];
      cover[i] += p[i];
      a[at[i]] = p[i];
    }
    out.coverage_loss[b * in.T + t] = loss;
    if (t == in.T - 1)
      for (int64_t i = 0; i < n; ++i) out.coverage[b * in.S + at[i]] = cover[i];
  }

  const pointer::Decoder<R>& in;
  const pointer::DecoderOutputs<R>& out;
  const Pieces pieces;
  std::vector<R> memory;
  R *coverage, *weights, *queries, *largest, *sums, *contexts, *w_coverage;
};

}  // namespace decoder

template <class R>
void decoder_forward(const pointer::Decoder<R>& in, const pointer::DecoderOutputs<R>& out,
                     const ParallelFor& parallel) {
  using V = std::conditional_t<sizeof(R) == 8, WideDouble, Wide>;
  decoder::Forward<V>(in, out).run(parallel);
}

template void decoder_forward(const pointer::Decoder<float>&, const pointer::DecoderOutputs<float>&,
                              const ParallelFor&);
template void decoder_forward(const pointer::Decoder<double>&, const pointer::DecoderOutputs<double>&,
                              const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
