"""flash_attn's interface on any device, float dtype and head size: names, argument order, defaults and return values.

    from fastseq.flash_attn import flash_attn_func

is what `from flash_attn import flash_attn_func` is in flash_attn 2.8, with fastseq's kernels: on a CPU its own, on a
GPU flash_attn's (where it is installed), torch's or Triton's, whichever is best. What differs is that it does more:
float32 and float64, any head size, softcap with dropout, gradients through block tables, gradients of gradients, and
backward passes that are the same bits each time, which is why `deterministic` changes nothing. `bert_padding` has the
functions of flash_attn.bert_padding.
"""

from fastseq.flash_attn import bert_padding
from fastseq.flash_attn.interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastseq.flash_attn.kvcache import flash_attn_with_kvcache

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
