"""What the settings of a training are to PyTorch: modes, precision, the optimizer and its schedule."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from fastseq import host
from fastseq.recipes import distributed
from fastseq.recipes.config import TrainConfig
from fastseq.recipes.errors import ConfigError


def prepare(model: nn.Module, config: TrainConfig) -> None:
    """Sets what a configuration asks of the matrix products and of the model's memory.

    Raises:
        ConfigError: the model cannot recompute its layers.
    """
    set_products(config)
    if config.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ConfigError("train.gradient_checkpointing: this recipe's model has no layers to recompute, got true")
        enable()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        model.compile()


def set_products(config: TrainConfig) -> None:
    """Sets what a configuration asks of the process's matrix products and convolutions."""
    if config.tf32 is not None:  # else PyTorch's own setting stays
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        torch.backends.cudnn.allow_tf32 = config.tf32
    if config.cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = config.cudnn_benchmark


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerate front end of a configuration."""
    from accelerate.state import AcceleratorState

    # accelerate keeps one precision a process; two runs in one process may differ.
    AcceleratorState._reset_state(reset_partial_state=not distributed.initialized())
    return Accelerator(
        mixed_precision="bf16" if wants_bf16(config) else "no",
        cpu=config.device == "cpu" or ("LOCAL_RANK" in os.environ and not torch.cuda.is_available()),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=distributed.TIMEOUT)],
    )


def wants_bf16(config: TrainConfig) -> bool:
    """Whether to run under bf16 autocast; "auto" asks for hardware that multiplies bf16."""
    if config.precision != "auto":
        return config.precision == "bf16"
    return host.multiplies_bf16("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")


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
