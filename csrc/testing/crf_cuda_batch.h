// A problem as the CUDA kernels take it, for the tests that run them in the emulator.
#pragma once
#include "crf/cuda/batch.cuh"
#include "testing/crf_problem.h"

namespace fastseq::testing {

namespace device = fastseq::crf::cuda;

// By what a position is off.
enum class Off { tag, mask, either };

// Tags and mask as the kernels read them. A tag that nobody may look at is nonsense.
struct Positions {
  Memory<int64_t> tags;
  Memory<bool> mask;  // (T,B)
  bool masked;

  Positions(const Problem& p, Off off)
      : tags(p.tags), mask(p.B * p.T), masked(!p.tagged || off != Off::tag || p.rows.positions.empty()) {
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t t = 0; t < p.T; ++t) {
        int64_t& tag = tags[b * p.T + t];
        const bool on = tag != device::kTagOff, by_mask = !p.tagged || off == Off::mask || (b + t) % 2 == 0;
        mask[t * p.B + b] = on || !by_mask;
        if (!on && by_mask && masked) tag = p.K + 17;
      }
    }
  }
};

// All positions on, without tags and weights: those are for the caller to add.
template <class S, class R>
device::Batch<S, R> device_batch(const Problem& p, const View& view, const Parameters<R>& parameters) {
  device::Batch<S, R> batch{};
  batch.B = int(p.B), batch.T = int(p.T), batch.K = int(p.K);
  batch.x = {reinterpret_cast<const S*>(view.memory.data()), view.stride_b, view.stride_t};
  batch.transitions = parameters.transitions.data();
  batch.start = parameters.start.data(), batch.end = parameters.end.data();
  batch.scale = 1;
  return batch;
}

// The same with tags or mask, by which positions are off.
template <class S, class R>
device::Batch<S, R> device_batch(const Problem& p, const View& view, const Parameters<R>& parameters,
                                 const Positions& positions) {
  device::Batch<S, R> batch = device_batch<S>(p, view, parameters);
  if (p.tagged) batch.tags = {positions.tags.data(), p.T, 1};
  if (positions.masked) batch.mask = {positions.mask.data(), 1, p.B};
  return batch;
}

}  // namespace fastseq::testing
