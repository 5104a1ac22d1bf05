// All kernels for one type of emissions: a .cu file each, so that they compile side by side.
#pragma once
#include "nll.cuh"
#include "viterbi.cuh"

#define FASTSEQ_CRF_INSTANTIATE(S, R)                                                     \
  template int64_t nll_workspace(const Batch<S, R>&, bool);                               \
  template void nll(const Batch<S, R>&, R*, const Gradients<S, R>*, char*, cudaStream_t); \
  template int64_t viterbi_workspace(const Batch<S, R>&);                                 \
  template void viterbi(const Batch<S, R>&, int64_t*, R*, R*, cudaStream_t);
