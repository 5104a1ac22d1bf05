"""The stateless public functions: each checks its arguments, then makes one op call."""

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
from fastseq.functional.distribution import pointer_generator_distribution, pointer_generator_topk
from fastseq.functional.pointer import copynet_nll, pointer_generator_nll

__all__ = [
    "copynet_nll",
    "crf_entropy",
    "crf_log_likelihood",
    "crf_log_partition",
    "crf_marginals",
    "crf_nbest",
    "crf_sample",
    "crf_token_log_likelihood",
    "crf_viterbi",
    "pointer_generator_distribution",
    "pointer_generator_nll",
    "pointer_generator_topk",
]
