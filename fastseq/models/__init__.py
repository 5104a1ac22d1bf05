"""Whole models, built of fastseq's layers."""

from fastseq.models.tagger import SoftmaxDecoder, Tagger

__all__ = ["SoftmaxDecoder", "Tagger"]
