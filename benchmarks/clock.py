"""Two clocks, which leave nothing running: a sample is over when all that it asked for is done.

A CPU's is the host's. A GPU's calls come back before their work is done, so it is timed by events on its own stream,
from an idle device until it is idle again: where the host is too slow to keep it busy, that counts as well.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "clock"]


class Clock(Protocol):
    """Started once before each sample."""

    def start(self) -> None:
        """Wait until nothing runs, and begin."""

    def stop(self) -> float:
        """Wait until nothing runs; the seconds since `start`."""


class HostClock:
    """For calls that come back when they are done."""

    def start(self) -> None:
        """See Clock."""
        self._start = time.perf_counter()

    def stop(self) -> float:
        """See Clock."""
        return time.perf_counter() - self._start


class DeviceClock:
    """For a CUDA device: `cuda` is torch.cuda, or something that behaves like it."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._first, self._last = (cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        """See Clock."""
        self._cuda.synchronize()
        self._first.record()

    def stop(self) -> float:
        """See Clock."""
        self._last.record()
        self._cuda.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1e3


def clock(device: str) -> Clock:
    """The clock of a device: cpu or cuda."""
    return DeviceClock() if device == "cuda" else HostClock()
