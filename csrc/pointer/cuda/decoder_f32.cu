#include "decoder_launch.cuh"

namespace fastseq::pointer::cuda {
FASTSEQ_DECODER_INSTANTIATE(float)
}
