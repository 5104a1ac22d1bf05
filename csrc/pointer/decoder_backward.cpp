// The attention decoder, backward: the recurrent part. Gates and queries of all steps are recomputed first,
// as large products, and tanh step by step. A step is five phases: attention, piece by piece; the pieces
// together; the cell; the LSTM's input and the state before; the context before. The sum that softmax needs
// is d_context . context, plus what does not come from the memory: no pass over the source stands between.
// What is a sum over steps waits for the end, when all of them are known: d_memory is one product, and
// d_features has tanh computed once more, which is cheaper than to read and write d_features in every step.
// Cost of a step and row: S*(2A (tanh + 5 FMA) + M FMA), which reads S*(A+M) numbers, and the products of
// forward twice.
#include "../common/phases.h"
#include "decoder_pieces.h"

namespace fastseq::FASTSEQ_ISA {
namespace decoder {

template <class V, class R = typename V::Scalar>
class Backward {
 public:
  Backward(const pointer::Decoder<R>& in_, const pointer::DecoderSaved<R>& saved_,
           const pointer::DecoderGradients<R>& out_)
      : in(in_), saved(saved_), out(out_), pieces(in_) {
    const int64_t n = pieces.count(), BT = in.B * in.T, BS = in.B * in.S;
    memory.resize(BT * (2 * in.S + in.M + in.A) + BS * 2 + in.B * (1 + in.H * 2) + n * (3 * in.A + 1) +
                  2 * in.A);
    R* p = memory.data();
    const auto take = [&](int64_t size) { return p += size, p - size; };
    coverage = take(BT * in.S), d_attention = take(BT * in.S), queries = take(BT * in.A);
    d_coverage = take(BS), base = take(BS), d_contexts = take(BT * in.M);
    base_sum = take(in.B), d_h = take(in.B * in.H), d_c = take(in.B * in.H);
    d_queries = take(n * in.A), d_w = take(n * in.A), d_v = take(n * in.A), d_scores = take(n);
    w_scaled = take(in.A), v_times_4 = take(in.A);
    for (int64_t k = 0; k < in.A; ++k) v_times_4[k] = 4 * in.v[k];
    for (int64_t k = 0; k < in.A && in.w_coverage; ++k) w_scaled[k] = R(kTanhExponent) * in.w_coverage[k];
  }

  void run(const ParallelFor& parallel) {
    const auto tasks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t blocks = tasks(in.T, kSteps), gate_parts = 4 * tasks(in.H, kPart),
                  query_parts = tasks(in.A, kPart), recompute = in.B * blocks * (gate_parts + query_parts);
    const int64_t of_x = tasks(in.E, kWide);
    const int64_t counts[5] = {pieces.count(), in.B, tasks(in.H, kSlice), of_x + tasks(in.H, kWide),
                               tasks(in.M, kWide)};
    const int64_t steps_end = 2 + 5 * in.T;
    run_phases(
        parallel, steps_end + 2,
        [&](int64_t phase) {
          if (phase == 0) return in.B + recompute;
          if (phase == 1) return in.B;
          if (phase == steps_end) return in.B + 2 * pieces.count();
          return phase > steps_end ? 1 : counts[(phase - 2) % 5];
        },
        [&](int64_t phase, int64_t i) {
          const int64_t t = in.T - 1 - (phase - 2) / 5;
          if (phase == 0) {
            if (i < in.B) return begin_row(i);
            i -= in.B;
            const int64_t part = i % (gate_parts + query_parts), block = i / (gate_parts + query_parts);
            const int64_t b = block / blocks, t0 = block % blocks * kSteps, t1 = std::min(in.T, t0 + kSteps);
            return part < gate_parts ? gates(b, t0, t1, part) : query(b, t0, t1, part - gate_parts);
          }
          if (phase == 1) return prepare(i, in.T - 1);
          if (phase == steps_end) return finish(i);
          if (phase > steps_end) return finish_sums();
          switch ((phase - 2) % 5) {
            case 0:
              return attend(t, i);
            case 1:
              return combine(t, i);
            case 2:
              return cell(t, i * kSlice, std::min(in.H, (i + 1) * kSlice));
            case 3:
              return i < of_x ? input(t, i * kWide, std::min(in.E, (i + 1) * kWide))
                              : state(t, (i - of_x) * kWide, std::min(in.H, (i - of_x + 1) * kWide));
            default:
              return context(t, i * kWide, std::min(in.M, (i + 1) * kWide));
          }
        });
  }

