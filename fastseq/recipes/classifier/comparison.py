"""``fastseq compare classifier``: fine-tuning as it is usually done against real tokens, bf16 and fused updates."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastseq.recipes import encoder_compare
from fastseq.recipes.classifier.recipe import Config, build


def compare(config: Config, examples: int) -> dict[str, Any]:
    """See `encoder_compare.compare`.

    Args:
        config: of the recipe.
        examples: the most that a version is trained on.
    """
    make, encoder = partial(build, config), config.model.encoder
    return encoder_compare.compare("classifier", config, config.data.name, encoder, make, examples)
