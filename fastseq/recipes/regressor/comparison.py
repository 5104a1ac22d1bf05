"""``fastseq compare regressor``: the encoder as it is usually run against real tokens, bf16 and fused updates."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.compare import encoders
from fastseq.recipes.regressor.recipe import Config, build


def compare(config: Config, examples: int) -> dict[str, Any]:
    """See `encoders.compare`.

    Args:
        config: of the recipe.
        examples: the most that a version is trained on.
    """
    return encoders.compare("regressor", config, config.model.encoder, build, examples)