 private:
  static constexpr int64_t kSteps = 32, kPart = 128;  // a task of the products of all steps
  static constexpr int64_t kSlice = 2 * V::W, kWide = kColumns * V::W;
  static constexpr int kTogether = kRegisters == 32 ? 8 : 4;  // positions that share sums over positions

  // Element 0 of row (b, t) of an array (B,T,size), or null.
  const R* at(const R* array, int64_t size, int64_t b, int64_t t) const {
    return array ? array + (b * in.T + t) * size : nullptr;
  }

  void begin_row(int64_t b) {
    const int64_t n = in.on.count(b);
    const int32_t* on = in.on.of(b);
    for (int64_t i = 0; i < n; ++i) {
      R sum = in.coverage[b * in.S + on[i]];
      for (int64_t t = 0; t < in.T; ++t) {
        coverage[(b * in.T + t) * in.S + i] = sum;
        sum += saved.attention[(b * in.T + t) * in.S + on[i]];
      }
      d_coverage[b * in.S + i] = saved.grad_coverage ? saved.grad_coverage[b * in.S + on[i]] : 0;
    }
    std::fill_n(out.features + b * in.S * in.A, in.S * in.A, R(0));
    std::fill_n(out.context + b * in.M, in.M, R(0));
    if (in.T == 0) return;
    R* last = d_contexts + (b * in.T + in.T - 1) * in.M;
    const R* given = at(saved.grad_contexts, in.M, b, in.T - 1);
    for (int64_t k = 0; k < in.M; ++k) last[k] = given ? given[k] : 0;
  }

  // The activations of gate part / parts(H), into out.gates.
  void gates(int64_t b, int64_t t0, int64_t t1, int64_t part) {
    const int64_t parts = (in.H + kPart - 1) / kPart, g = part / parts, j0 = part % parts * kPart,
                  j1 = std::min(in.H, j0 + kPart);
    dots<V, R>(
        t0, t1, g * in.H + j0, g * in.H + j1,
        [&](int64_t t, int64_t n, R sum) { out.gates[(b * in.T + t) * 4 * in.H + n] = in.bias[n] + sum; },
        Term{[&](int64_t t) { return at(saved.x, in.E, b, t); }, in.w_ih, in.E, in.E},
        Term{[&](int64_t t) { return t ? at(saved.hiddens, in.H, b, t - 1) : in.hidden + b * in.H; }, in.w_hh,
             in.H, in.H});
    for (int64_t t = t0; t < t1; ++t)
      for_vectors<V>(j1 - j0, [&](int64_t k, auto lanes) {
        R* p = out.gates + (b * in.T + t) * 4 * in.H + g * in.H + j0 + k;
        const V x = load<V>(p, lanes);
        store(g == 2 ? vtanh(x) : vsigmoid(x), p, lanes);
      });
  }

  // The queries, times the factor in the exponent of tanh.
  void query(int64_t b, int64_t t0, int64_t t1, int64_t part) {
    dots<V, R>(
        t0, t1, part * kPart, std::min(in.A, (part + 1) * kPart),
        [&](int64_t t, int64_t n, R sum) {
          queries[(b * in.T + t) * in.A + n] = R(kTanhExponent) * (in.b_query[n] + sum);
        },
        Term{[&](int64_t t) { return at(saved.hiddens, in.H, b, t); }, in.w_query, 2 * in.H, in.H},
        Term{[&](int64_t t) { return at(saved.cells, in.H, b, t); }, in.w_query + in.H, 2 * in.H, in.H});
  }

  // The part of each weight's gradient that does not come from the memory, and its sum with the weights.
  void prepare(int64_t b, int64_t t) {
    if (t < 0) return;
    const int64_t n = in.on.count(b);
    const int32_t* on = in.on.of(b);
    const R *a = at(saved.attention, in.S, b, t), *given = at(saved.grad_attention, in.S, b, t),
            *cover = at(coverage, in.S, b, t);
    const R loss = saved.grad_loss ? saved.grad_loss[b * in.T + t] : 0;
    R sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const R p = a[on[i]];
      const R d = d_coverage[b * in.S + i] + (given ? given[on[i]] : 0) + (p <= cover[i] ? loss : 0);
      base[b * in.S + i] = d;
      sum += p * d;
    }
    base_sum[b] = sum;
  }

