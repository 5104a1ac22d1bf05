"""``fastseq compare image``: a data set that makes images one at a time, against bytes, batches and bf16."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.data import default_collate

from fastseq.models.image_classifier import ImageClassifier
from fastseq.recipes.compare import levers
from fastseq.recipes.compare.comparison import Comparison
from fastseq.recipes.compare.levers import Lever
from fastseq.recipes.compare.show import show
from fastseq.recipes.encoders import make_encoder
from fastseq.recipes.image.data import Images
from fastseq.recipes.image.plain import PlainImages, plain
from fastseq.recipes.image.recipe import Config, build, make_model

QUALITY_SECONDS = 60.0
"""What the plain version may train for the comparison of the scores: about half an epoch on two cores."""

WARMUP = 40
"""The most steps of warmup: versions are trained for few steps, in which the learning rate must also come down."""


def compare(config: Config, examples: int) -> dict[str, Any]:
    """Measures the levers and the quality of both versions; prints and returns the figures.

    Args:
        config: of the recipe; its model and training settings hold for both versions.
        examples: the most that a version is trained on.
    """
    words = "a Dataset that augments one image at a time with Pillow, transformers' ResNet, fp32 and torch's AdamW"
    run = Comparison("image", config, build, examples, unit="images", plain=words)
    train = config.train.model_copy(update={"warmup_steps": min(WARMUP, config.train.warmup_steps)})
    task, ours = run.task, cast(ImageClassifier, run.task.model)
    usual = PlainImages(cast(Images, task.train), config, ours)
    first = levers.plain_setup(
        task, train, partial(plain, config, task), examples=usual, collate=default_collate, loading=True
    )
    decoded = Lever(
        "batched augmentation",
        lambda setup: replace(setup, model=partial(copy.deepcopy, ours), examples=task.train, collate=task.collate),
        base=True,
    )
    steps = [decoded, *levers.convolutions(ours, run.device), *levers.numerics(train, run.device)]
    kept = run.waterfall(first, steps)
    others = [
        *levers.batch_levers(train),
        *levers.loop_levers(ours, train, run.device),
        levers.smaller("half the channels", lambda _: _narrow(config, task.artefacts).to(run.device)),
    ]
    run.alone(kept, others, levers.loader_levers(run.device))
    run.evaluation(run.quality(first, kept, QUALITY_SECONDS, most=None, test=True))
    figures = run.finish()
    show(figures, run.console)
    return figures


def _narrow(config: Config, artefacts: dict[str, Any]) -> nn.Module:
    """The network with half the channels in each layer, and fresh weights."""
    encoder = make_encoder(artefacts["encoder"])
    shape = cast(Any, encoder).config
    sizes = {"embedding_size": -(-shape.embedding_size // 2), "hidden_sizes": [-(-n // 2) for n in shape.hidden_sizes]}
    shape.update(sizes)
    return make_model(config.model, artefacts, type(encoder)(shape))
