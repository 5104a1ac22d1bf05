// The decoder, all steps of it: one kernel, in which a block has one sequence from its first step to its
// last. Sequences share nothing but the weights, so no block waits for another.
//
//     x = input + W_context ctx        8 lanes a row of W_context
//     gates, h, c                      8 lanes a unit: its four rows of w_ih and of w_hh at once
//     q = W_query [h; c]               8 lanes a row
//     e_i = v . tanh(f_i + q + w cov)  8 lanes a position
//     a = softmax(e), coverage, loss   a thread a position
//     ctx = sum_i a_i m_i              a thread a column of memory
//
// The vectors of the sequence are in shared memory, its positions too where there is room. Nothing but the
// outputs is written; 12 or 13 barriers a step.
//
// Cost of a step, for n positions that are on: W = E M + 4H (E + H) + 2H A weights and n (M + A) elements of
// memory and features are read once, 2 FLOPs each, and n A tanh. With H = 256, E = 128, M = A = 512, n = 400,
// float32: 2.9 MB of weights, 1.6 MB of positions, 0.2 M tanh. Weights come from L2, where all blocks find
// the same; positions too while those of all sequences fit. A multiprocessor that takes 64 bytes a clock from
// L2 needs 70 thousand clocks for that: this bounds a step, however few sequences there are.
//
// What this does not do: fill a GPU with fewer sequences than it has multiprocessors. For that several blocks
// would have to share a sequence, each with a part of the weights in its own shared memory, and meet at a
// barrier of the grid some five times a step.
#pragma once
#include "decoder_block.cuh"

namespace fastseq::pointer::cuda {
namespace decoding {

// The vectors of one sequence.
template <class R>
struct ForwardMemory {
  R *x, *states, *query, *context, *scratch;  // (E), 2 of (2H): [h; c] before and after, (A), (M), (kThreads)

  __device__ ForwardMemory(R* at, const DecoderSizes& n)
      : x(at), states(x + n.E), query(states + 4 * n.H), context(query + n.A), scratch(context + n.M) {}
  static constexpr __host__ __device__ int64_t bytes(const DecoderSizes& n) {
    return (int64_t(n.E + 4 * n.H + n.A + n.M + kThreads) * int64_t(sizeof(R)) + 15) / 16 * 16;
  }
};

// One block's work.
template <class R>
struct Forward {
  const DecoderInputs<R>& in;
  const DecoderOutputs<R>& out;
  const DecoderSizes& n;
  const ForwardMemory<R> own;
  const Positions<R> positions;  // first: scores, then attention; second: coverage
  const int b;
  const R *memory, *features;
  int on = 0;

  __device__ Forward(const DecoderInputs<R>& in, const DecoderOutputs<R>& out, char* shared, char* at)
      : in(in),
        out(out),
        n(in.sizes),
        own(reinterpret_cast<R*>(shared), n),
        positions(at, n.S),
        b(int(blockIdx.x)),
        memory(in.memory + int64_t(n.source(b)) * n.S * n.M),
        features(in.features + int64_t(n.source(b)) * n.S * n.A) {}

  // Element 0 of step t in an array (B,T,size).
  __device__ int64_t at(int t, int size) const { return (int64_t(b) * n.T + t) * size; }
  __device__ const bool* mask() const { return in.mask ? in.mask + int64_t(n.source(b)) * n.S : nullptr; }

  // The state before the first step, and what is written of positions that are off.
  __device__ void begin() {
    on = positions.find(mask(), n.S);
    for (int j = rank(); j < n.H; j += kThreads) {
      own.states[j] = load<R>(in.hidden + int64_t(b) * n.H + j);
      own.states[n.H + j] = load<R>(in.cell + int64_t(b) * n.H + j);
    }
    for (int m = rank(); m < n.M; m += kThreads) own.context[m] = load<R>(in.context + int64_t(b) * n.M + m);
    for (int p = rank(); p < on; p += kThreads)
      positions.second[p] = load<R>(in.coverage + int64_t(b) * n.S + positions.list[p]);
    for (int i = rank(); i < n.S && on < n.S; i += kThreads) {
      if (load_int(mask() + i)) continue;
      const int64_t place = int64_t(b) * n.S + i;
      store(out.coverage + place, load<R>(in.coverage + place));
      for (int t = 0; t < n.T; ++t) store(out.attention + at(t, n.S) + i, R(0));
    }
    __syncthreads();
  }

  __device__ void feed(int t) const {
    for (int e = group(); e < n.E; e += kGroups) {
      const R sum = times_row(in.w_context + int64_t(e) * n.M, own.context, n.M);
      if (part() != 0) continue;
      own.x[e] = load<R>(in.inputs + at(t, n.E) + e) + sum;
      store(out.x + at(t, n.E) + e, own.x[e]);
    }
    __syncthreads();
  }

