"""The classifier recipe: a label for a text, by a fine-tuned encoder."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.classifier.predict import predict
from fastseq.recipes.classifier.recipe import Config, build
from fastseq.recipes.encoders import plain

__all__ = ["Config", "build", "compare", "plain", "predict"]


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """See `comparison`; it is imported here, so that prediction does not wait for what it needs."""
    from fastseq.recipes.classifier import comparison

    return comparison.compare(config, sentences)
