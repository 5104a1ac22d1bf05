// The second of the four kernels of the decoder's gradient, the only one that is sequential: from the last
// step to the first.
//
//     1. recompute   gates and queries of all steps                                  (decoder_recompute.cuh)
//     2. sweep       a block a sequence: gradients of gates, queries, inputs, and of the state before the
//                    first step                                                      <- this file
//     3. positions   a block some positions of a source: gradients of memory and features, and shares of
//                    those of v and w_coverage, as sums over all steps               (decoder_positions.cuh)
//     4. reduce      the sums of the shares                                          (decoder_positions.cuh)
//
// A step, for gradients dctx, dh, dc and dcov that come from the step after:
//
//     da_i = m_i . dctx + dcov_i       8 lanes a position; then de = a (da - sum a da)
//     dq, dcov                         a warp a position: tanh again; columns in pieces of 32 kColumns
//     d[h; c] += W_query^T dq          a thread a column, as in all that follow
//     dgates                           a thread a unit
//     dx = W_ih^T dgates, dh = W_hh^T dgates, dctx = W_context^T dx
//
// Cost of a step: that of a forward step (decoder_forward.cuh, with the same bound by what one
// multiprocessor reads), less the coverage's own sums, which are taken before the loop; 2 bytes of scratch
// are written and read for each byte of attention. Nothing is added to memory that another block writes.
#pragma once
#include "decoder_block.cuh"

namespace fastseq::pointer::cuda {
namespace decoding {

constexpr int kColumns = 4, kPiece = 32 * kColumns;  // columns of features at a time

template <class R>
struct SweepMemory {
  R *state, *gates, *x, *context, *query;  // gradients: [h; c] (2H), (4H), (E), (M), (A)
  R* scratch;                              // (kWarps, kPiece)

  __device__ SweepMemory(R* at, const DecoderSizes& n)
      : state(at),
        gates(state + 2 * n.H),
        x(gates + 4 * n.H),
        context(x + n.E),
        query(context + n.M),
        scratch(query + n.A) {}
  static constexpr __host__ __device__ int64_t bytes(const DecoderSizes& n) {
    return (int64_t(6 * n.H + n.E + n.M + n.A + kWarps * kPiece) * int64_t(sizeof(R)) + 15) / 16 * 16;
  }
};

// One block's work.
template <class R>
struct Sweep {
  const DecoderInputs<R>& in;
  const DecoderSaved<R>& saved;
  const DecoderArriving<R>& arriving;
  const DecoderGradients<R>& out;
  const DecoderScratch<R>& scratch;
  const DecoderSizes& n;
  const SweepMemory<R> own;
  const Positions<R> positions;  // first: gradients of attention, then of scores; second: of coverage
  const int b;
  int on = 0;

  __device__ Sweep(const DecoderInputs<R>& in, const DecoderSaved<R>& saved,
                   const DecoderArriving<R>& arriving, const DecoderGradients<R>& out,
                   const DecoderScratch<R>& scratch, char* shared, char* at)
      : in(in),
        saved(saved),
        arriving(arriving),
        out(out),
        scratch(scratch),
        n(in.sizes),
        own(reinterpret_cast<R*>(shared), n),
        positions(at, n.S),
        b(int(blockIdx.x)) {}

  __device__ int64_t at(int t, int size) const { return (int64_t(b) * n.T + t) * size; }
  __device__ static R optional(const R* from, int64_t place) { return from ? load<R>(from + place) : R(0); }

  // No gradients yet; the coverage before each step, in the order in which the forward pass added it up.
  __device__ void begin() {
    on = positions.find(in.mask ? in.mask + int64_t(b) * n.S : nullptr, n.S);
    for (int j = rank(); j < 2 * n.H; j += kThreads) own.state[j] = 0;
    for (int m = rank(); m < n.M; m += kThreads) own.context[m] = 0;
    for (int p = rank(); p < on; p += kThreads) {
      const int i = positions.list[p];
      positions.second[p] = optional(arriving.coverage, int64_t(b) * n.S + i);
      R coverage = load<R>(in.coverage + int64_t(b) * n.S + i);
      for (int t = 0; t < n.T; ++t) {
        store(scratch.coverage + at(t, n.S) + i, coverage);
        coverage += load<R>(saved.attention + at(t, n.S) + i);
      }
    }
    __syncthreads();
  }

