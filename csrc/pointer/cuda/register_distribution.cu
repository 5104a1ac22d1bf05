// The torch ops fastseq_cuda::pointer_distribution and pointer_distribution_grad.
#include "distribution_ops.h"

FASTSEQ_DISTRIBUTION_OPS(fastseq_cuda, CUDA)
