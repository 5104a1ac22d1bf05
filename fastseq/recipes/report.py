"""What a training run shows and leaves behind: a progress bar, ``metrics.jsonl`` and TensorBoard curves.

On a GPU all three have how busy and how full it is.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from fastseq.gpu_watch import GpuWatch
from fastseq.recipes.checkpoint import write_atomically, writing
from fastseq.recipes.config import RecipeConfig

if TYPE_CHECKING:
    from fastseq.recipes.train import Position

REFRESH = 20
"""Updates between two looks at the loss: on a GPU, each look waits for the device."""


class Reporter:
    """Reports one run; quiet in every process but the main one.

    Args:
        config: of the run.
        step: updates done before this start; what was logged after them belongs to updates that a kill undid.
        total: updates of the whole run.
        main: whether this is the process that reports.
        device: that it trains on.
    """

    def __init__(self, config: RecipeConfig, step: int, total: int, main: bool, device: torch.device) -> None:
        self.config, self.start_step, self.total, self.main = config, step, total, main
        self.log = config.run_dir / "metrics.jsonl"
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not (main and config.train.progress),
        )
        self.losses: list[Tensor] = []  # of the updates since the last look at them
        self.summed, self.count = 0.0, 0  # those looked at since the last evaluation
        self.gpu = GpuWatch(device if main else torch.device("cpu"))

    def __enter__(self) -> Reporter:
        if self.main:
            _drop_after(self.log, self.start_step)
        self.board = self._tensorboard()
        self.bar = self.progress.add_task("train", total=self.total, completed=self.start_step, text="")
        self.progress.start()
        self.gpu.start()
        self.now = time.perf_counter()
        self.since = (self.start_step, self.now)
        self.dev = ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gpu.stop()
        self.progress.stop()
        if self.board is not None:
            self.board.close()

    def update(self, position: Position, loss: Tensor, lr: float) -> None:
        """After each update: its loss (a scalar on the device)."""
        if not self.main:
            return
        self.losses.append(loss)
        self.now = time.perf_counter()
        if position.step % REFRESH:
            return
        recent = self._look()
        gpu = self.gpu.latest
        shown = f"  {gpu}" if gpu is not None else ""
        self.progress.update(
            self.bar,
            completed=position.step,
            text=f"loss {recent:.3f}  {self._rate(position.step):.0f} examples/s{shown}{self.dev}",
        )
        if self.board is not None:
            self.board.add_scalar("train/loss", recent, position.step)
            self.board.add_scalar("train/lr", lr, position.step)
            for name, value in gpu.as_dict().items() if gpu is not None else ():
                self.board.add_scalar(f"gpu/{name}", value, position.step)

    def evaluation(self, position: Position, metrics: dict[str, float]) -> None:
        """After each evaluation on dev."""
        if not self.main:
            return
        self._look()
        loss = self.summed / max(1, self.count)
        gpu = self.gpu.mean()
        line = {
            "step": position.step,
            "epoch": position.epoch + 1,
            "train_loss": loss,
            "examples_per_s": round(self._rate(position.step), 1),
            "dev": metrics,
            "best_step": position.best_step,
            **({"gpu": gpu.as_dict()} if gpu is not None else {}),
        }
        with writing(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(f"dev/{name}", value, position.step)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        self.progress.console.print(f"step {position.step}/{self.total}  train loss {loss:.3f}  dev {shown}")
        self.dev = f"  dev {shown}"
        self.summed, self.count = 0.0, 0
        self.since = (position.step, time.perf_counter())

    def _look(self) -> float:
        """The mean loss since the last look; waits for the device."""
        values = [loss.item() for loss in self.losses]
        self.losses = []
        self.summed, self.count = self.summed + sum(values), self.count + len(values)
        return sum(values) / max(1, len(values))

    def _rate(self, step: int) -> float:
        """Training examples a second from the last evaluation to the last update."""
        from_step, since = self.since
        examples = (step - from_step) * self.config.train.batch_size * self.config.train.accumulate
        return examples / max(self.now - since, 1e-9)

    def _tensorboard(self) -> Any:
        if not (self.main and self.config.train.tensorboard):
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.config.run_dir / "tensorboard", purge_step=self.start_step + 1)


def _drop_after(log: Path, step: int) -> None:
    """Drops the lines of updates that will be done again, and a line that a kill cut short."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text("utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if value["step"] <= step:
            kept.append(line + "\n")
    write_atomically(log, lambda temporary: temporary.write_text("".join(kept), "utf-8"))
