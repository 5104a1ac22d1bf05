"""Pointer-generators (See, Liu, Manning 2017): the loss, the output distribution, and the decoder."""

from fastseq.ops.pointer import decoder, distribution, nll

__all__ = ["decoder", "distribution", "nll"]
