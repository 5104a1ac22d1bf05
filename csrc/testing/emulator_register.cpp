// The test-only torch ops fastseq_emulator::crf_*: the CUDA kernels themselves, run on CPU tensors by the
// emulator.
#include "crf/cuda/instantiate.cuh"
#include "crf/cuda/ops.h"

FASTSEQ_CRF_OPS(fastseq_emulator, CPU)
