"""What happens around the steps of a training: two ways to do it, in measured seconds, and what an epoch gains."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastseq.recipes.compare.variant import Variant, seconds
from fastseq.recipes.loading import evaluation_sample

if TYPE_CHECKING:
    from fastseq.recipes.compare.comparison import Comparison

SAMPLE = 512
"""Examples of dev whose evaluation says how many can be afforded."""

SECONDS = 2.5
"""What an evaluation may take: of all of dev if it can be, since batches of a small part mix lengths, and pad more."""

ROUNDS = 2

WORKERS = 2
"""Loading processes, whose start is timed."""


def beside(
    name: str, before: tuple[str, float], after: tuple[str, float], epoch: float | None = None
) -> dict[str, Any]:
    """A row of the figures.

    Args:
        name: of the lever.
        before: what is done without it, in words, and its seconds (in an epoch, where one is given).
        after: the same with it.
        epoch: seconds of an epoch without it; what the lever makes of that is computed.
    """
    gain = None if epoch is None else epoch / (epoch - before[1] + after[1])
    times = {"before": before[0], "before_seconds": before[1], "after": after[0], "after_seconds": after[1]}
    return {"name": name, **times, "epoch_seconds": epoch, "epoch_gain": gain}


def evaluation(run: Comparison, trained: Variant) -> list[dict[str, Any]]:
    """A larger validation batch, and half the evaluations."""
    train, few = run.config.train, run.dev(SAMPLE)
    whole = len(evaluation_sample(run.task.dev, train, run.config.seed))
    sizes = train.eval_batch_size, 4 * train.eval_batch_size
    first = seconds(partial(run.scores, trained, few, sizes[0]), run.device)
    sample = run.dev(min(whole, max(SAMPLE, int(SAMPLE * SECONDS / first))))
    taken = {size: list[float]() for size in sizes}
    for size in sizes * ROUNDS:
        taken[size].append(seconds(partial(run.scores, trained, sample, size), run.device))
    one, four = (min(taken[size]) * whole / len(sample) for size in sizes)
    times = _updates(run, trained) / (train.eval_every or _updates(run, trained))
    epoch = _epoch(run, trained) + times * one
    larger = (f"{times:.3g} an epoch, batches of {sizes[0]}", times * one), (f"of {sizes[1]}", times * four)
    rarer = (f"{times:.3g} an epoch", times * one), (f"{times / 2:.3g} an epoch", times / 2 * one)
    return [beside("larger validation batch", *larger, epoch), beside("half the evaluations", *rarer, epoch)]


def loader_start(run: Comparison, trained: Variant) -> dict[str, Any]:
    """The time to the first batch of an epoch, with new workers and with those of the epoch before."""
    setup = replace(trained.setup, loading=True).but(workers=WORKERS, persistent_workers=True)
    loading = run.variant("", setup, run.size)
    plan = loading.plan(run.order(2 * run.size), 0)
    starts = []
    for _ in range(3):
        start = time.perf_counter()
        batches = iter(loading.loaded(plan))
        next(batches)
        starts.append(time.perf_counter() - start)
        list(batches)  # to the end, so that the workers are idle
    fresh, kept = (f"{WORKERS} new workers", starts[0]), ("kept workers", min(starts[1:]))
    return beside("workers that persist", fresh, kept, _epoch(run, trained) + starts[0])


def _updates(run: Comparison, trained: Variant) -> int:
    """In an epoch."""
    train = trained.setup.train
    return -(-len(run.task.train) // (train.batch_size * train.accumulate))


def _epoch(run: Comparison, trained: Variant) -> float:
    """Seconds that the steps of an epoch take."""
    return len(run.task.train) / trained.rate
