"""``fastseq compare`` of the recipes with a text encoder: Hugging Face as it is usually run, and each lever on top."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

import fastseq
from fastseq.models.pooled_encoder import PooledEncoder
from fastseq.recipes.compare import levers
from fastseq.recipes.compare.comparison import Comparison
from fastseq.recipes.compare.levers import Collate, Lever
from fastseq.recipes.compare.show import show
from fastseq.recipes.config import ConfigT
from fastseq.recipes.encoders import EncoderConfig, plain
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.task import Batch, Task


def compare(
    recipe: str, config: ConfigT, encoder: EncoderConfig | None, build: Callable[[ConfigT], Task], examples: int
) -> dict[str, Any]:
    """Measures the levers and the quality of both versions; prints and returns the figures.

    Args:
        recipe: its name.
        config: its configuration; the model and training settings hold for both versions.
        encoder: the configuration's section of the text encoder.
        build: makes the task.
        examples: the most that a version is trained on; the time of the plain one is limited too.

    Raises:
        ConfigError: there is no text encoder, which is what the levers are of.
    """
    if encoder is None:
        raise ConfigError("model.encoder: the comparison is of models that read a text, got null")
    words = "transformers' own model on random batches padded to the most tokens, fp32 and torch's AdamW"
    run = Comparison(recipe, config, build, examples, unit="texts", plain=words)
    task, train = run.task, config.train
    fixed = padded_to(task.collate, encoder.max_length)
    first = levers.plain_setup(task, train, partial(plain, config, task), collate=fixed)
    packed = _packed(first.model)
    steps = [
        Lever("padding to the longest", lambda setup: replace(setup, collate=task.collate), base=True),
        levers.buckets(train),
        Lever("real tokens only", lambda setup: replace(setup, model=packed)),
        *levers.numerics(train, run.device),
    ]
    run.figures["patched"] = [str(module.report) for module in _pooled(packed())]
    kept = run.waterfall(first, steps)
    others = [
        *levers.batch_levers(train),
        *levers.loop_levers(task.model, train, run.device),
        *levers.convolutions(task.model, run.device),
        levers.shorter(lambda example, length: example._replace(ids=example.ids[:length]), task),
        levers.smaller("half the layers", _fewer_layers),
    ]
    run.alone(kept, others, levers.loader_levers(run.device))
    run.evaluation(run.quality(first, kept))
    figures = run.finish()
    show(figures, run.console)
    return figures


def _packed(plain_model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Makes the model with its encoder on real tokens only."""

    def make() -> nn.Module:
        model = plain_model()
        for module in _pooled(model):
            module.report = fastseq.patch(module.encoder, packed=True)
        return model

    return make


def _pooled(model: nn.Module) -> list[PooledEncoder]:
    return [module for module in model.modules() if isinstance(module, PooledEncoder)]


def _fewer_layers(model: nn.Module) -> nn.Module:
    """Takes the upper half of the encoder's layers off."""
    for module in _pooled(model):
        layers = max((m for m in module.encoder.modules() if isinstance(m, nn.ModuleList)), key=len)
        del layers[(len(layers) + 1) // 2 :]
    return model


def padded_to(collate: Collate, length: int) -> Collate:
    """Batches whose texts are padded to a fixed length, as a tokenizer with ``padding="max_length"`` makes them."""

    def fixed(examples: list[Any]) -> Batch:
        batch = collate(examples)
        room = (0, length - batch["input_ids"].shape[1])
        return batch | {name: nn.functional.pad(batch[name], room) for name in ("input_ids", "attention_mask")}

    return fixed
