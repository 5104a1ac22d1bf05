"""The one training loop of every recipe: a `Task` and a configuration in, a run directory out.

    run_dir/config.yaml       the resolved configuration; another one in the same directory is an error
    run_dir/metrics.jsonl     a line at each evaluation
    run_dir/best.pt           the weights with the best dev score, and what prediction needs
    run_dir/last.pt           everything that resuming needs
    run_dir/test.json         the test metrics of the best weights: the run is complete

A run killed at any moment and started again ends with the same weights, bit for bit: the order of the data is
a pure function of (seed, epoch), and a checkpoint holds the position in it and the state of all that has one.
(With several processes each one's random numbers are not kept: a resumed run is as good, not the same.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import Tensor, nn

from fastseq import host
from fastseq.recipes import checkpoint
from fastseq.recipes.config import NOT_THE_RESULT, ConfigT, RecipeConfig, TrainConfig, differences
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.loading import evaluation_batches, evaluation_sample, training_batches, training_loader
from fastseq.recipes.report import Reporter
from fastseq.recipes.task import Batch, Evaluation, Task


@dataclass
class Position:
    """Where a run stands, besides its tensors."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -math.inf
    best_step: int = 0
    stale: int = 0
    stopped: bool = False


def run(config: ConfigT, build: Callable[[ConfigT], Task]) -> dict[str, float]:
    """Trains, or goes on with what is in the run directory, and returns the test metrics.

    Args:
        config: the resolved configuration.
        build: makes the task of the configuration; called after the seed is set.

    Raises:
        ConfigError: the run directory belongs to another configuration.
    """
    folder = config.run_dir
    _claim(folder, config)
    finished = folder / "test.json"
    if finished.exists():
        metrics: dict[str, float] = json.loads(finished.read_text("utf-8"))
        print(f"{folder}: this run is complete (delete it or choose another run_dir to train again)")
        return metrics
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = make_accelerator(config.train)
    if accelerator.device.type == "cpu":
        host.keep_memory()  # each step asks for as much as the step before has freed
    set_seed(config.seed)
    task = build(config)
    prepare(task.model, config.train)
    trainer = Trainer(task, config, accelerator)
    trainer.resume()
    trainer.fit()
    return trainer.finish()


def prepare(model: nn.Module, config: TrainConfig) -> None:
    """Sets what a configuration asks of the matrix products and of the model's memory.

    Raises:
        ConfigError: the model cannot recompute its layers.
    """
    if config.tf32 is not None:  # else PyTorch's own setting stays
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        torch.backends.cudnn.allow_tf32 = config.tf32
    if config.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ConfigError("train.gradient_checkpointing: this recipe's model has no layers to recompute, got true")
        enable()


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerate front end of a configuration."""
    from accelerate.state import AcceleratorState

    if not torch.distributed.is_initialized():
        # accelerate keeps one precision a process; two runs in one process may differ.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision="bf16" if wants_bf16(config) else "no",
        gradient_accumulation_steps=config.accumulate,
        cpu=config.device == "cpu",
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )


def wants_bf16(config: TrainConfig) -> bool:
    """Whether to run under bf16 autocast; "auto" asks for hardware that multiplies bf16."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if config.device == "auto" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained; one fused kernel a step where asked for.

    With an `encoder_lr`, what is inside a submodule called encoder has that learning rate, and all else `lr`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {True: config.encoder_lr or config.lr, False: config.lr}
    inside = {name: config.encoder_lr is not None and "encoder" in name.split(".")[:-1] for name, _ in trained}
    groups = [
        {"params": [parameter for name, parameter in trained if inside[name] == which], "lr": rates[which]}
        for which in sorted(set(inside.values()))
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=config.fused or None,
    )


