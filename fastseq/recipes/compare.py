"""``fastseq compare``: the same training in several variants, measured side by side on a noisy machine.

Variants take turns on the same examples, so that whatever else the machine does hits all of them alike, and
one of them runs twice: how far the two disagree is how far any figure here can be trusted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastseq.recipes.config import TrainConfig
from fastseq.recipes.loading import EpochBatches
from fastseq.recipes.task import Batch, Task
from fastseq.recipes.train import learning_rate, make_optimizer

STEPS_A_TURN = 3
"""Few enough that a disturbance hits every variant, and enough to pay for the caches that the one before left cold."""


@dataclass
class Variant:
    """One way to train the model.

    Attributes:
        name: for the table.
        model: its own copy, with the same first weights as every other variant's.
        train: the settings; `buckets` and `fused` are levers.
        total_steps: of the learning rate's schedule.
        bf16: run the forward pass under bf16 autocast.
        collate: makes its batches; None is the task's.
        seconds: of each turn that was timed.
        examples: trained on in those.
        steps: done in those.
    """

    name: str
    model: nn.Module
    train: TrainConfig
    total_steps: int
    bf16: bool = False
    collate: Callable[[list[Any]], Batch] | None = None
    seconds: list[float] = field(default_factory=list)
    examples: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.restart(self.total_steps)

    def restart(self, total_steps: int) -> None:
        """Begins with a fresh optimizer, and a schedule of so many steps."""
        self.total_steps = total_steps
        self.optimizer = make_optimizer(self.model, self.train)
        factor = learning_rate(self.train, total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def batches(self, task: Task, indices: Sequence[int], seed: int) -> Iterator[Batch]:
        """The examples at `indices`, in this variant's order and batches."""
        lengths = np.array([task.length(task.train[i]) for i in indices], dtype=np.int64)
        plan = EpochBatches(lengths, self.train.batch_size, seed, self.train.buckets)
        for batch in plan.plan(0):
            yield (self.collate or task.collate)([task.train[indices[i]] for i in batch])

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.model(**batch)
        return loss

    def update(self) -> None:
        """Moves the weights along the gradients, and clears these."""
        if self.train.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Batch) -> None:
        """One step of training."""
        self.loss(batch).backward()
        self.update()

    def timed_steps(self, batches: Sequence[Batch]) -> None:
        """Trains on the batches and adds to the figures."""
        start = time.perf_counter()
        for batch in batches:
            self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.steps += len(batches)
        self.examples += sum(len(next(iter(batch.values()))) for batch in batches)

    @property
    def rate(self) -> float:
        """Examples a second, over the turns."""
        return self.examples / sum(self.seconds)

    @property
    def step_ms(self) -> float:
        """Milliseconds a step, over the turns."""
        return 1e3 * sum(self.seconds) / self.steps


def take_turns(variants: Sequence[Variant], task: Task, order: Sequence[int], pool: int, warm: int = 0) -> None:
    """Trains every variant on the same examples, a few steps each in turn; who goes first changes every round.

    Args:
        variants: to be trained and timed.
        task: with the examples.
        order: indices of the training examples.
        pool: examples that are batched together, by each variant in its own way.
        warm: the first examples, which are trained on but not timed: kernels and allocators warm up.
    """
    for variant in variants:
        for batch in variant.batches(task, order[:warm], 0):
            variant.step(batch)
    for start in range(warm, len(order), pool):
        plans = [list(variant.batches(task, order[start : start + pool], start)) for variant in variants]
        turns = range(0, len(plans[0]), STEPS_A_TURN)
        for round_, first in enumerate(turns):
            for i in range(len(variants)):
                k = (round_ + i) % len(variants)
                variants[k].timed_steps(plans[k][first : first + STEPS_A_TURN])


def seconds(call: Callable[[], object], variant: Variant) -> float:
    """How long a call takes on the variant's device."""
    start = time.perf_counter()
    call()
    if variant.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_share(with_part: Variant, without: Variant, batches: Sequence[Batch]) -> float:
    """The share of a step that a part takes: the median over batches, both variants on each, back to back."""
    shares = []
    for i, batch in enumerate(batches):
        pair = (with_part, without) if i % 2 else (without, with_part)
        taken = {variant.name: seconds(partial(variant.step, batch), variant) for variant in pair}
        shares.append(1 - taken[without.name] / taken[with_part.name])
    return statistics.median(shares)


