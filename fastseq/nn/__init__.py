"""Modules: parameters, masks and reductions around `fastseq.functional`."""

from fastseq.nn.constraints import tag_constraints
from fastseq.nn.crf import CRF

__all__ = ["CRF", "tag_constraints"]
