"""``fastseq compare``: the same training in several variants, measured side by side on a noisy machine.

Variants take turns on the same examples, so that whatever else the machine does hits all of them alike, and
one of them runs twice: how far the two disagree is how far any figure here can be trusted.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq.recipes.config import TrainConfig
from fastseq.recipes.loading import EpochBatches
from fastseq.recipes.task import Batch, Task
from fastseq.recipes.train import learning_rate, make_optimizer


@dataclass
class Variant:
    """One way to train the model.

    Attributes:
        name: for the table.
        model: its own copy, with the same first weights as every other variant's.
        train: the settings; `buckets` and `fused` are levers.
        total_steps: of the learning rate's schedule.
        bf16: run the forward pass under bf16 autocast.
        seconds: of each chunk that was timed.
        examples: trained on in those.
        steps: done in those.
    """

    name: str
    model: nn.Module
    train: TrainConfig
    total_steps: int
    bf16: bool = False
    seconds: list[float] = field(default_factory=list)
    examples: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.optimizer = self._optimizer()
        factor = learning_rate(self.train, self.total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.train.fused:
            return make_optimizer(self.model, self.train)
        return torch.optim.Adam(self.model.parameters(), lr=self.train.lr, betas=self.train.betas)

    def batches(self, task: Task, indices: Sequence[int], seed: int) -> Iterator[Batch]:
        """The examples at `indices`, in this variant's order and batches."""
        import numpy as np

        lengths = np.array([task.length(task.train[i]) for i in indices], dtype=np.int64)
        plan = EpochBatches(lengths, self.train.batch_size, seed, self.train.buckets)
        for batch in plan.plan(0):
            yield task.collate([task.train[indices[i]] for i in batch])

    def forward_backward(self, batch: Batch) -> None:
        """The loss of a batch and its gradients."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**batch)
        loss.backward()

    def step(self, batch: Batch) -> None:
        """One update."""
        self.forward_backward(batch)
        if self.train.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed_chunk(self, task: Task, indices: Sequence[int], seed: int) -> None:
        """Trains on the examples and adds to the figures; making the batches counts."""
        start = time.perf_counter()
        for batch in self.batches(task, indices, seed):
            self.step(batch)
            self.steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.examples += len(indices)

    @property
    def rate(self) -> float:
        """Examples a second, over the chunks."""
        return self.examples / sum(self.seconds)

    @property
    def step_ms(self) -> float:
        """Milliseconds a step, over the chunks."""
        return 1e3 * sum(self.seconds) / self.steps


def take_turns(
    variants: Sequence[Variant], task: Task, order: Sequence[int], chunk: int, warm: int = 0
) -> None:
    """Trains every variant on the same examples, a chunk each in turn; who goes first changes every round.

    Args:
        variants: to be trained and timed.
        task: with the examples.
        order: indices of the training examples.
        chunk: examples in a turn.
        warm: the first examples, which are trained on but not timed: kernels and allocators warm up.
    """
    for variant in variants:
        for batch in variant.batches(task, order[:warm], 0):
            variant.step(batch)
    for round_, start in enumerate(range(warm, len(order), chunk)):
        first = round_ % len(variants)
        for variant in [*variants[first:], *variants[:first]]:
            variant.timed_chunk(task, order[start : start + chunk], round_)


def paired_share(with_part: Variant, without: Variant, batches: Sequence[Batch]) -> float:
    """The share of a step that a part takes: the median over batches, both variants on each, back to back."""
    shares = []
    for i, batch in enumerate(batches):
        seconds = {}
        for variant in (with_part, without) if i % 2 else (without, with_part):
            start = time.perf_counter()
            variant.step(batch)
            seconds[variant.name] = time.perf_counter() - start
        shares.append(1 - seconds[without.name] / seconds[with_part.name])
    return statistics.median(shares)


class _OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_ops(variant: Variant, batch: Batch) -> int:
    """Operator calls of one forward and backward pass."""
    with _OpCounter() as counter:  # type: ignore[no-untyped-call]
        variant.forward_backward(batch)
    variant.optimizer.zero_grad(set_to_none=True)
    return int(counter.count)


def peak_memory(variant: Variant, batches: Sequence[Batch]) -> int:
    """The most bytes that a step holds at once besides weights and optimizer state, over the batches."""
    peak = 0
    for batch in batches:
        if variant.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            variant.step(batch)
            peak = max(peak, torch.cuda.max_memory_allocated() - before)
        else:
            peak = max(peak, _peak_on_cpu(partial(variant.step, batch)))
    return peak


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """The high-water mark of what a call allocates, from the profiler's record of torch's CPU allocator."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


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
    axes.set(xlabel="training sentences a second", xlim=(0, 1.15 * max(rates)), title=figures["title"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