class _Watch(TorchDispatchMode):
    """Counts operator calls, and the most bytes of tensors made under it that lived at once (to 1 %)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.peak = self._level = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        result = func(*args, **(kwargs or {}))
        known = {id(value) for value in tree_leaves((args, kwargs))}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and id(value) not in known and value._base is None:
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata in self._live:
            return
        self._live[reference.cdata] = (reference, storage.nbytes())
        self._level += storage.nbytes()
        if self._level > 1.01 * self.peak:  # only then is it worth asking which of them are gone
            self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
            self._level = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._level)


def cost(variant: Variant, batches: Sequence[Batch]) -> dict[str, float]:
    """What the forward and backward passes take on these batches, besides time.

    Returns:
        "ops", operator calls a step on average, and "peak_bytes", the most that its own tensors hold at once.
    """
    ops = peak = 0
    for batch in batches:
        with _Watch() as watch:
            variant.loss(batch).backward()
        variant.optimizer.zero_grad(set_to_none=True)
        ops, peak = ops + watch.ops, max(peak, watch.peak)
    return {"ops": round(ops / len(batches)), "peak_bytes": peak}


def levers(
    variants: Sequence[Variant], before: Sequence[int], task: Task, sample: Sequence[int]
) -> list[dict[str, Any]]:
    """What variants that have taken turns came to.

    Args:
        variants: the first is what the others are compared with.
        before: of each, the variant that it adds a lever to.
        task: with the examples.
        sample: indices of the training examples that operator calls are counted on.
    """
    return [
        {
            "name": variant.name,
            "examples_per_s": variant.rate,
            "step_ms": variant.step_ms,
            "speedup": variant.rate / variants[0].rate,
            "gain": variant.rate / variants[i].rate,
            **cost(variant, list(variant.batches(task, sample, 0))),
        }
        for variant, i in zip(variants, before, strict=True)
    ]


def levers_table(title: str, rows: Sequence[dict[str, Any]], rate: str) -> Table:
    """What `levers` returns, as a table; `rate` heads the examples a second."""
    table = Table(title=title)
    table.add_column("one lever at a time", no_wrap=True)
    for name in (rate, "ms", "gain", "in all", "ops", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        speed = row["examples_per_s"]
        table.add_row(
            row["name"],
            f"{speed:.0f}" if speed >= 10 else f"{speed:.2f}",
            f"{row['step_ms']:.1f}",
            f"{row['gain']:.2f}x" if i else "",
            f"{row['speedup']:.2f}x",
            f"{row['ops']}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return table


def disagreement(figures: dict[str, Any]) -> str:
    """How far figures can be trusted, in words."""
    apart = 100 * figures["control_disagreement"]
    return f"The two plain runs disagree by {apart:.1f} %: trust no figure further than that."


def left_out(kept: dict[str, bool]) -> str | None:
    """The levers that the fastseq version goes without, in words; None where it has them all."""
    dropped = [name.replace("_", " ") for name, on in kept.items() if not on]
    if not dropped:
        return None
    return f"Left out of the fastseq version below, since it gave nothing here: {', '.join(dropped)}."


def training_order(count: int, examples: int, seed: int) -> list[int]:
    """The first `count` indices of a training run over so many examples, epoch after epoch."""
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(examples) for _ in range(-(-count // examples))])
    return cast(list[int], order[:count].tolist())


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draws the examples a second of each variant, and what each lever gave."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levers = figures["levers"]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(levers) + 1.4), layout="constrained")
    rates = [lever["examples_per_s"] for lever in levers]
    bars = axes.barh([lever["name"] for lever in levers], rates, color="tab:blue")
    axes.bar_label(bars, [f"{lever['speedup']:.2f}x" for lever in levers], padding=4)
    axes.invert_yaxis()
    axes.set(xlabel="training examples a second", xlim=(0, 1.15 * max(rates)), title=figures["title"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
