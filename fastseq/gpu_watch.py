"""How busy and how full a GPU is, looked at once in a while by a thread; nothing at all where there is no GPU.

Utilisation comes from NVML, through the package nvidia-ml-py where it is installed; memory from torch otherwise.
"""

from __future__ import annotations

import importlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch

__all__ = ["GpuWatch", "Sample"]

MOST = 3600
"""Samples that are kept for the mean."""


@dataclass(frozen=True)
class Sample:
    """What one look, or the mean of several, has found.

    Attributes:
        utilisation: per cent of the time that some kernel ran; None without NVML.
        memory_used: bytes, of all processes.
        memory_total: bytes.
    """

    utilisation: float | None
    memory_used: float
    memory_total: float

    def __str__(self) -> str:
        busy = "" if self.utilisation is None else f"{self.utilisation:.0f} % "
        return f"GPU {busy}{self.memory_used / 2**30:.1f}/{self.memory_total / 2**30:.1f} GiB"

    def as_dict(self) -> dict[str, float]:
        """For a log: the utilisation, if it is known, and the share of the memory in use, both in per cent."""
        memory = 100 * self.memory_used / self.memory_total
        busy = {} if self.utilisation is None else {"utilisation": round(self.utilisation, 1)}
        return {**busy, "memory": round(memory, 1)}


class GpuWatch:
    """Looks at a GPU while it is entered. On another device, no thread is started and there are no samples.

    Args:
        device: whose GPU; one that is no CUDA device is not watched.
        interval: seconds between two looks.

    Example:
        >>> with GpuWatch(torch.device("cpu")) as watch:
        ...     print(watch.mean())
        None
    """

    def __init__(self, device: torch.device, interval: float = 1.0) -> None:
        self.device, self.interval = device, interval
        self._samples: deque[Sample] = deque(maxlen=MOST)
        self._latest: Sample | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuWatch:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to look."""
        if self.device.type == "cuda":
            look = _nvml(self.device) or partial(_memory, self.device)
            self._thread = threading.Thread(target=self._watch, args=(look,), name="fastseq-gpu-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def latest(self) -> Sample | None:
        """What the last look has found."""
        return self._latest

    def mean(self) -> Sample | None:
        """The mean of the samples since the last call; None where there are none."""
        with self._lock:
            samples = list(self._samples)
            self._samples.clear()
        if not samples:
            return None
        busy = [sample.utilisation for sample in samples if sample.utilisation is not None]
        return Sample(
            sum(busy) / len(busy) if busy else None,
            sum(sample.memory_used for sample in samples) / len(samples),
            samples[-1].memory_total,
        )

    def _watch(self, look: Callable[[], Sample]) -> None:
        while True:
            try:
                sample = look()
            except Exception:  # a driver that stops answering must not stop the training, nor fill its screen
                return
            with self._lock:
                self._samples.append(sample)
                self._latest = sample
            if self._stop.wait(self.interval):
                return


def _memory(device: torch.device) -> Sample:
    free, total = torch.cuda.mem_get_info(device)
    return Sample(None, total - free, total)


def _nvml(device: torch.device) -> Callable[[], Sample] | None:
    """How to look with NVML; None where it is not installed or does not know the device."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # By its name for all time: CUDA_VISIBLE_DEVICES changes torch's numbers, and not NVML's.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetUtilizationRates(handle)
    except Exception:  # whatever the reason is, training goes on without
        return None

    def look() -> Sample:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return Sample(float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), memory.used, memory.total)

    return look
