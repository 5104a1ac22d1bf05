"""What modules are given: how much of a batch is padding, and whether they run under autocast."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.profiling.marks import Path


class Inputs:
    """Looks at the arguments of modules while it is entered.

    Args:
        modules: of each path.

    Attributes:
        positions: of each module that has read a (B,T) mask or (B,) lengths, the real positions, and all.
        autocast: whether a module ran under autocast.
    """

    def __init__(self, modules: Mapping[Path, nn.Module]) -> None:
        self.positions: dict[Path, tuple[int, int]] = {}
        self.autocast = False
        self._modules = modules

    def __enter__(self) -> Inputs:
        self._handles = ExitStack()
        for path, module in self._modules.items():
            # Each module's own: torch does not quite remove a hook on all modules that takes keywords.
            handle = module.register_forward_pre_hook(partial(self._look, path), with_kwargs=True)
            self._handles.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()

    def _look(self, path: Path, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.autocast |= any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        found = real_positions(module, args, kwargs)
        if found is not None:
            self.positions[path] = found


def real_positions(module: nn.Module, args: Any, kwargs: Any) -> tuple[int, int] | None:
    """The positions of a batch that exist, and all of them, where a module is given a (B,T) mask or (B,) lengths."""
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if "mask" in name and value.dim() == 2 and not value.is_floating_point() and value.numel():
            return int((value != 0).sum()), value.numel()
        if "lengths" in name and value.dim() == 1 and not value.is_floating_point():
            steps = [t.shape[1] for t in tensors.values() if t.dim() > 1 and t.shape[0] == len(value)]
            if steps:
                return int(value.sum()), len(value) * steps[0]
    return None