  // The gradients of the scores of positions [begin, begin + P), less the row's common term, into d.
  template <int P>
  FASTSEQ_INLINE void weight_gradients(const R* d_context, const R* rows, const int32_t* on, R* d) const {
    V acc[P];
    for (V& x : acc) x = V::set(0);
    for_vectors<V>(in.M, [&](int64_t k, auto lanes) {
      const V g = load<V>(d_context + k, lanes);
      for (int p = 0; p < P; ++p) acc[p] = V::fma(g, load<V>(rows + on[p] * in.M + k, lanes), acc[p]);
    });
    for (int p = 0; p < P; ++p) d[p] = sum(acc[p]);
  }

  // From the scores' gradients to query and coverage, for P positions: the derivative of tanh is 4 r (1 - r)
  // with r = 1 / (1 + e^2y).
  template <int P>
  FASTSEQ_INLINE void score_gradients(const R* query, R* dq, const R* features, const int32_t* on,
                                      const R* cover, const R* d, R* d_cover) const {
    const bool covers = in.w_coverage != nullptr;
    V dc[P];
    for (V& x : dc) x = V::set(0);
    for_vectors<V>(in.A, [&](int64_t k, auto lanes) {
      const V q = load<V>(query + k, lanes), f = V::set(R(kTanhExponent));
      const V w_exponent = covers ? load<V>(w_scaled + k, lanes) : V::set(0);
      const V w = covers ? load<V>(in.w_coverage + k, lanes) : V::set(0), v = load<V>(v_times_4 + k, lanes);
      V sum_q = V::set(0);
      for (int p = 0; p < P; ++p) {
        V y = V::fma(f, load<V>(features + on[p] * in.A + k, lanes), q);
        if (covers) y = V::fma(V::set(cover[p]), w_exponent, y);
        const V r = V::one_over_one_plus_exp2(y);
        const V dy = V::set(d[p]) * (r - r * r);
        sum_q = sum_q + dy;
        if (covers) dc[p] = V::fma(dy, w * v, dc[p]);
      }
      store(V::fma(sum_q, v, load<V>(dq + k, lanes)), dq + k, lanes);
    });
    if (covers)
      for (int p = 0; p < P; ++p) d_cover[p] += sum(dc[p]);
  }

  // What is a sum over steps, for P positions and one vector of columns: d_features, and the shares of d_v
  // and d_w_coverage.
  template <int P, class Lanes>
  FASTSEQ_INLINE void over_steps(int64_t b, int64_t i, int64_t k, Lanes lanes, V& sum_v, V& sum_w) const {
    const bool covers = in.w_coverage != nullptr;
    const int32_t* on = in.on.of(b) + i;
    const V w_exponent = covers ? load<V>(w_scaled + k, lanes) : V::set(0), v = load<V>(v_times_4 + k, lanes);
    V feature[P], acc[P];
    for (int p = 0; p < P; ++p) {
      feature[p] = V::set(R(kTanhExponent)) * load<V>(in.features + (b * in.S + on[p]) * in.A + k, lanes);
      acc[p] = V::set(0);
    }
    for (int64_t t = 0; t < in.T; ++t) {
      const V q = load<V>(queries + (b * in.T + t) * in.A + k, lanes);
      const int64_t at = (b * in.T + t) * in.S + i;
      for (int p = 0; p < P; ++p) {
        const V c = V::set(coverage[at + p]), de = V::set(d_attention[at + p]);
        V y = feature[p] + q;
        if (covers) y = V::fma(c, w_exponent, y);
        const V r = V::one_over_one_plus_exp2(y), dy = de * (r - r * r);
        acc[p] = acc[p] + dy;
        sum_v = V::fma(de, r, sum_v);
        if (covers) sum_w = V::fma(c, dy, sum_w);
      }
    }
    for (int p = 0; p < P; ++p) store(acc[p] * v, out.features + (b * in.S + on[p]) * in.A + k, lanes);
  }

  void features(int64_t piece) {
    const auto [b, begin, end] = pieces.all[piece];
    for_vectors<V>(in.A, [&, b = b, begin = begin, end = end](int64_t k, auto lanes) {
      V sum_v = V::set(0), sum_w = V::set(0);
      int64_t i = begin;
      for (; i + 4 <= end; i += 4) over_steps<4>(b, i, k, lanes, sum_v, sum_w);
      for (; i < end; ++i) over_steps<1>(b, i, k, lanes, sum_v, sum_w);
      store(sum_v, d_v + piece * in.A + k, lanes);
      store(sum_w * load<V>(v_times_4 + k, lanes), d_w + piece * in.A + k, lanes);
    });
  }

