"""The tagger recipe: a BiLSTM-CRF for entities, parts of speech, or any tag a token."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.tagger.plain import plain
from fastseq.recipes.tagger.predict import predict
from fastseq.recipes.tagger.recipe import Config, build

__all__ = ["Config", "build", "compare", "plain", "predict"]


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """See `comparison`; it is imported here, so that prediction does not wait for what it needs."""
    from fastseq.recipes.tagger import comparison

    return comparison.compare(config, sentences)
