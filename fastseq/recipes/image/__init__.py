"""The image recipe: a label for a picture, by a small ResNet or a fine-tuned one."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.image.plain import plain
from fastseq.recipes.image.predict import predict
from fastseq.recipes.image.recipe import Config, build

__all__ = ["Config", "build", "compare", "plain", "predict"]


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """See `comparison`; it is imported here, so that prediction does not wait for what it needs."""
    from fastseq.recipes.image import comparison

    return comparison.compare(config, sentences)