  void attend(int64_t t, int64_t piece) {
    const auto [b, begin, end] = pieces.all[piece];
    const int64_t n = end - begin;
    const int32_t* on = in.on.of(b) + begin;
    const R *g = at(d_contexts, in.M, b, t), *c = at(saved.contexts, in.M, b, t);
    const R *a = at(saved.attention, in.S, b, t), *cover = at(coverage, in.S, b, t) + begin;
    const R loss = saved.grad_loss ? saved.grad_loss[b * in.T + t] : 0;
    V common = V::set(0);
    for_vectors<V>(in.M, [&](int64_t k, auto lanes) {
      common = V::fma(load<V>(g + k, lanes), load<V>(c + k, lanes), common);
    });
    const R mean = sum(common) + base_sum[b];
    R *d = d_attention + (b * in.T + t) * in.S + begin, *d_cover = d_coverage + b * in.S + begin;
    const R* rows = in.memory + b * in.S * in.M;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) weight_gradients<4>(g, rows, on + i, d + i);
    for (; i < n; ++i) weight_gradients<1>(g, rows, on + i, d + i);
    for (i = 0; i < n; ++i) {
      const R p = a[on[i]];
      d[i] = p * (d[i] + base[b * in.S + begin + i] - mean);
      d_scores[piece] += d[i];
      d_cover[i] += p <= cover[i] ? 0 : loss;
    }
    R* dq = d_queries + piece * in.A;
    std::fill_n(dq, in.A, R(0));
    const R *query = at(queries, in.A, b, t), *features = in.features + b * in.S * in.A;
    for (i = 0; i + kTogether <= n; i += kTogether)
      score_gradients<kTogether>(query, dq, features, on + i, cover + i, d + i, d_cover + i);
    for (; i < n; ++i) score_gradients<1>(query, dq, features, on + i, cover + i, d + i, d_cover + i);
  }

  void combine(int64_t t, int64_t b) {
    R* dq = out.query + (b * in.T + t) * in.A;
    std::fill_n(dq, in.A, R(0));
    for (int64_t piece = pieces.first[b]; piece < pieces.first[b + 1]; ++piece)
      for (int64_t k = 0; k < in.A; ++k) dq[k] += d_queries[piece * in.A + k];
    prepare(b, t - 1);
  }

  // d_h and d_c come from the step after, and leave as those of the cell before the gates.
  void cell(int64_t t, int64_t j0, int64_t j1) {
    const auto query = [&](int64_t b) { return at(out.query, in.A, b, t); };
    const auto h = [&](int64_t b) { return d_h + b * in.H; };
    const auto c = [&](int64_t b) { return d_c + b * in.H; };
    columns<V, R>(in.B, j0, j1, query, 1, in.w_query, 2 * in.H, in.A, h, h);
    columns<V, R>(in.B, j0, j1, query, 1, in.w_query + in.H, 2 * in.H, in.A, c, c);
    const V one = V::set(1);
    for (int64_t b = 0; b < in.B; ++b)
      for_vectors<V>(j1 - j0, [&](int64_t from, auto lanes) {
        const int64_t k = j0 + from;
        R* gate = out.gates + (b * in.T + t) * 4 * in.H + k;
        const auto get = [&](const R* p) { return p ? load<V>(p + k, lanes) : V::set(0); };
        const V i = load<V>(gate, lanes), f = load<V>(gate + in.H, lanes),
                g = load<V>(gate + 2 * in.H, lanes), o = load<V>(gate + 3 * in.H, lanes),
                tanh_c = vtanh(get(at(saved.cells, in.H, b, t)));
        const V c_before = get(t ? at(saved.cells, in.H, b, t - 1) : in.cell + b * in.H);
        const V dh = get(h(b)) + get(at(saved.grad_hiddens, in.H, b, t));
        const V dc = V::fma(dh * o, one - tanh_c * tanh_c, get(c(b)) + get(at(saved.grad_cells, in.H, b, t)));
        store(dc * g * i * (one - i), gate, lanes);
        store(dc * c_before * f * (one - f), gate + in.H, lanes);
        store(dc * i * (one - g * g), gate + 2 * in.H, lanes);
        store(dh * tanh_c * o * (one - o), gate + 3 * in.H, lanes);
        store(dc * f, c(b) + k, lanes);
      });
  }

