"""What a call costs besides time: operators run, bytes kept for backward, peak memory, work for a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq.registry import IMPLEMENTATIONS, NAMESPACE

__all__ = ["count_ops", "device_work", "kept_bytes", "peak_bytes"]

Call = Callable[[], Any]

LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|Memcpy|Memset)")
WAIT = re.compile(r"cu(da)?(Stream|Event)Synchronize")  # not of the device: that is the profiler's own


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that reach a backend.

    A `fastseq::` op is the boundary where a backend is chosen, not work: what the backend runs is counted in
    its place, which is one op of a compiled library, or all the aten ops that the eager backend is made of.
    `detach` is not counted: autograd hands tensors on with it, more often under a mode than without one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            with self:
                return IMPLEMENTATIONS[func._opname](*args, **(kwargs or {}))
        self.count += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def count_ops(call: Call) -> int:
    """The number of aten and compiled fastseq operators that a call runs, views included, `detach` not."""
    counter = _Counter()
    with counter:
        call()
    return counter.count


def kept_bytes(call: Call, but: Iterable[torch.Tensor] = ()) -> int:
    """The bytes of all distinct storages that autograd saves for backward, the call's own inputs included.

    Args:
        call: What is run.
        but: Tensors whose storages do not count.
    """
    not_counted = {tensor.untyped_storage()._cdata for tensor in but}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in not_counted)


def peak_bytes(call: Call, device: str = "cpu") -> int | None:
    """The most memory that a call adds while it runs, or None where that cannot be measured.

    On a CUDA device it is the allocator's own count. On a CPU it is the growth of the process's resident set
    (Linux only), which sees kernels' scratch buffers as well; it is good to about 0.2 MiB.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        if sys.platform != "linux":
            return None
        ctypes.CDLL(None).malloc_trim(0)  # give freed pages back: pages used again would not show as growth
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, StopIteration):
        return None


def device_work(call: Call) -> tuple[int, int, int] | None:
    """(kernels, launches, waits) of a call on a CUDA device: see `RivalResult`; None where nothing records them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one sets the profiler up, and may miss what comes meanwhile
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
    return count_events(profile.events())


def count_events(events: Iterable[Any]) -> tuple[int, int, int] | None:
    """(kernels, launches, waits) among a profiler's events; None if there are no kernels, copies or fills."""
    kernels = launches = waits = 0
    for event in events:
        if event.device_type.name == "CUDA":
            kernels += 1
        else:
            launches += LAUNCH.match(event.name) is not None
            waits += WAIT.match(event.name) is not None
    return (kernels, launches, waits) if kernels else None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