  // The context of step t.
  __device__ void context(int t) const {
    for (int m = rank(); m < n.M; m += kThreads) {
      own.context[m] += optional(arriving.contexts, at(t, n.M) + m);
      store(scratch.contexts + at(t, n.M) + m, own.context[m]);
    }
    __syncthreads();
  }

  // Gradients of the attention, of which the coverage after it and its loss are made, too.
  __device__ void attention(int t) const {
    const R of_loss = optional(arriving.coverage_loss, int64_t(b) * n.T + t);
    for (int p = group(); p < on; p += kGroups) {
      const int64_t i = positions.list[p], place = at(t, n.S) + i;
      const R sum = times_row(in.memory + (int64_t(b) * n.S + i) * n.M, own.context, n.M);
      if (part() != 0) continue;
      const R a = load<R>(saved.attention + place);
      const bool is_least = a <= load<R>(scratch.coverage + place);
      R& of_coverage = positions.second[p];
      positions.first[p] =
          sum + of_coverage + optional(arriving.attention, place) + (is_least ? of_loss : R(0));
      of_coverage += is_least ? R(0) : of_loss;
    }
    __syncthreads();
  }

  __device__ void softmax(int t) const {
    const R* attention = saved.attention + at(t, n.S);
    R sum = 0;
    for (int p = rank(); p < on; p += kThreads)
      sum += load<R>(attention + positions.list[p]) * positions.first[p];
    sum = over_block(sum, own.scratch, Sum());
    for (int p = rank(); p < on; p += kThreads) {
      const int i = positions.list[p];
      positions.first[p] = load<R>(attention + i) * (positions.first[p] - sum);
      store(scratch.scores + at(t, n.S) + i, positions.first[p]);
    }
    __syncthreads();
  }

  // Columns `first` and on of the features: a warp's share of the query's gradient, and all that these
  // columns add to the coverage's.
  __device__ void score_piece(int t, int first) const {
    R query[kColumns], v[kColumns], covered[kColumns], sums[kColumns] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int k = first + 32 * c + lane();
      query[c] = k < n.A ? load<R>(scratch.query + at(t, n.A) + k) : R(0);
      v[c] = k < n.A ? load<R>(in.v + k) : R(0);
      covered[c] = k < n.A && in.w_coverage ? load<R>(in.w_coverage + k) : R(0);
    }
    for (int p = warp(); p < on; p += kWarps) {
      const int64_t i = positions.list[p];
      const R* feature = in.features + (int64_t(b) * n.S + i) * n.A + first + lane();
      const R coverage = in.w_coverage ? load<R>(scratch.coverage + at(t, n.S) + i) : R(0);
      R of_coverage = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (first + 32 * c + lane() >= n.A) continue;
        const R u = tanh_of(load<R>(feature + 32 * c) + query[c] + covered[c] * coverage);
        const R gradient = positions.first[p] * v[c] * (R(1) - u * u);
        sums[c] += gradient;
        of_coverage += gradient * covered[c];
      }
      if (!in.w_coverage) continue;
      of_coverage = over_warp(of_coverage, Sum());
      if (lane() == 0) positions.second[p] += of_coverage;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) own.scratch[warp() * kPiece + 32 * c + lane()] = sums[c];
  }

  __device__ void score(int t) const {
    for (int first = 0; first < n.A; first += kPiece) {
      score_piece(t, first);
      __syncthreads();
      const int k = first + rank();
      if (rank() < kPiece && k < n.A) {
        R sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += own.scratch[w * kPiece + rank()];
        own.query[k] = sum;
        store(out.query + at(t, n.A) + k, sum);
      }
      __syncthreads();
    }
  }

  __device__ void ask() const {
    const auto row_of = [&](int r) { return in.w_query + int64_t(r) * 2 * n.H; };
    by_columns(2 * n.H, n.A, own.query, row_of, own.scratch, [&](int j, R sum) { own.state[j] += sum; });
    __syncthreads();
  }

