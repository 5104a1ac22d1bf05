// The torch ops fastseq_cuda::pointer_decoder and pointer_decoder_grad.
#include "decoder_ops.h"

FASTSEQ_DECODER_OPS(fastseq_cuda, CUDA)
