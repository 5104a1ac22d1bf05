// The torch ops fastseq_cuda::crf_*.
#include "ops.h"

FASTSEQ_CRF_OPS(fastseq_cuda, CUDA)
