"""Where a training step's time goes: one clock that is always in one phase, and hooks that switch it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

PHASES = (
    "data loading",
    "embedding",
    "encoder",
    "decoder",
    "attention",
    "pointer",
    "loss",
    "backward",
    "optimizer",
)


class Clock:
    """Adds up the seconds of each phase; switching costs a microsecond, and on a GPU a wait for it.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.wait = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forgets all, and is in no phase."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase: str | None = None
        self.since = 0.0

    def switch(self, phase: str | None) -> str | None:
        """Ends the phase that runs and begins another, or none; returns the one that ran."""
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] += now - self.since
        before, self.phase, self.since = self.phase, phase, now
        return before

    def watch(self, module: nn.Module, phase: str) -> None:
        """Counts a module's forward pass as a phase, whatever runs around it."""
        around: list[str | None] = []

        def begin(*_: Any) -> None:
            around.append(self.switch(phase))

        def end(*_: Any) -> None:
            self.switch(around.pop())

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
