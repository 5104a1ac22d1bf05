#include "instantiate.cuh"

namespace fastseq::crf::cuda {
FASTSEQ_CRF_INSTANTIATE(bf16, float)
}