  __device__ void cell(int t) const {
    R* gates = out.gates + at(t, 4 * n.H);  // where the first kernel has left the gates themselves
    for (int j = rank(); j < n.H; j += kThreads) {
      const R i = load<R>(gates + j), f = load<R>(gates + n.H + j), g = load<R>(gates + 2 * n.H + j),
              o = load<R>(gates + 3 * n.H + j), u = tanh_of(load<R>(saved.cells + at(t, n.H) + j));
      const R before =
          t ? load<R>(saved.cells + at(t - 1, n.H) + j) : load<R>(in.cell + int64_t(b) * n.H + j);
      const R hidden = own.state[j] + optional(arriving.hiddens, at(t, n.H) + j);
      const R cell = own.state[n.H + j] + optional(arriving.cells, at(t, n.H) + j) + hidden * o * (1 - u * u);
      const R of_gates[4] = {cell * g * i * (1 - i), cell * before * f * (1 - f), cell * i * (1 - g * g),
                             hidden * u * o * (1 - o)};
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        own.gates[gate * n.H + j] = of_gates[gate];
        store(gates + gate * n.H + j, of_gates[gate]);
      }
      own.state[n.H + j] = cell * f;
    }
    __syncthreads();
  }

  __device__ void recur(int t) const {
    const auto ih = [&](int r) { return in.w_ih + int64_t(r) * n.E; };
    by_columns(n.E, 4 * n.H, own.gates, ih, own.scratch, [&](int e, R sum) {
      own.x[e] = sum + optional(arriving.x, at(t, n.E) + e);
      store(out.inputs + at(t, n.E) + e, own.x[e]);
    });
    __syncthreads();
    const auto hh = [&](int r) { return in.w_hh + int64_t(r) * n.H; };
    by_columns(n.H, 4 * n.H, own.gates, hh, own.scratch, [&](int j, R sum) { own.state[j] = sum; });
    __syncthreads();
  }

  __device__ void feed() const {
    const auto row_of = [&](int r) { return in.w_context + int64_t(r) * n.M; };
    by_columns(n.M, n.E, own.x, row_of, own.scratch, [&](int m, R sum) { own.context[m] = sum; });
    __syncthreads();
  }

  // The gradients of what was there before the first step.
  __device__ void end() const {
    for (int j = rank(); j < n.H; j += kThreads) {
      store(out.hidden + int64_t(b) * n.H + j, own.state[j]);
      store(out.cell + int64_t(b) * n.H + j, own.state[n.H + j]);
    }
    for (int m = rank(); m < n.M; m += kThreads) store(out.context + int64_t(b) * n.M + m, own.context[m]);
    for (int p = rank(); p < on; p += kThreads)
      store(out.coverage + int64_t(b) * n.S + positions.list[p], positions.second[p]);
    for (int i = rank(); i < n.S && on < n.S; i += kThreads) {
      const int64_t place = int64_t(b) * n.S + i;
      if (!load_int(in.mask + place)) store(out.coverage + place, optional(arriving.coverage, place));
    }
  }

  __device__ void run() {
    begin();
    for (int t = n.T - 1; t >= 0; --t) {
      context(t);
      attention(t);
      softmax(t);
      score(t);
      ask();
      cell(t);
      recur(t);
      feed();
    }
    end();
  }
};

}  // namespace decoding

// A block a sequence. spare: Positions<R>::bytes a block, or null: they are in shared memory.
template <class R>
__global__ void __launch_bounds__(decoding::kThreads, decoding::kBlocks)
    decoder_sweep_kernel(DecoderInputs<R> inputs, DecoderSaved<R> saved, DecoderArriving<R> arriving,
                         DecoderGradients<R> gradients, DecoderScratch<R> scratch, char* spare) {
  FASTSEQ_DYNAMIC_SHARED(char, shared);
  char* positions = spare ? spare + blockIdx.x * decoding::Positions<R>::bytes(inputs.sizes.S)
                          : shared + decoding::SweepMemory<R>::bytes(inputs.sizes);
  decoding::Sweep<R>(inputs, saved, arriving, gradients, scratch, shared, positions).run();
}

}  // namespace fastseq::pointer::cuda
