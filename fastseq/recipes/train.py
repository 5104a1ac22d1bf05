"""The one training loop of every recipe: a `Task` and a configuration in, a run directory out.

    run_dir/config.yaml       the resolved configuration; another one in the same directory is an error
    run_dir/metrics.jsonl     a line at each evaluation
    run_dir/best.pt           the weights with the best dev score, and what prediction needs
    run_dir/last.pt           everything that resuming needs
    run_dir/test.json         the test metrics of the best weights: the run is complete

A run killed at any moment and started again ends with the same weights, bit for bit: the order of the data is
a pure function of (seed, epoch), and a checkpoint holds the position in it and the state of all that has one.
Under torchrun several processes share each batch (`distributed`); their number may change when a run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from fastseq import host
from fastseq.recipes import checkpoint, distributed
from fastseq.recipes.batch_size import Fitting, halved, out_of_memory
from fastseq.recipes.config import NOT_THE_RESULT, ConfigT, RecipeConfig, differences
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.loading import (
    Piece,
    Pieces,
    by_length,
    evaluation_batches,
    evaluation_sample,
    on_device,
    training_loader,
    training_shares,
)
from fastseq.recipes.report import Reporter
from fastseq.recipes.settings import learning_rate, make_accelerator, make_optimizer, prepare
from fastseq.recipes.task import Evaluation, Task


@dataclass
class Position:
    """Where a run stands, besides its tensors; `at_once` is what `loading.Shares` has of that name."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -math.inf
    best_step: int = 0
    stale: int = 0
    stopped: bool = False
    at_once: int | None = None


def run(config: ConfigT, build: Callable[[ConfigT], Task]) -> dict[str, float]:
    """Trains, or goes on with what is in the run directory, and returns the test metrics.

    Args:
        config: the resolved configuration.
        build: makes the task of the configuration; called after the seed is set.

    Raises:
        ConfigError: the run directory belongs to another configuration.
    """
    started = distributed.initialized()
    accelerator = make_accelerator(config.train)
    distributed.check(config.train, accelerator.num_processes)
    metrics = distributed.from_first(accelerator, lambda: _claim(config))
    if metrics is None:
        metrics = _trained(config, build, accelerator)
    if accelerator.num_processes > 1 and not started:
        torch.distributed.destroy_process_group()
    return metrics


def _trained(config: ConfigT, build: Callable[[ConfigT], Task], accelerator: Accelerator) -> dict[str, float]:
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if accelerator.device.type == "cpu":
        host.keep_memory()  # each step asks for as much as the step before has freed
    set_seed(config.seed)
    with accelerator.local_main_process_first():  # what one has fetched or encoded, the others find in the cache
        task = build(config)
    prepare(task.model, config.train)
    trainer = Trainer(task, config, accelerator)
    trainer.resume()
    trainer.fit()
    return trainer.finish()


