"""What the families share: a case a shape, one backend forced, a rival a backend, and the error of gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastseq
from fastseq.registry import OPS, Backend
from fastseq_benchmarks.runner import Case, Shape

__all__ = ["HALF", "backends_of", "cases_of", "forced", "gradient_error"]

HALF = " bf16"
"""What the name of a rival with bfloat16 products ends in."""


def cases_of(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: str,
    *,
    make_inputs: Callable[..., Any],
    goals: Callable[[Shape], Mapping[str, float]] = lambda _: {},
    **fields: Any,
) -> list[Case]:
    """One case a shape.

    Args:
        shapes: The shapes.
        dtype: Of the inputs.
        device: cpu or cuda.
        make_inputs: `make_inputs(shape, dtype, device, seed)`.
        goals: The speed-ups aimed at, on a CPU.
        fields: The other fields of `Case`, the same for all.
    """
    return [
        Case(
            shape=",".join(map(str, shape)),
            make_inputs=functools.partial(make_inputs, shape, dtype, device),
            goals=goals(shape) if device == "cpu" else {},
            dtype=dtype,
            device=device,
            **fields,
        )
        for shape in shapes
    ]


def backends_of(op: str, device: str) -> list[Backend]:
    """The backends of an op that are chosen by themselves on a device, in the order of choice."""
    return [b for b in OPS[op].backends if b.automatic and b.device in (device, None)]


@contextlib.contextmanager
def forced(backend: str, half: bool = False, grad: bool = True) -> Iterator[None]:
    """One backend; with or without bfloat16 autocast on a CPU, and with autograd or, as at inference, without."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with fastseq.use(backend), autocast, torch.set_grad_enabled(grad):
        yield


def gradient_error(result: Mapping[str, Tensor], truth: Mapping[str, Tensor], least: float = 0.0) -> float:
    """The largest error over a loss and its gradients, each relative to its own largest entry, or to `least`."""

    def error(name: str) -> float:
        true = truth[name]
        return float((result[name].double() - true).abs().max() / true.abs().max().clamp(min=least))

    return max((error(name) for name in truth), key=lambda e: float("inf") if e != e else e)
