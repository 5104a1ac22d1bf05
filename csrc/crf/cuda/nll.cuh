// nll and its gradient, from the host: the choice of the regime, the sizes, and at most four launches.
//
// Memory besides inputs and outputs, for B rows of T positions (N = B*T), K tags, KM of them with padding, s
// bytes an emission, segments of C = 16 positions (4 beyond K = 128): checkpoints 8 N KM / C bytes; shares of
// the gradient 4 K^2 bytes for each of at most max(s N / 16K, 32) + 7 owners; and for the rows that are done
// exactly about 16 sqrt(T) K + 8 K^2 bytes for each of at most 64 blocks. Nothing of it depends on the
// values, so a call can be captured in a CUDA graph.
//
// Global memory traffic with a gradient, in bytes: the emissions are read three times (by the two sweeps and
// the posterior kernel) and the gradient is written once, 4 s N K; checkpoints are written and read, 16 N KM
// / C; shares are cleared, added to and read, 16 K^2 an owner. The least that two recursions and a gradient
// can do is 3 s N K. Where s N / 16K is at least 32, and KM < 2 K, the sum is within twice that; a smaller
// batch has more shares than it would need, and moves several times the least. Parameters, which every team
// reads, and most shares come from a cache.
#pragma once
#include <algorithm>

#include "exact.cuh"
#include "kernels.h"
#include "posterior.cuh"
#include "reduce.cuh"

namespace fastseq::crf::cuda {

// Hands out pieces of one buffer; without a buffer it only adds up what is needed.
class Workspace {
 public:
  explicit Workspace(char* memory) : memory_(memory) {}
  template <class E>
  E* take(int64_t n) {
    const int64_t at = size_;
    size_ += (n * int64_t(sizeof(E)) + 15) / 16 * 16;
    return memory_ ? reinterpret_cast<E*>(memory_ + at) : nullptr;
  }
  int64_t size() const { return size_; }

 private:
  char* memory_;
  int64_t size_ = 0;
};

// Calls f(regime) with the regime for K tags.
template <class F>
void with_regime(int K, const F& f) {
  if (K <= 16)
    f(Registers<16, 1>());
  else if (K <= 32)
    f(Registers<32, 1>());
  else if (K <= 64)
    f(Registers<64, 4>());
  else if (K <= 128)
    f(Registers<128, 2>());
  else
    f(Streamed());
}

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Rows that are done exactly: blocks enough to share the work, and at most 64 MiB of sums.
struct Exact {
  int blocks = 0;
  double *memory = nullptr, *partials = nullptr;
  uint8_t* used = nullptr;

  Exact(int B, int T, int K, bool gradient, Workspace& workspace) {
    const int64_t affordable = gradient ? (int64_t(64) << 20) / (8 * partial_size(K)) : 64;
    blocks = B ? int(std::max<int64_t>(1, std::min<int64_t>({int64_t(B), 64, affordable}))) : 0;
    memory = workspace.take<double>(blocks * exact_workspace(T, K));
    if (!gradient) return;
    partials = workspace.take<double>(blocks * partial_size(K));
    used = workspace.take<uint8_t>(blocks);
  }
};

// Rows in the scaled domain; `sweeps` all null where there is none.
struct Scaled {
  Sweeps sweeps{};
  int blocks = 0, owners = 0;  // of the posterior kernel
  float* partials = nullptr;

  Scaled() = default;

  // s: bytes of an emission.
  template <class Regime>
  Scaled(Regime, int B, int T, int K, int s, bool gradient, Workspace& workspace) {
    sweeps.segments = int(ceil_div(T, Regime::kSegment));
    sweeps.first = workspace.take<int>(B);
    sweeps.last = workspace.take<int>(B);
    sweeps.marks = workspace.take<uint8_t>(2 * B);
    if (!gradient) return;
    const int64_t tasks = int64_t(B) * sweeps.segments;
    sweeps.alpha = workspace.take<float>(tasks * Regime::row(K));
    sweeps.beta = workspace.take<float>(tasks * Regime::row(K));
    sweeps.tag_before = workspace.take<int>(tasks);
    // As many owners as segments, while their shares of the gradient cost less than a third of the least.
    const int64_t affordable = std::max<int64_t>(int64_t(s) * B * T / (16 * K), 32);
    blocks = int(ceil_div(std::min(tasks, affordable), Regime::Team::kPerBlock));
    owners = blocks * Regime::Team::kPerBlock;
    partials = workspace.take<float>(owners * partial_size(K));
  }
};

// The division of a workspace among all kernels: the same for its size as for its use.
template <class S, class R>
struct Plan {
  Workspace workspace;
  Exact exact;
  Scaled scaled;

  Plan(const Batch<S, R>& batch, bool gradient, char* memory)
      : workspace(memory), exact(batch.B, batch.T, batch.K, gradient, workspace) {
    if constexpr (std::is_same_v<R, float>)  // float64 is done exactly throughout
      with_regime(batch.K, [&](auto regime) {
        scaled = Scaled(regime, batch.B, batch.T, batch.K, int(sizeof(S)), gradient, workspace);
      });
  }
};

template <class Regime, class S>
void launch_scaled(const Batch<S, float>& batch, const Scaled& scaled, float* nll,
                   const Gradient<S>& gradient, cudaStream_t stream) {
  using Team = typename Regime::Team;
  const int shared = Segment<Regime>::bytes(batch.K) * Team::kPerBlock;
  const dim3 teams(unsigned(ceil_div(batch.B, Team::kPerBlock)), scaled.sweeps.beta ? 2 : 1);
  FASTSEQ_LAUNCH((sweep_kernel<S, Regime>), teams, dim3(Team::kBlock), shared, stream, batch, scaled.sweeps,
                 nll);
  if (scaled.blocks > 0)
    FASTSEQ_LAUNCH((posterior_kernel<S, Regime>), dim3(unsigned(scaled.blocks)), dim3(Team::kBlock), shared,
                   stream, batch, scaled.sweeps, gradient, scaled.partials);
}

template <class S, class R>
int64_t nll_workspace(const Batch<S, R>& batch, bool gradient) {
  return Plan<S, R>(batch, gradient, nullptr).workspace.size();
}

template <class S, class R>
void nll(const Batch<S, R>& batch, R* nll, const Gradients<S, R>* gradients, char* workspace,
         cudaStream_t stream) {
  const Plan<S, R> plan(batch, gradients, workspace);
  const Exact& exact = plan.exact;
  const Gradient<S> gradient = gradients ? gradients->x : Gradient<S>{};
  if (batch.B > 0) {
    if constexpr (std::is_same_v<R, float>)
      with_regime(batch.K, [&](auto regime) {
        launch_scaled<decltype(regime)>(batch, plan.scaled, nll, gradient, stream);
      });
    FASTSEQ_LAUNCH((exact_kernel<S, R>), dim3(exact.blocks), dim3(exact::Block::kBlock), 0, stream, batch,
                   plan.scaled.sweeps.marks, nll, gradient, exact.memory, exact.partials, exact.used);
  }
  if (gradients)
    FASTSEQ_LAUNCH((reduce_kernel<R>), dim3(reduce_grid(batch.K)), dim3(reduce::Block::kBlock), 0, stream,
                   batch.K, batch.B, nll, batch.weights, batch.scale, plan.scaled.partials,
                   plan.scaled.owners, exact.partials, exact.used, exact.blocks, gradients->total,
                   gradients->transitions, gradients->start, gradients->end);
}

}  // namespace fastseq::crf::cuda
