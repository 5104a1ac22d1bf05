"""``fastseq profile``: where the time of a recipe's training step goes, with its data, loader and settings."""

from __future__ import annotations

import platform
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich import box
from rich.console import Console
from rich.table import Table

import fastseq
from fastseq import host
from fastseq.profiling import Profile
from fastseq.recipes import Recipe
from fastseq.recipes.compare.levers import PLAIN
from fastseq.recipes.config import RecipeConfig
from fastseq.recipes.loading import EpochBatches
from fastseq.recipes.settings import make_accelerator, prepare
from fastseq.recipes.train import Trainer


class FirstBatches(EpochBatches):
    """The first batches of a run, again and again: all that is timed has the same work.

    Args:
        batches: of the run.
        count: how many of them.
    """

    def __init__(self, batches: EpochBatches, count: int) -> None:
        super().__init__(batches.lengths, batches.batch_size, batches.seed, batches.buckets)
        self.first = batches.plan(0)[:count]

    def plan(self, epoch: int) -> list[Any]:
        """The same in each epoch."""
        return self.first

    def __len__(self) -> int:
        return len(self.first)


class Step:
    """The step of a training, as its loop does it: loading, forward, backward, clipping, update.

    Args:
        trainer: that does it.
        steps: after which the same batches come again.
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.accumulate = trainer, trainer.config.train.accumulate
        trainer.shares.batches = FirstBatches(trainer.shares.batches, steps * self.accumulate)
        self.batches = iter(trainer.loader)
        trainer.model.train()

    def __call__(self) -> None:
        """One update."""
        update = list(islice(self.batches, self.accumulate))
        if not update:
            self.batches = iter(self.trainer.loader)
            update = list(islice(self.batches, self.accumulate))
        self.trainer.update([piece for batch in update for piece in batch])


def profile(
    name: str, recipe: Recipe, config: RecipeConfig, *, plain: bool = False, steps: int = 10, trace: Path | None = None
) -> dict[str, Any]:
    """Runs some steps of a training, prints what they are made of, and returns the figures.

    Nothing is read from the run directory, and nothing written to it.

    Args:
        name: of the recipe.
        recipe: its package.
        config: of the training.
        plain: take the model as it is usually written, with every lever of the loop off.
        steps: that are timed.
        trace: a file for the Chrome trace, or None.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if plain:
        config = config.model_copy(update={"train": config.train.model_copy(update=PLAIN)})
    accelerator = make_accelerator(config.train)
    if accelerator.device.type == "cpu" and not plain:
        host.keep_memory()
    console = Console(markup=False, highlight=False)
    console.print("reading the data ...")
    set_seed(config.seed)
    task = recipe.build(config)
    task.model = recipe.plain(config, task) if plain else task.model
    prepare(task.model, config.train)
    console.print("running some steps ...")
    found = fastseq.profile(Step(Trainer(task, config, accelerator), steps), model=task.model, steps=steps, trace=trace)
    title = f"fastseq profile {name}{' --plain' if plain else ''}"
    show(title, found, console)
    machine = {"cpu": host.cpu_features()["model"] or platform.machine(), "torch": torch.__version__}
    return {"title": title, **found.as_dict(), "machine": machine, "config": config.model_dump(mode="json")}


def show(title: str, found: Profile, console: Console) -> None:
    """Prints the phases as a table, and what they say."""
    heading, *lines, whole = found.cells()
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(heading):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    table.add_section()
    table.add_row(*whole)
    console.print(table)
    console.print("\n".join([*found.summary(), "", *(f"- {said}" for said in found.advice)]))