class Trainer:
    """A run in progress."""

    def __init__(self, task: Task, config: RecipeConfig, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.position = Position()
        place = accelerator.process_index, accelerator.num_processes
        self.shares = training_shares(task, config.train, config.seed, *place)
        self.loader = training_loader(task, self.shares, config.train, accelerator.device.type == "cuda")
        self.dev = evaluation_sample(task.dev, config.train, config.seed)
        self.eval_batch_size = config.train.eval_batch_size
        self.model = distributed.shared(task.model, accelerator, config.train)
        self.optimizer = make_optimizer(task.model, config.train)
        self.fitting = Fitting(task.model, Pieces(task), self.shares, accelerator)
        per_epoch = math.ceil(len(self.shares) / config.train.accumulate)
        self.total = min(per_epoch * config.train.epochs, config.train.max_steps or per_epoch * config.train.epochs)
        self.eval_every = config.train.eval_every or per_epoch
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, learning_rate(config.train, self.total))

    def resume(self) -> None:
        """Goes to the last good checkpoint of the run directory, if there is one."""
        state = distributed.from_first(self.accelerator, self._latest)
        if state is not None:
            distributed.load_model(self.task.model, state["model"])
            distributed.load_optimizer(self.optimizer, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.position = Position(**state["position"])
            self.shares.at_once = self.position.at_once
            checkpoint.set_rng_state(state["rng"])
        distributed.own_generators(self.accelerator, self.config.seed, self.position.step)
        main, device = self.accelerator.is_main_process, self.accelerator.device
        self.reporter = Reporter(self.config, self.position.step, self.total, main, device)

    def _latest(self) -> dict[str, Any] | None:
        folder = self.config.run_dir
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        return checkpoint.load_latest(folder / "last.pt", self.accelerator.print)

    def fit(self) -> None:
        """Trains to the end, from wherever it stands."""
        with self.reporter:
            while self.position.step < self.total and not self.position.stopped:
                self._epoch()

    def _epoch(self) -> None:
        self.model.train()
        position = self.position
        self.shares.start_at(position.epoch, position.batch)
        batches = iter(self.loader)
        while update := list(islice(batches, self.config.train.accumulate)):
            loss = self.update([piece for batch in update for piece in batch])
            position.step, position.batch = position.step + 1, position.batch + len(update)
            self.reporter.update(position, loss, self.optimizer.param_groups[0]["lr"])
            self._after_update()
            if position.step >= self.total or position.stopped:
                return
        position.epoch, position.batch = position.epoch + 1, 0

    def update(self, update: list[Piece]) -> Tensor:
        """One step of the optimizer; the loss as of `gradients`."""
        if self.config.train.find_batch_size:
            loss = self.fitting(self.gradients, update)
            if self.accelerator.num_processes > 1:
                distributed.average(self.task.model)
        else:
            loss = self.gradients(update)
        if self.config.train.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self, update: list[Piece]) -> Tensor:
        """Adds an update's gradients to the parameters', and gives the mean loss of this process's share of it.

        What is minimised is the mean over all that the update's batches hold, in all processes and pieces, as if it
        were one batch: each piece has the weight of its examples.
        """
        mine = sum(piece.share.part for piece in update) or 1.0
        losses = []
        for piece in update:
            with distributed.last_of_update(self.model, piece is update[-1]):
                loss: Tensor = self.model(**on_device(piece.batch, self.accelerator.device))
                factor = piece.share.part * self.accelerator.num_processes  # of which gradients are the mean
                (loss if factor == 1 else loss * factor).backward()
            losses.append(loss.detach() if len(update) == 1 else loss.detach() * (piece.share.part / mine))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _after_update(self) -> None:
        step, save_every = self.position.step, self.config.train.save_every
        evaluates = step % self.eval_every == 0 or step == self.total
        if evaluates:
            self._keep_if_best(self.evaluate(self.dev, self.task.evaluate))
        if evaluates or (save_every and step % save_every == 0):
            self._save_last()

    def evaluate(self, examples: Sequence[Any], evaluation: Evaluation) -> dict[str, float]:
        """The metrics of the present weights; each process answers its share of the examples."""
        order = by_length(self.task, examples)
        model = self.task.model
        model.eval()
        # Sharded parameters are put together in evaluation too, and must not become inference tensors by it.
        with torch.no_grad() if self.config.train.fsdp else torch.inference_mode(), self.accelerator.autocast():
            mine = self._answers(examples, distributed.share(self.accelerator, order), evaluation)
        model.train()
        answers = distributed.collected(self.accelerator, mine, len(order))
        return distributed.from_first(self.accelerator, lambda: evaluation.metrics(answers))

    def _answers(self, examples: Sequence[Any], order: Sequence[int], evaluation: Evaluation) -> list[Any]:
        """The answers to the examples at these indices, in batches that fit into memory."""
        while True:
            batches = evaluation_batches(self.task, examples, self.accelerator.device, self.eval_batch_size, order)
            try:
                return [answer for batch in batches for answer in evaluation.answers(self.task.model, batch)]
            except (RuntimeError, MemoryError) as error:
                finds = self.config.train.find_batch_size and self.eval_batch_size > 1
                if not finds or not out_of_memory(error):
                    raise
            self.eval_batch_size = halved(self.eval_batch_size)

    def _keep_if_best(self, metrics: dict[str, float]) -> None:
        position, patience = self.position, self.config.train.patience
        score = -metrics[self.task.score] if self.task.lower_is_better else metrics[self.task.score]
        if score > position.best:
            position.best, position.best_step, position.stale = score, position.step, 0
            self._save_best(metrics)
        else:
            position.stale += 1
            position.stopped = patience is not None and position.stale >= patience
        self.reporter.evaluation(position, metrics)

    def _save_best(self, metrics: dict[str, float]) -> None:
        state = {
            "recipe": self.task.name,
            "config": self.config.model_dump(mode="json"),
            "artefacts": self.task.artefacts,
            "model": self._whole(self.task.model.state_dict()),
            "metrics": metrics,
            "step": self.position.step,
        }
        if self.accelerator.is_main_process:
            checkpoint.save(self.config.run_dir / "best.pt", state)

    def _save_last(self) -> None:
        self.position.at_once = self.shares.at_once
        state = {
            "model": self._whole(self.task.model.state_dict()),
            "optimizer": self._whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "position": asdict(self.position),
            "rng": checkpoint.rng_state(),
        }
        if self.accelerator.is_main_process:
            checkpoint.save(self.config.run_dir / "last.pt", state, keep_previous=True)
        distributed.own_generators(self.accelerator, self.config.seed, self.position.step)

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        return distributed.whole(state, self.accelerator)

    def finish(self) -> dict[str, float]:
        """Tests the best weights and marks the run as complete."""
        folder = self.config.run_dir
        best = distributed.from_first(self.accelerator, lambda: checkpoint.load(folder / "best.pt"))
        distributed.load_model(self.task.model, best["model"])
        metrics = self.evaluate(self.task.test, self.task.evaluate_test or self.task.evaluate)
        if self.accelerator.is_main_process:
            checkpoint.save_json(folder / "test.json", {**metrics, "best_step": best["step"]})
        return metrics


def _claim(config: RecipeConfig) -> dict[str, float] | None:
    """Writes the configuration into a new run directory, or checks that an old one has the same.

    Returns:
        The test metrics, if the run is complete.
    """
    folder = config.run_dir
    file, finished = folder / "config.yaml", folder / "test.json"
    if not file.exists():
        with checkpoint.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        checkpoint.write_atomically(file, lambda temporary: temporary.write_text(text, "utf-8"))
    try:
        old = type(config).model_validate(yaml.safe_load(file.read_text("utf-8")))
    except (ValueError, yaml.YAMLError):
        raise ConfigError(
            f"run_dir: {file} is not a configuration that this version knows; choose another one, or delete {folder}"
        ) from None
    changed = differences(
        old.model_dump(mode="json", exclude=NOT_THE_RESULT),
        config.model_dump(mode="json", exclude=NOT_THE_RESULT),
    )
    if changed:
        raise ConfigError(
            f"run_dir: {folder} belongs to a run with another configuration; choose another run_dir, or "
            "delete it. What differs: " + "; ".join(changed)
        )
    if not finished.exists():
        return None
    print(f"{folder}: this run is complete (delete it or choose another run_dir to train again)")
    metrics: dict[str, float] = json.loads(finished.read_text("utf-8"))
    return metrics
