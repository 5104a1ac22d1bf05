"""What ``fastseq compare`` switches: levers, each with what it changes besides speed, and why it is not tried here."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from fastseq.recipes.config import TrainConfig
from fastseq.recipes.settings import wants_bf16
from fastseq.recipes.task import Batch, Task

Changes = Literal["", "batch", "model", "data"]
"""What a lever changes besides speed and memory; "" is nothing but rounding."""

Collate = Callable[[list[Any]], Batch]

PLAIN: dict[str, Any] = {
    "buckets": False,
    "fused": False,
    "precision": "fp32",
    "tf32": None,
    "cudnn_benchmark": None,
    "channels_last": False,
    "compile": False,
}
"""The loop's settings where every lever is off."""


@dataclass(frozen=True)
class Setup:
    """How a variant trains.

    Attributes:
        model: makes its model; the same first weights each time.
        train: the loop's settings.
        examples: that it is trained on; read by index.
        collate: makes a batch of a list of examples.
        loading: the loop's own loader makes the batches while the clock runs; else they are made before.
        set_to_none: gradients go away between updates; else they are zeroed in place.
        non_blocking: the host does not wait for copies to the device.
        keep_memory: the process keeps the memory that a step frees, for the next one.
    """

    model: Callable[[], nn.Module]
    train: TrainConfig
    examples: Sequence[Any]
    collate: Collate
    loading: bool = False
    set_to_none: bool = True
    non_blocking: bool = True
    keep_memory: bool = False

    def but(self, **settings: Any) -> Setup:
        """The same with other settings of the loop."""
        return replace(self, train=self.train.model_copy(update=settings))


def plain_setup(task: Task, train: TrainConfig, model: Callable[[], nn.Module], **changes: Any) -> Setup:
    """Every lever off.

    Args:
        task: with the data.
        train: the settings; what is no lever is kept.
        model: makes the model as it is usually written.
        changes: to the other attributes of the setup.
    """
    given: dict[str, Any] = {"examples": task.train, "collate": task.collate, **changes}
    return Setup(model, train.model_copy(update=PLAIN), **given)


@dataclass(frozen=True)
class Lever:
    """One switch.

    Attributes:
        name: for the tables.
        switch: the setup with the lever on.
        changes: what it changes besides speed and memory.
        why_not: why it cannot be tried here, in words; it is then listed and not measured.
        base: later levers build on it, so that it stays whatever it gave.
    """

    name: str
    switch: Callable[[Setup], Setup]
    changes: Changes = ""
    why_not: str | None = None
    base: bool = False


def setting(name: str, changes: Changes = "", why_not: str | None = None, **train: Any) -> Lever:
    """A lever that is a setting of the loop."""
    return Lever(name, lambda setup: setup.but(**train), changes, why_not)


# ---- the waterfall: what every recipe has ---------------------------------------------------------------------------


def buckets(train: TrainConfig) -> Lever:
    """Batches of like length."""
    why_not = "a batch is one example" if train.batch_size == 1 else None
    return setting("length buckets", why_not=why_not, buckets=True)


def numerics(train: TrainConfig, device: torch.device, bf16: str = "bf16") -> list[Lever]:
    """TF32, bf16 autocast, the fused optimizer and `host.keep_memory`; `bf16` names the second."""
    no_bf16 = None
    if train.precision == "fp32":
        no_bf16 = "train.precision=fp32 asks for fp32"
    elif not wants_bf16(train):
        no_bf16 = "this hardware does not multiply bf16"
    return [
        setting("TF32", why_not=needs_gpu(device, (8, 0)), tf32=True),
        setting(bf16, why_not=no_bf16, precision="bf16"),
        setting("fused optimizer", fused=True),
        Lever("freed memory kept", lambda setup: replace(setup, keep_memory=True), why_not=_why_not_kept(device)),
    ]


def convolutions(model: nn.Module, device: torch.device) -> list[Lever]:
    """Channels-last and cuDNN's search for the best algorithm."""
    none = (
        None if any(isinstance(module, nn.Conv2d) for module in model.modules()) else "the model has no 2-d convolution"
    )
    return [
        setting("channels-last", why_not=none, channels_last=True),
        setting("cuDNN benchmark", why_not=none or needs_gpu(device), cudnn_benchmark=True),
    ]


