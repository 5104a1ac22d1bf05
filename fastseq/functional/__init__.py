"""The stateless public functions: each checks its arguments, then makes one op call."""

from fastseq.functional.attention import attention
from fastseq.functional.crf import (
    crf_entropy,
    crf_log_likelihood,
    crf_log_partition,
    crf_marginals,
    crf_nbest,
    crf_sample,
    crf_token_log_likelihood,
    crf_viterbi,
)
from fastseq.functional.disentangled import disentangled_attention, relative_slots
from fastseq.functional.distribution import pointer_generator_distribution, pointer_generator_topk
from fastseq.functional.pointer import copynet_nll, pointer_generator_nll

__all__ = [
    "attention",
    "copynet_nll",
    "crf_entropy",
    "crf_log_likelihood",
    "crf_log_partition",
    "crf_marginals",
    "crf_nbest",
    "crf_sample",
    "crf_token_log_likelihood",
    "crf_viterbi",
    "disentangled_attention",
    "pointer_generator_distribution",
    "pointer_generator_nll",
    "pointer_generator_topk",
    "relative_slots",
]
