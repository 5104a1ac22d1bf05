"""``fastseq compare tagger``: the usual BiLSTM-CRF code against fastseq's, on the same budget."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from fastseq.models.bilstm import mask_of
from fastseq.models.tagger import SoftmaxDecoder, Tagger
from fastseq.recipes.compare import levers
from fastseq.recipes.compare.comparison import Comparison
from fastseq.recipes.compare.levers import Changes, Lever, Setup
from fastseq.recipes.compare.show import show
from fastseq.recipes.compare.variant import Variant, seconds
from fastseq.recipes.tagger.data import Encoder
from fastseq.recipes.tagger.plain import plain
from fastseq.recipes.tagger.recipe import Config, build, make_model
from fastseq.recipes.task import Batch

QUALITY_SECONDS = 80.0
"""What the plain version may train for the comparison of the scores: enough for 12,800 sentences on two cores."""

PAIRS = 60
"""Steps with the CRF and without, of the fast version; the slow one has a quarter of them."""


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """Measures the levers, the CRF's share and the quality of both versions; prints and returns the figures.

    Args:
        config: of the recipe; its model and training settings hold for both versions.
        sentences: the training budget of each version; the time of the plain one is limited too.
    """
    words = "pytorch-crf (any tag may follow any) on random batches padded to the longest, fp32 and torch's AdamW"
    run = Comparison("tagger", config, build, sentences, unit="sentences", plain=words)
    task, train, ours = run.task, config.train, cast(Tagger, run.task.model)
    first = levers.plain_setup(task, train, partial(plain, config, task))
    no_crf = "the model has no CRF" if isinstance(ours.decoder, SoftmaxDecoder) else None
    constrained: Changes = "model" if task.artefacts["scheme"] else ""  # ours knows which tags may follow which
    steps = [
        Lever("fused CRF", _decoder(lambda: copy.deepcopy(ours.decoder)), constrained, no_crf, base=True),
        Lever(
            "length buckets",
            lambda setup: replace(setup, model=partial(copy.deepcopy, ours)).but(buckets=True),
            base=True,
        ),
        *levers.numerics(train, run.device, bf16="bf16 LSTM"),
    ]
    kept = run.waterfall(first, steps)
    if no_crf is None:
        run.figures["crf_share_of_step"] = crf_share(run, first, kept)
    half = config.model.model_copy(update={"hidden_size": -(-config.model.hidden_size // 2)})
    encoder, scheme = Encoder(**task.artefacts["encoder"]), task.artefacts["scheme"]
    others = [
        *levers.batch_levers(train),
        *levers.loop_levers(task.model, train, run.device),
        *levers.convolutions(task.model, run.device),
        levers.shorter(lambda example, length: (example[0][:length], example[1][:length]), task),
        levers.smaller("half the hidden size", lambda _: make_model(half, encoder, scheme).to(run.device)),
    ]
    run.alone(kept, others, levers.loader_levers(run.device))
    run.evaluation(run.quality(first, kept, QUALITY_SECONDS, most=None, test=True))
    figures = run.finish()
    show(figures, run.console)
    if no_crf is None:
        run.say(_share_in_words(figures["crf_share_of_step"]))
    return figures


def _decoder(make: Callable[[], nn.Module]) -> Callable[[Setup], Setup]:
    """Switches the output layer of the usual code's network."""

    def switch(setup: Setup) -> Setup:
        def model() -> nn.Module:
            network = setup.model()
            network.decoder = make().to(next(network.parameters()).device)
            return network

        return replace(setup, model=model)

    return switch


def crf_share(run: Comparison, first: Setup, kept: Setup) -> dict[str, dict[str, float]]:
    """The CRF's share of a step, plain and fast, measured in two ways.

    Returns:
        "paired": what a step takes less with a softmax instead, by pairs of steps on the same batches.
        "alone": the time of the CRF's loss and gradients alone, against that of the step.
    """
    run.say("timing a step with the CRF and without ...")
    order, softmax = run.order(PAIRS * run.size), _decoder(SoftmaxDecoder)
    shares = {}
    for name, setup, count in (("plain", first, PAIRS // 4), ("fastseq", kept, PAIRS)):
        one, other = (run.variant("", each, len(order)) for each in (setup, softmax(setup)))
        batches = list(one.made(one.plan(order, 0)[:count]))
        alone = [_crf_seconds(one, b) / seconds(partial(one.step, b), one.device) for b in batches]
        shares[name] = {"paired": _paired_share(one, other, batches), "alone": statistics.median(alone)}
    return shares


def _paired_share(with_part: Variant, without: Variant, batches: Sequence[Batch]) -> float:
    """The share of a step that a part takes: the median over batches, both variants on each, back to back."""
    shares = []
    for i, batch in enumerate(batches):
        pair = (with_part, without) if i % 2 else (without, with_part)
        taken = {id(variant): seconds(partial(variant.step, batch), variant.device) for variant in pair}
        shares.append(1 - taken[id(without)] / taken[id(with_part)])
    return statistics.median(shares)


def _crf_seconds(variant: Variant, batch: Batch) -> float:
    """The time of the decoder's loss and gradients on the emissions of a batch."""
    batch = {name: value.to(variant.device) for name, value in batch.items()}
    model = cast(Tagger, variant.model)
    with torch.no_grad():
        emissions = model(**{**batch, "tags": None})
    emissions = emissions.detach().requires_grad_()
    tags, mask = batch["tags"].clamp(min=0), mask_of(batch["lengths"], emissions.shape[1])
    return seconds(lambda: model.decoder(emissions, tags, mask=mask, reduction="mean").backward(), variant.device)


def _share_in_words(share: dict[str, dict[str, float]]) -> str:
    parts = (f"{name} {100 * both['alone']:.1f} % ({100 * both['paired']:.1f} %)" for name, both in share.items())
    return "The CRF's share of a step, by its own time (and by steps with it and with a softmax): " + ", ".join(parts)
