// The test-only torch ops fastseq_emulator::*: the CUDA kernels themselves, run on CPU tensors by the
// emulator.
#include "crf/cuda/instantiate.cuh"
#include "crf/cuda/ops.h"
#include "pointer/cuda/decoder_launch.cuh"
#include "pointer/cuda/decoder_ops.h"
#include "pointer/cuda/distribution.cuh"
#include "pointer/cuda/distribution_ops.h"

FASTSEQ_CRF_OPS(fastseq_emulator, CPU)
FASTSEQ_DECODER_OPS(fastseq_emulator, CPU)
FASTSEQ_DISTRIBUTION_OPS(fastseq_emulator, CPU)
