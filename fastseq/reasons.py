"""Why a backend cannot run something, in words: what `fastseq info`, `explain` and the errors of forcing print."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastseq import library

__all__ = ["WhyNot", "needs", "no_cuda", "no_triton", "with_gpu"]

WhyNot = Callable[..., str | None]
"""Given an op's arguments: None if a backend can run them, else the reason in words."""


def needs(
    *,
    device: str | None = None,
    dtype: Sequence[torch.dtype] | None = None,
    capability: tuple[int, int] | None = None,
    limits: Callable[..., str | None] | None = None,
) -> WhyNot:
    """Build the usual `why_not`: on the op's first tensor, plus `limits`.

    Args:
        device: The type of its device.
        dtype: Its dtype is one of these.
        capability: The oldest CUDA compute capability, as in (8, 0).
        limits: More reasons, from all of the op's arguments.
    """

    def why_not(*args: Any) -> str | None:
        lead = _lead(args)
        if device is not None and lead.device.type != device:
            return f"needs a {device} tensor, got one on {lead.device}"
        if dtype is not None and lead.dtype not in dtype:
            return f"needs one of {', '.join(str(d).removeprefix('torch.') for d in dtype)}, got {lead.dtype}"
        if capability is not None and lead.is_cuda and _capability(lead.device) < capability:
            return f"needs a GPU of sm_{_sm(capability)} or later, this one is sm_{_sm(_capability(lead.device))}"
        return limits(*args) if limits is not None else None

    return why_not


def _lead(args: Sequence[Any]) -> Any:
    """The first argument that is not absent: where an op begins with optional tensors, the first tensor."""
    return args[0] if args[0] is not None else next(a for a in args if a is not None)


@functools.cache
def no_cuda() -> str | None:
    """The reason that torch cannot use a CUDA device here, or None. Found out once: asking the driver takes time."""
    none = "torch finds no CUDA device"
    if torch.version.cuda is None:  # so it is on a ROCm torch, whose devices are called cuda too
        return f"{none}: torch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except Exception as error:  # the driver's own words, whatever they are
        return f"{none}: {str(error).partition(chr(10))[0]}"
    return none


@functools.cache
def no_triton() -> str | None:
    """The reason that Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (reason := no_cuda()) is not None:
        return reason
    compilers = os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")
    if not any(compilers):
        return "triton builds a launcher for each kernel, and finds no C compiler: set CC, or install gcc or clang"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def with_gpu(why_not: WhyNot) -> WhyNot:
    """`why_not`, then the reason that the CUDA library cannot run on the GPU of the op's first tensor."""

    def both(*args: Any) -> str | None:
        reason = why_not(*args)
        lead = _lead(args)
        return _library_cannot_run(lead.device) if reason is None and lead.is_cuda else reason

    return both


@functools.cache
def _library_cannot_run(device: torch.device) -> str | None:
    return library.cannot_run(_capability(device))


def _sm(capability: tuple[int, int]) -> str:
    return "".join(map(str, capability))
