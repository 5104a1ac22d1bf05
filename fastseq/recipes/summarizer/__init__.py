"""The summarizer recipe: a pointer-generator network that writes a short text of a longer one."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.summarizer.plain import plain
from fastseq.recipes.summarizer.predict import predict
from fastseq.recipes.summarizer.recipe import Config, build

__all__ = ["Config", "build", "compare", "plain", "predict"]


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """See `comparison`; it is imported here, so that prediction does not wait for what it needs."""
    from fastseq.recipes.summarizer import comparison

    return comparison.compare(config, sentences)
