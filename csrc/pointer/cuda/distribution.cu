#include "distribution.cuh"

#define FASTSEQ_INSTANTIATE(S, R)                                                                      \
  template void distribution(const Mixture<S, R>&, const SourceOrder&, R*, cudaStream_t);              \
  template void distribution_grad(const Mixture<S, R>&, const Rows<R>&, const MixtureGradients<S, R>&, \
                                  cudaStream_t);

namespace fastseq::pointer::cuda {
FASTSEQ_INSTANTIATE(double, double)
FASTSEQ_INSTANTIATE(float, float)
FASTSEQ_INSTANTIATE(bf16, float)
FASTSEQ_INSTANTIATE(f16, float)
}  // namespace fastseq::pointer::cuda