  void input(int64_t t, int64_t c0, int64_t c1) {
    columns<V, R>(
        in.B, c0, c1, [&](int64_t b) { return at(out.gates, 4 * in.H, b, t); }, 1, in.w_ih, in.E, 4 * in.H,
        [&](int64_t b) { return at(saved.grad_x, in.E, b, t); },
        [&](int64_t b) { return out.inputs + (b * in.T + t) * in.E; });
  }

  void state(int64_t t, int64_t c0, int64_t c1) {
    columns<V, R>(
        in.B, c0, c1, [&](int64_t b) { return at(out.gates, 4 * in.H, b, t); }, 1, in.w_hh, in.H, 4 * in.H,
        [&](int64_t) -> const R* { return nullptr; }, [&](int64_t b) { return d_h + b * in.H; });
  }

  void context(int64_t t, int64_t c0, int64_t c1) {
    columns<V, R>(
        in.B, c0, c1, [&](int64_t b) { return at(out.inputs, in.E, b, t); }, 1, in.w_context, in.M, in.E,
        [&](int64_t b) { return t ? at(saved.grad_contexts, in.M, b, t - 1) : nullptr; },
        [&](int64_t b) { return t ? d_contexts + (b * in.T + t - 1) * in.M : out.context + b * in.M; });
  }

  // Rows' states and positions that are off; then d_features and d_memory of each piece.
  void finish(int64_t task) {
    if (task < in.B) return finish_row(task);
    task -= in.B;
    if (task < pieces.count()) return features(task);
    task -= pieces.count();
    const auto [b, begin, end] = pieces.all[task];
    const int32_t* on = in.on.of(b) + begin;
    columns<V, R>(
        end - begin, 0, in.M, [&](int64_t i) { return saved.attention + b * in.T * in.S + on[i]; }, in.S,
        d_contexts + b * in.T * in.M, in.M, in.T, [&](int64_t) -> const R* { return nullptr; },
        [&](int64_t i) { return out.memory + (b * in.S + on[i]) * in.M; });
  }

  void finish_row(int64_t b) {
    const int32_t* on = in.on.of(b);
    for (int64_t s = 0, i = 0; s < in.S; ++s) {
      const int64_t to = b * in.S + s;
      if (i < in.on.count(b) && on[i] == s) {
        out.coverage[to] = d_coverage[b * in.S + i++];
      } else {
        out.coverage[to] = saved.grad_coverage ? saved.grad_coverage[to] : 0;
        std::fill_n(out.memory + to * in.M, in.M, R(0));
      }
    }
    std::copy_n(d_h + b * in.H, in.H, out.hidden + b * in.H);
    std::copy_n(d_c + b * in.H, in.H, out.cell + b * in.H);
  }

  void finish_sums() {
    for (int64_t k = 0; k < in.A; ++k) {
      R w = 0, v = 0;
      for (int64_t piece = 0; piece < pieces.count(); ++piece) {
        w += d_w[piece * in.A + k];
        v += d_scores[piece] - 2 * d_v[piece * in.A + k];  // tanh = 1 - 2 r
      }
      out.v[k] = v;
      if (in.w_coverage) out.w_coverage[k] = w;
    }
  }

  const pointer::Decoder<R>& in;
  const pointer::DecoderSaved<R>& saved;
  const pointer::DecoderGradients<R>& out;
  const Pieces pieces;
  std::vector<R> memory;  // zeros: the state's gradients after the last step, and the sums over steps
  R *coverage, *d_attention, *queries, *d_coverage, *base, *d_contexts, *base_sum, *d_h, *d_c, *d_queries,
      *d_w, *d_v, *d_scores;
  R *w_scaled, *v_times_4;
};

}  // namespace decoder

template <class R>
void decoder_backward(const pointer::Decoder<R>& in, const pointer::DecoderSaved<R>& saved,
                      const pointer::DecoderGradients<R>& out, const ParallelFor& parallel) {
  using V = std::conditional_t<sizeof(R) == 8, WideDouble, Wide>;
  decoder::Backward<V>(in, saved, out).run(parallel);
}

template void decoder_backward(const pointer::Decoder<float>&, const pointer::DecoderSaved<float>&,
                               const pointer::DecoderGradients<float>&, const ParallelFor&);
template void decoder_backward(const pointer::Decoder<double>&, const pointer::DecoderSaved<double>&,
                               const pointer::DecoderGradients<double>&, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
