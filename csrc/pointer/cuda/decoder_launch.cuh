// The decoder and its gradient, from the host: sizes of memory, and the launches, one forward and four back.
#pragma once
#include "decoder_forward.cuh"
#include "decoder_positions.cuh"
#include "decoder_recompute.cuh"
#include "decoder_sweep.cuh"

namespace fastseq::pointer::cuda {
namespace decoding {

constexpr int64_t kShared = 64 << 10;  // bytes a block may have on every architecture

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// What a block needs where its positions are in shared memory, too; and whether they are.
struct Room {
  int64_t vectors, positions;
  bool together() const { return vectors + positions <= kShared; }
  int64_t shared() const { return together() ? vectors + positions : vectors; }
  int64_t spare(int B) const { return together() ? 0 : B * positions; }
};

constexpr DecoderSizes kLargest{1, 1, 1, 0, kMaxEmbedding, kMaxHidden, kMaxMemory, kMaxAttention};
static_assert(ForwardMemory<double>::bytes(kLargest) <= kShared &&
              SweepMemory<double>::bytes(kLargest) <= kShared &&
              Recompute<double>::bytes(kLargest) <= kShared);

template <class R>
Room room_forward(const DecoderSizes& n) {
  return {ForwardMemory<R>::bytes(n), Positions<R>::bytes(n.S)};
}
template <class R>
Room room_back(const DecoderSizes& n) {
  return {SweepMemory<R>::bytes(n), Positions<R>::bytes(n.S)};
}

}  // namespace decoding

template <class R>
int64_t decoder_spare(const DecoderSizes& n) {
  return decoding::room_forward<R>(n).spare(n.B);
}
template <class R>
int64_t decoder_grad_spare(const DecoderSizes& n) {
  return decoding::room_back<R>(n).spare(n.B);
}

template <class R>
void decoder(const DecoderInputs<R>& inputs, const DecoderOutputs<R>& outputs, char* spare,
             cudaStream_t stream) {
  const decoding::Room room = decoding::room_forward<R>(inputs.sizes);
  if (inputs.sizes.B > 0)
    FASTSEQ_LAUNCH((decoder_kernel<R>), dim3(inputs.sizes.B), dim3(decoding::kThreads), room.shared(), stream,
                   inputs, outputs, room.together() ? nullptr : spare);
}

template <class R>
void decoder_grad(const DecoderInputs<R>& inputs, const DecoderSaved<R>& saved,
                  const DecoderArriving<R>& arriving, const DecoderGradients<R>& gradients,
                  const DecoderScratch<R>& scratch, char* spare, cudaStream_t stream) {
  using namespace decoding;
  const DecoderSizes& n = inputs.sizes;
  const Room room = room_back<R>(n);
  const int64_t steps = int64_t(n.B) * n.T;
  if (steps > 0)
    FASTSEQ_LAUNCH((decoder_recompute_kernel<R>), dim3(unsigned(ceil_div(steps, Recompute<R>::kSteps))),
                   dim3(kThreads), Recompute<R>::bytes(n), stream, inputs, saved, gradients.gates,
                   scratch.query);
  if (n.B > 0)
    FASTSEQ_LAUNCH((decoder_sweep_kernel<R>), dim3(n.B), dim3(kThreads), room.shared(), stream, inputs, saved,
                   arriving, gradients, scratch, room.together() ? nullptr : spare);
  if (decoder_owners(n) > 0)
    FASTSEQ_LAUNCH((decoder_positions_kernel<R>), dim3(n.B, decoder_tiles(n)), dim3(kTileThreads),
                   Tile<R>::kBytes, stream, inputs, saved.attention, scratch, gradients.memory,
                   gradients.features);
  if (n.A > 0)
    FASTSEQ_LAUNCH((decoder_reduce_kernel<R>), dim3(unsigned(ceil_div(2 * n.A, kOutputs))),
                   dim3(kOutputs * kSlices), kOutputs * kSlices * sizeof(double), stream, n.A,
                   decoder_owners(n), scratch.partials, gradients.v, gradients.w_coverage);
}

}  // namespace fastseq::pointer::cuda

#define FASTSEQ_DECODER_INSTANTIATE(R)                                                                   \
  template int64_t decoder_spare<R>(const DecoderSizes&);                                                \
  template int64_t decoder_grad_spare<R>(const DecoderSizes&);                                           \
  template void decoder(const DecoderInputs<R>&, const DecoderOutputs<R>&, char*, cudaStream_t);         \
  template void decoder_grad(const DecoderInputs<R>&, const DecoderSaved<R>&, const DecoderArriving<R>&, \
                             const DecoderGradients<R>&, const DecoderScratch<R>&, char*, cudaStream_t);
