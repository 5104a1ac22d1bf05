"""Whole models, built of fastseq's layers."""

from fastseq.models.summarizer import PointerGeneratorSummarizer, Summaries
from fastseq.models.tagger import SoftmaxDecoder, Tagger

__all__ = ["PointerGeneratorSummarizer", "SoftmaxDecoder", "Summaries", "Tagger"]
