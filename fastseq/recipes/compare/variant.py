"""Variants of a training take turns on the same examples, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastseq import host
from fastseq.recipes.compare.levers import Setup
from fastseq.recipes.config import TrainConfig
from fastseq.recipes.loading import EpochBatches, Piece, Share, Shares, training_loader
from fastseq.recipes.settings import learning_rate, make_optimizer, prepare, set_products, wants_bf16
from fastseq.recipes.task import Batch, Task

STEPS_A_TURN, TURNS = 3, 8
"""The most steps, which pay for the caches that the variant before left cold, and the fewest turns, where there are as
many steps: what disturbs a machine for seconds must not hit one variant alone."""

LOADED_STEPS_A_TURN, LOADED_TURNS = 8, 4
"""Where a loader runs: a turn begins with an empty one, and ends with it idle."""


class Variant:
    """One way to train the model, and how fast it was.

    Args:
        name: for the table.
        setup: how it trains.
        task: gives the length of an example.
        examples: that it will train on, for the schedule of the learning rate.
        seed: of the run.
    """

    def __init__(self, name: str, setup: Setup, task: Task, examples: int, seed: int) -> None:
        self.name, self.setup, self.task = name, setup, task
        torch.manual_seed(seed)
        self.model = setup.model().train()
        self.device = next(self.model.parameters()).device
        self.bf16 = wants_bf16(setup.train)
        train = setup.train
        total = -(-examples // (train.batch_size * train.accumulate))
        train = train.model_copy(update={"warmup_steps": min(train.warmup_steps, total // 10)})  # short, as the run is
        with matrix_products(train):
            prepare(self.model, train)
        self.optimizer = make_optimizer(self.model, train)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, learning_rate(train, total))
        self.seconds, self.examples, self.steps = list[float](), 0, 0
        self._waiting, self._turn = 0, list[list[Share]]()
        self._loader: DataLoader[list[Piece]] | None = None

    def plan(self, indices: Sequence[int], seed: int) -> list[list[int]]:
        """The batches of the examples at `indices`, in this variant's order."""
        setup, lengths = self.setup, np.zeros(len(indices), dtype=np.int64)
        if setup.train.buckets:
            lengths[:] = [self.task.length(setup.examples[i]) for i in indices]
        plan = EpochBatches(lengths, setup.train.batch_size, seed, setup.train.buckets).plan(0)
        return [[indices[i] for i in batch] for batch in plan]

    def made(self, plan: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """The batches of a plan."""
        return (self.setup.collate([self.setup.examples[i] for i in batch]) for batch in plan)

    def loaded(self, plan: Sequence[list[int]]) -> Iterable[Batch]:
        """The same from the loop's loader, whose workers live as long as it says."""
        if self._loader is None:
            task = replace(self.task, train=self.setup.examples, collate=self.setup.collate)
            gpu = self.device.type == "cuda"
            self._loader = training_loader(task, cast(Shares, self._turn), self.setup.train, gpu)
        self._turn[:] = [[Share(np.array(batch), 1.0)] for batch in plan]
        return (piece.batch for pieces in self._loader for piece in pieces)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        batch = {name: x.to(self.device, non_blocking=self.setup.non_blocking) for name, x in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.model(**batch)
        return loss

    def update(self) -> None:
        """Moves the weights along the gradients, and clears these."""
        if self.setup.train.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.train.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=self.setup.set_to_none)

    def step(self, batch: Batch) -> None:
        """One step of training: an update where the batches that make one are there."""
        parts = self.setup.train.accumulate
        loss = self.loss(batch)
        (loss / parts if parts > 1 else loss).backward()
        self._waiting = (self._waiting + 1) % parts
        if not self._waiting:
            self.update()

    def warm_up(self, plan: Sequence[list[int]]) -> None:
        """Trains on batches, off the clock: kernels, allocators and loaders warm up."""
        with matrix_products(self.setup.train):
            for batch in self.loaded(plan) if self.setup.loading else self.made(plan):
                self.step(batch)

    def timed(self, plan: Sequence[list[int]]) -> None:
        """Trains on batches and adds to the figures."""
        if not plan:
            return
        with matrix_products(self.setup.train), memory_kept(self.setup.keep_memory):
            ready = None if self.setup.loading else list(self.made(plan))
            if self.setup.keep_memory and not self._waiting:  # what the variants before gave back to the system
                self.loss(next(self.made(plan))).backward()
                self.optimizer.zero_grad(set_to_none=self.setup.set_to_none)

            def work() -> None:
                for batch in self.loaded(plan) if ready is None else ready:
                    self.step(batch)

            self.seconds.append(seconds(work, self.device))
        self.steps += len(plan)
        self.examples += sum(map(len, plan))

    @property
    def rate(self) -> float:
        """Examples a second, over the turns."""
        return self.examples / sum(self.seconds)

    @property
    def step_ms(self) -> float:
        """Milliseconds a batch, over the turns."""
        return 1e3 * sum(self.seconds) / self.steps


def take_turns(variants: Sequence[Variant], order: Sequence[int], warm: int, console: Console | None = None) -> None:
    """Trains every variant on the same examples, a few steps each in turn; the order is another every round.

    Args:
        variants: to be trained and timed.
        order: indices of the training examples; each variant batches them in its own way.
        warm: the first examples, which are trained on but not timed.
        console: a terminal to show the progress on, if it is one.
    """
    plans = [variant.plan(order[warm:], 1) for variant in variants]
    loading = any(variant.setup.loading for variant in variants)
    size, least = (LOADED_STEPS_A_TURN, LOADED_TURNS) if loading else (STEPS_A_TURN, TURNS)
    turns = min(len(plans[0]), max(least, -(-len(plans[0]) // size)))
    generator = np.random.default_rng(0)
    work = [partial(variant.warm_up, variant.plan(order[:warm], 0)) for variant in variants]
    for round_ in range(turns):
        for k in generator.permutation(len(variants)).tolist():
            first, last = (len(plans[k]) * turn // turns for turn in (round_, round_ + 1))
            work.append(partial(variants[k].timed, plans[k][first:last]))
    hidden = console is None or not console.is_terminal
    for part in track(work, "", console=console, transient=True, refresh_per_second=2, disable=hidden):
        part()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes on a device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def memory_kept(on: bool) -> Iterator[None]:
    """Where on, the process keeps the memory that is freed; afterwards it does not."""
    kept = on and host.keep_memory()
    try:
        yield
    finally:
        if kept:
            host.keep_memory(False)


@contextmanager
def matrix_products(train: TrainConfig) -> Iterator[None]:
    """The process's settings of products and convolutions as a configuration wants them; afterwards as they were."""
    matmul, cudnn = cast(Any, torch.backends.cuda.matmul), cast(Any, torch.backends.cudnn)
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    set_products(train)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
