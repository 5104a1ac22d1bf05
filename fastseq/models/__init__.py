"""Whole models, built of fastseq's layers."""

from fastseq.models.image_classifier import ImageClassifier
from fastseq.models.summarizer import PointerGeneratorSummarizer, Summaries
from fastseq.models.tagger import SoftmaxDecoder, Tagger
from fastseq.models.text_classifier import TextClassifier
from fastseq.models.text_regressor import TextRegressor

__all__ = [
    "ImageClassifier",
    "PointerGeneratorSummarizer",
    "SoftmaxDecoder",
    "Summaries",
    "Tagger",
    "TextClassifier",
    "TextRegressor",
]
