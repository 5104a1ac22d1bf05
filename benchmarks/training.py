"""Training steps of whole models, as the benchmarks time and check them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import host
from fastseq_benchmarks.common import HALF
from fastseq_benchmarks.runner import Rival

__all__ = ["Step", "fused_rival", "relative_norm", "training_step"]

HALF_TOLERANCE = 0.1  # of all gradients together, where words are few

Step = tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]
"""A step, its update included; and a call that gives loss and gradients by name, without dropout or an update."""


def training_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    half: bool = False,
    checked: Mapping[str, Tensor] | None = None,
    **adam: Any,
) -> Step:
    """A step of a model whose result is a loss, or has one, with AdamW.

    Args:
        model: Trained in place.
        batch: Its arguments.
        half: Whether the forward pass is under bfloat16 autocast.
        checked: Other arguments, for the call that is checked.
        adam: Options of the optimizer.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **adam)
    device = next(model.parameters()).device.type

    def backward(arguments: Mapping[str, Tensor]) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = model(**arguments)
        loss: Tensor = out if isinstance(out, Tensor) else out.loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step() -> Tensor:
        loss = backward(batch)
        optimizer.step()
        return loss

    def named() -> dict[str, Tensor]:
        with _evaluated(model):
            loss = backward(batch if checked is None else checked).detach().clone()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss} | grads

    return step, named


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def fused_rival(
    name: str, model: nn.Module, batch: Mapping[str, Tensor], *, half: bool = False, **options: Any
) -> Rival:
    """A model of fastseq's: with the fused AdamW and `host.keep_memory()`, and more error allowed under autocast."""
    step, named = training_step(model, batch, half=half, fused=True, **options)
    context = functools.partial(_keeping_memory, named)  # which updates no weights
    return Rival(name + HALF * half, step, named, context, HALF_TOLERANCE if half else None)


@contextlib.contextmanager
def _keeping_memory(call: Callable[[], Any]) -> Iterator[None]:
    """`host.keep_memory()`, with memory to keep; then what the C library itself ends up with as blocks are freed."""
    kept = host.keep_memory()
    try:
        call()
        yield
    finally:
        if kept:
            host.keep_memory(False)


def relative_norm(result: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The error of all gradients together, relative to their norm: some, of biases of keys, are 0 but for rounding."""
    total = math.sqrt(sum(float(t.double().square().sum()) for t in truth.values()))
    error = math.sqrt(sum(float((result[n].double() - t).square().sum()) for n, t in truth.items()))
    return error / total
