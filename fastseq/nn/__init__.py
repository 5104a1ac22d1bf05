"""Modules: parameters, masks and reductions around `fastseq.functional`."""

from fastseq.nn.constraints import tag_constraints
from fastseq.nn.crf import CRF
from fastseq.nn.pointer import DecoderOutput, PointerGeneratorDecoder

__all__ = ["CRF", "DecoderOutput", "PointerGeneratorDecoder", "tag_constraints"]
