"""The regressor recipe: one number for a text and the columns beside it, such as a size or a price."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.encoders import plain
from fastseq.recipes.regressor.predict import predict
from fastseq.recipes.regressor.recipe import Config, build

__all__ = ["Config", "build", "compare", "plain", "predict"]


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """See `comparison`; it is imported here, so that prediction does not wait for what it needs."""
    from fastseq.recipes.regressor import comparison

    return comparison.compare(config, sentences)