def learning_rate(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at a step: linear warmup, then the schedule down to zero."""
    warmup = min(config.warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]

    return factor


class Trainer:
    """A run in progress."""

    def __init__(self, task: Task, config: RecipeConfig, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.position = Position()
        self.batches = training_batches(task, config.train, config.seed)
        self.dev = evaluation_sample(task.dev, config.train, config.seed)
        gpu = accelerator.device.type == "cuda"
        loader = training_loader(task, self.batches, config.train, gpu)
        optimizer = make_optimizer(task.model, config.train)
        self.model, self.optimizer, self.loader = accelerator.prepare(task.model, optimizer, loader)
        per_epoch = math.ceil(math.ceil(len(self.batches) / accelerator.num_processes) / config.train.accumulate)
        self.total = min(per_epoch * config.train.epochs, config.train.max_steps or per_epoch * config.train.epochs)
        self.eval_every = config.train.eval_every or per_epoch
        # Not prepared: accelerate would step it once a process; here a step is an update.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, learning_rate(config.train, self.total)
        )

    def resume(self) -> None:
        """Goes to the last good checkpoint of the run directory, if there is one."""
        folder = self.config.run_dir
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        state = checkpoint.load_latest(folder / "last.pt", self.accelerator.print)
        if state is not None:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.position = Position(**state["position"])
            checkpoint.set_rng_state(state["rng"])
        self.reporter = Reporter(self.config, self.position.step, self.total, self.accelerator.is_main_process)

    def fit(self) -> None:
        """Trains to the end, from wherever it stands."""
        with self.reporter:
            while self.position.step < self.total and not self.position.stopped:
                self._epoch()

    def _epoch(self) -> None:
        self.model.train()
        position = self.position
        self.batches.start_at(position.epoch, position.batch)
        for index, batch in enumerate(self.loader, start=position.batch + 1):
            with self.accelerator.accumulate(self.model):
                loss = self._update(batch)
            if self.accelerator.sync_gradients:
                position.step, position.batch = position.step + 1, index
                self.reporter.update(position, loss, self.optimizer.param_groups[0]["lr"])
                self._after_update()
            if position.step >= self.total or position.stopped:
                return
        position.epoch, position.batch = position.epoch + 1, 0

    def _update(self, batch: Batch) -> Tensor:
        loss: Tensor = self.model(**batch)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and self.config.train.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        self.optimizer.step()
        if self.accelerator.sync_gradients:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _after_update(self) -> None:
        step, save_every = self.position.step, self.config.train.save_every
        evaluates = step % self.eval_every == 0 or step == self.total
        if evaluates:
            self._keep_if_best(self.evaluate(self.dev, self.task.evaluate))
        if evaluates or (save_every and step % save_every == 0):
            self._save_last()

    def evaluate(self, examples: Any, metrics_of: Evaluation) -> dict[str, float]:
        """The metrics of the present weights."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.inference_mode(), self.accelerator.autocast():
            size, device = self.config.train.eval_batch_size, self.accelerator.device
            metrics = metrics_of(model, evaluation_batches(self.task, examples, device, size))
        model.train()
        return metrics

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
        if self.accelerator.is_main_process:
            state = {
                "recipe": self.task.name,
                "config": self.config.model_dump(mode="json"),
                "artefacts": self.task.artefacts,
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "metrics": metrics,
                "step": self.position.step,
            }
            checkpoint.save(self.config.run_dir / "best.pt", state)

    def _save_last(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "position": asdict(self.position),
                "rng": checkpoint.rng_state(),
            }
            checkpoint.save(self.config.run_dir / "last.pt", state, keep_previous=True)

    def finish(self) -> dict[str, float]:
        """Tests the best weights and marks the run as complete."""
        folder = self.config.run_dir
        self.accelerator.wait_for_everyone()
        best = checkpoint.load(folder / "best.pt")
        self.accelerator.unwrap_model(self.model).load_state_dict(best["model"])
        metrics = self.evaluate(self.task.test, self.task.evaluate_test or self.task.evaluate)
        if self.accelerator.is_main_process:
            checkpoint.save_json(folder / "test.json", {**metrics, "best_step": best["step"]})
        return metrics


def _claim(folder: Path, config: RecipeConfig) -> None:
    """Writes the configuration into a new run directory, or checks that an old one has the same."""
    file = folder / "config.yaml"
    resolved = config.model_dump(mode="json")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        checkpoint.write_atomically(file, lambda temporary: temporary.write_text(text, "utf-8"))
        return
    old = type(config).model_validate(yaml.safe_load(file.read_text("utf-8")))
    changed = differences(
        old.model_dump(mode="json", exclude=NOT_THE_RESULT),
        config.model_dump(mode="json", exclude=NOT_THE_RESULT),
    )
    if changed:
        raise ConfigError(
            f"run_dir: {folder} belongs to a run with another configuration; choose another run_dir, or "
            "delete it. What differs: " + "; ".join(changed)
        )
