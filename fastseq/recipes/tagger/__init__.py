"""The tagger recipe: a BiLSTM-CRF for entities, parts of speech, or any tag a token."""

from fastseq.recipes.tagger.compare import compare
from fastseq.recipes.tagger.predict import predict
from fastseq.recipes.tagger.recipe import Config, build

__all__ = ["Config", "build", "compare", "predict"]
