"""What test_distributed.py has processes do. A process of a group gets ``place``: its rank, their number and a file to
meet at; and ``pipe``, which brings a job's name and arguments, and takes its result.
"""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastseq.recipes import RECIPES, get
from fastseq.recipes.config import load
from fastseq.recipes.settings import make_accelerator
from fastseq.recipes.task import Task
from fastseq.recipes.train import Trainer, run


class StoppedError(Exception):
    """The training has gone as far as the test wants."""


def settings(recipe: str, overrides: list[str]) -> Any:
    return load(get(recipe).Config, RECIPES[recipe], None, overrides)


def gradients(recipe: str, overrides: list[str]) -> list[dict[str, np.ndarray]]:
    """The gradients of each update of an epoch, all at the first weights."""
    config = settings(recipe, overrides)
    torch.set_num_threads(1)
    accelerator = make_accelerator(config.train)
    torch.manual_seed(0)
    trainer = Trainer(get(recipe).build(config), config, accelerator)
    trainer.model.train()
    batches, size = list(trainer.loader), config.train.accumulate
    found = []
    for start in range(0, len(batches), size):
        trainer.gradients([piece for batch in batches[start : start + size] for piece in batch])
        named = [(name, value.grad) for name, value in trainer.task.model.named_parameters() if value.grad is not None]
        found.append({name: whole(grad).numpy().copy() for name, grad in named})
        trainer.optimizer.zero_grad()
    return found


def evaluation(recipe: str, overrides: list[str]) -> tuple[dict[str, float], int]:
    """The test metrics of the first weights, and how many answers this process gave to that end."""
    config = settings(recipe, overrides)
    torch.set_num_threads(1)
    accelerator = make_accelerator(config.train)
    torch.manual_seed(0)
    trainer = Trainer(get(recipe).build(config), config, accelerator)
    judge = trainer.task.evaluate_test or trainer.task.evaluate
    answers, given = judge.answers, 0

    def counted(model: nn.Module, batch: Any) -> list[Any]:
        nonlocal given
        found = answers(model, batch)
        given += len(found)
        return found

    judge.answers = counted  # type: ignore[method-assign]
    return trainer.evaluate(trainer.task.test, judge), given


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, of which this process may have a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def train(
    recipe: str, overrides: list[str], stop_at: int = 0, memory: dict[int, int] | None = None
) -> dict[str, float] | None:
    """Trains to the end, or up to an update.

    Args:
        recipe: its name.
        overrides: of its configuration.
        stop_at: the update after which the training ends as if it had been killed.
        memory: the rows that fit into the memory of a rank, from its third forward pass on.
    """
    rank, after = int(os.environ.get("RANK", "0")), Trainer._after_update
    limit, passes = (memory or {}).get(rank), 0

    def allocate(model: nn.Module, arguments: Any, batch: dict[str, torch.Tensor]) -> None:
        nonlocal passes
        passes += 1
        rows = len(next(iter(batch.values())))
        if limit is not None and passes > 2 and rows > limit:
            raise torch.OutOfMemoryError(f"{rows} rows are too many")

    def build(config: Any) -> Task:
        task: Task = get(recipe).build(config)
        task.model.register_forward_pre_hook(allocate, with_kwargs=True)
        return task

    def after_update(trainer: Trainer) -> None:
        after(trainer)
        if trainer.position.step == stop_at:
            raise StoppedError

    Trainer._after_update = after_update  # type: ignore[method-assign]
    try:
        return run(settings(recipe, overrides), build)
    except StoppedError:
        return None
    finally:
        Trainer._after_update = after  # type: ignore[method-assign]


def serve(rank: int, processes: int, meeting: str, pipe: Any) -> None:
    """Does jobs until there are no more."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()}, OMP_NUM_THREADS="1")
    torch.distributed.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    while (job := pipe.recv()) is not None:
        name, arguments = job
        try:
            pipe.send((globals()[name](*arguments), ""))
        except (Exception, SystemExit) as error:
            pipe.send((f"{type(error).__name__}: {error}", traceback.format_exc()))


if "pipe" in globals():
    serve(*globals()["place"], globals()["pipe"])