# ---- each alone, on what the waterfall kept --------------------------------------------------------------------------


def batch_levers(train: TrainConfig) -> list[Lever]:
    """Batch size and accumulation."""
    size, parts = train.batch_size, train.accumulate
    odd = None if size % 2 == 0 else f"the batch size {size} is odd"
    return [
        setting(f"batch of {2 * size}", "batch", batch_size=2 * size),
        setting(f"batch of {4 * size}", "batch", batch_size=4 * size),
        setting(
            f"{2 * parts} batches of {size // 2} an update", why_not=odd, batch_size=size // 2, accumulate=2 * parts
        ),
    ]


def loop_levers(model: nn.Module, train: TrainConfig, device: torch.device) -> list[Lever]:
    """Settings of the loop that keep the result and are no part of the waterfall."""
    recomputes = hasattr(model, "gradient_checkpointing_enable")
    why_not = None if recomputes else "the model has no layers to recompute"
    if train.gradient_checkpointing:
        why_not = "train.gradient_checkpointing=true: it is on in every variant"
    blocking, zeroing = "without non-blocking copies", "without set_to_none"
    return [
        setting("gradient checkpointing", why_not=why_not, gradient_checkpointing=True),
        Lever(zeroing, lambda setup: replace(setup, set_to_none=False)),
        Lever(blocking, lambda setup: replace(setup, non_blocking=False), why_not=needs_gpu(device)),
        setting("torch.compile", why_not=_why_not_compiled(train, device), compile=True),
        Lever("more processes", lambda setup: setup, why_not="needs more devices or machines: torchrun"),
    ]


def loader_levers(device: torch.device) -> list[Lever]:
    """The loader's settings, for a setup that has its batches made while the clock runs."""
    return [
        Lever("no loading (the limit)", lambda setup: replace(setup, loading=False)),
        setting("2 loader workers", workers=2),
        setting("2 workers, 16 batches ahead", workers=2, prefetch=16),
        setting("2 workers, no pinned memory", why_not=needs_gpu(device), workers=2, pin_memory=False),
    ]


def shorter(cut: Callable[[Any, int], Any], task: Task) -> Lever:
    """Training examples cut at their median length.

    Args:
        cut: the first so many positions of an example.
        task: with the examples.
    """
    length = int(np.median([task.length(task.train[i]) for i in range(len(task.train))]))
    return Lever(
        f"sequences cut at {length}",
        lambda setup: replace(setup, examples=_View(setup.examples, lambda example: cut(example, length))),
        "data",
    )


def smaller(name: str, shrink: Callable[[nn.Module], nn.Module]) -> Lever:
    """A smaller model, made of the one that it would be."""

    def switch(setup: Setup) -> Setup:
        return replace(setup, model=lambda: shrink(setup.model()))

    return Lever(name, switch, "model")


class _View(Sequence[Any]):
    """Examples as a function shows them, each made when it is read."""

    def __init__(self, examples: Sequence[Any], show: Callable[[Any], Any]) -> None:
        self.examples, self.show = examples, show

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.show(example) for example in self.examples[index]]
        return self.show(self.examples[index])


# ---- why not ---------------------------------------------------------------------------------------------------------


def needs_gpu(device: torch.device, capability: tuple[int, int] = (0, 0)) -> str | None:
    """Why something for GPUs of a compute capability is not for this device."""
    if device.type != "cuda":
        return "needs a GPU" + (f" of compute capability {capability[0]}.{capability[1]}" if capability[0] else "")
    have = torch.cuda.get_device_capability(device)
    if have < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, and this GPU has {have[0]}.{have[1]}"
    return None


def _why_not_kept(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "a GPU's memory is kept anyway"
    return None if platform.libc_ver()[0] == "glibc" else "needs glibc"


def _why_not_compiled(train: TrainConfig, device: torch.device) -> str | None:
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "needs a C++ compiler"
    return None if train.compile else "compiling takes minutes: train.compile=true tries it"