  // From one state to the other.
  __device__ void recur(int t, const R* before, R* after) const {
    for (int j = group(); j < n.H; j += kGroups) {
      R gates[4] = {};
      add_rows(gates, in.w_ih + int64_t(j) * n.E, int64_t(n.H) * n.E, own.x, n.E);
      add_rows(gates, in.w_hh + int64_t(j) * n.H, int64_t(n.H) * n.H, before, n.H);
#pragma unroll
      for (int g = 0; g < 4; ++g) gates[g] = over_group(gates[g]);
      if (part() != 0) continue;
#pragma unroll
      for (int g = 0; g < 4; ++g) gates[g] += load<R>(in.bias + g * n.H + j);
      const R cell = sigmoid(gates[1]) * before[n.H + j] + sigmoid(gates[0]) * tanh_of(gates[2]);
      const R hidden = sigmoid(gates[3]) * tanh_of(cell);
      after[j] = hidden, after[n.H + j] = cell;
      store(out.hiddens + at(t, n.H) + j, hidden);
      store(out.cells + at(t, n.H) + j, cell);
    }
    __syncthreads();
  }

  __device__ void ask(const R* state) const {
    for (int k = group(); k < n.A; k += kGroups) {
      const R sum = times_row(in.w_query + int64_t(k) * 2 * n.H, state, 2 * n.H);
      if (part() == 0) own.query[k] = load<R>(in.b_query + k) + sum;
    }
    __syncthreads();
  }

  __device__ void score() const {
    for (int p = group(); p < on; p += kGroups) {
      const R* feature = features + int64_t(positions.list[p]) * n.A;
      const R coverage = positions.second[p];
      R sum = 0;
      for (int k = part(); k < n.A; k += kGroup) {
        const R covered = in.w_coverage ? load<R>(in.w_coverage + k) * coverage : R(0);
        sum += load<R>(in.v + k) * tanh_of(load<R>(feature + k) + own.query[k] + covered);
      }
      sum = over_group(sum);
      if (part() == 0) positions.first[p] = sum;
    }
    __syncthreads();
  }

  // Attention of scores; coverage and its loss. A thread reads what it wrote itself.
  __device__ void attend(int t) const {
    R most = -INFINITY, sum = 0, loss = 0;
    for (int p = rank(); p < on; p += kThreads) most = Greatest()(positions.first[p], most);
    most = over_block(most, own.scratch, Greatest());
    for (int p = rank(); p < on; p += kThreads) sum += positions.first[p] = exp_of(positions.first[p] - most);
    sum = over_block(sum, own.scratch, Sum());
    for (int p = rank(); p < on; p += kThreads) {
      const R a = positions.first[p] / sum, coverage = positions.second[p];
      positions.first[p] = a;
      positions.second[p] = coverage + a;
      loss += a <= coverage || a != a ? a : coverage;
      store(out.attention + at(t, n.S) + positions.list[p], a);
    }
    loss = over_block(loss, own.scratch, Sum());
    if (rank() == 0) store(out.coverage_loss + int64_t(b) * n.T + t, loss);
    __syncthreads();  // the scratch
  }

  __device__ void read(int t) const {
    const auto row_of = [&](int p) { return memory + int64_t(positions.list[p]) * n.M; };
    by_columns(n.M, on, positions.first, row_of, own.scratch, [&](int m, R sum) {
      own.context[m] = sum;
      store(out.contexts + at(t, n.M) + m, sum);
    });
    __syncthreads();
  }

  __device__ void run() {
    begin();
    for (int t = 0; t < n.T; ++t) {
      R *before = own.states + t % 2 * 2 * n.H, *after = own.states + (1 - t % 2) * 2 * n.H;
      feed(t);
      recur(t, before, after);
      ask(after);
      score();
      attend(t);
      read(t);
    }
    for (int p = rank(); p < on; p += kThreads)
      store(out.coverage + int64_t(b) * n.S + positions.list[p], positions.second[p]);
  }
};

}  // namespace decoding

// A block a sequence. spare: Positions<R>::bytes a block, or null: they are in shared memory.
template <class R>
__global__ void __launch_bounds__(decoding::kThreads, decoding::kBlocks)
    decoder_kernel(DecoderInputs<R> inputs, DecoderOutputs<R> outputs, char* spare) {
  FASTSEQ_DYNAMIC_SHARED(char, shared);
  char* positions = spare ? spare + blockIdx.x * decoding::Positions<R>::bytes(inputs.sizes.S)
                          : shared + decoding::ForwardMemory<R>::bytes(inputs.sizes);
  decoding::Forward<R>(inputs, outputs, shared, positions).run();
}

}  // namespace fastseq::pointer::cuda
