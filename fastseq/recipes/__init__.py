"""Training recipes: one folder a system (its configuration, data and model), and one loop for all of them.

Needs the extra: ``pip install "fastseq-kernels[recipes]"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn

from fastseq.recipes.config import RecipeConfig
from fastseq.recipes.errors import RecipeError
from fastseq.recipes.task import Task

RECIPES = {name: f"fastseq.recipes.{name}" for name in ("tagger", "summarizer", "classifier", "image", "regressor")}
"""Every recipe by name, and the package that implements it."""


class Recipe(Protocol):
    """What a recipe's package offers. The command line and the loop know recipes by this alone."""

    Config: type[RecipeConfig]

    def build(self, config: Any) -> Task:
        """Reads the data and makes the model."""
        ...

    def predict(self, path: Path, lines: Iterable[str], as_json: bool = False) -> Iterator[str]:
        """The output for each line, with the checkpoint or run directory at `path`."""
        ...

    def plain(self, config: Any, task: Task) -> nn.Module:
        """The task's model as it is usually written, with the same weights: what fastseq is compared with."""
        ...

    def compare(self, config: Any, sentences: int) -> dict[str, Any]:
        """Trains the plain way and the fastseq way, prints both side by side and returns the figures."""
        ...


def get(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe: one of {', '.join(RECIPES)} is wanted, got {name!r}")
    return cast(Recipe, importlib.import_module(RECIPES[name]))
