"""``fastseq compare classifier``: fine-tuning as it is usually done against real tokens, bf16 and fused updates."""

from __future__ import annotations

from typing import Any

from fastseq.recipes.classifier.recipe import Config, build
from fastseq.recipes.compare import encoders


def compare(config: Config, examples: int) -> dict[str, Any]:
    """See `encoders.compare`.

    Args:
        config: of the recipe.
        examples: the most that a version is trained on.
    """
    return encoders.compare("classifier", config, config.model.encoder, build, examples)
