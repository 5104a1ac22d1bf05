"""Runs steps: timed and not watched, then under torch's profiler, then with their memory watched."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path as File
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastseq.profiling.inputs import Inputs
from fastseq.profiling.marks import Marks, Path
from fastseq.profiling.memory import Kept, Watch
from fastseq.profiling.timeline import STEP_MARK, Reading, read

ROUNDS, CALLS = 10, 20
"""How often marks and operators are timed, to know what recording one costs."""

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Step, count: int, device: torch.device) -> float:
    """How long so many steps take."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - start


class Costs(NamedTuple):
    """Microseconds that recording takes: for a mark of a module, and for any other event."""

    mark_us: float
    event_us: float


def recorded(step: Step, count: int, marks: Marks, device: torch.device, trace: File | None) -> tuple[Reading, Costs]:
    """Runs so many steps under torch's profiler.

    Args:
        step: to run.
        count: how often.
        marks: not entered yet.
        device: that the step computes on.
        trace: where the Chrome trace goes, or None.

    Returns:
        What the trace says, and what recording has cost.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _quiet(), profile(activities=kinds) as profiler:
        with marks:
            marks.recording = True
            for _ in range(count):
                with record_function(STEP_MARK):
                    step()
            marks.recording = False
        synchronize(device)
        mark_us, call_us = _mark_us(), _call_us()
    costs = Costs(mark_us, max(0.0, call_us - _call_us()))
    with tempfile.TemporaryDirectory() as folder:
        file = File(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text("utf-8", "replace"))["traceEvents"]
        if trace is not None:
            shutil.move(file, trace)
    return read(events, marks.names), costs


def _mark_us() -> float:
    """What it takes to mark a module's forward pass."""
    marks, module = Marks(), nn.Identity()
    marks.recording = True

    def mark() -> None:
        marks.enter(module, ())
        marks.leave(module, (), None)

    return _shortest_us(mark)


def _call_us() -> float:
    """What a call takes that does next to nothing."""
    return _shortest_us(lambda: torch.empty(0))


def _shortest_us(call: Step) -> float:
    """The shortest mean of some calls: what else the machine does must not count."""
    return 1e6 * min(seconds(call, CALLS, torch.device("cpu")) for _ in range(ROUNDS)) / CALLS


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that some builds of the profiler write to the screen when it begins and ends."""
    name, before = "KINETO_LOG_LEVEL", os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class Memory(NamedTuple):
    """What a step needs; None for what cannot be watched, in a model that is compiled.

    Attributes:
        kept: the bytes that each place keeps for the backward pass.
        kept_bytes: all of that.
        peak_bytes: the most that lived at once: on a GPU of all that torch holds for tensors, elsewhere of what the
            step has made itself.
    """

    kept: dict[Path, int]
    kept_bytes: int | None
    peak_bytes: int | None


def memory(step: Step, marks: Marks, device: torch.device) -> tuple[Memory, Inputs]:
    """Runs two steps, with their memory and what modules are given watched."""
    kept = Kept(lambda: marks.place, marks.parameters)
    with Inputs(marks.modules) as inputs, marks, nullcontext() if marks.compiled else kept:
        step()
    by_place = cast(dict[Path, int], dict(kept.live.at_peak))
    return Memory(by_place, None if marks.compiled else kept.live.peak, _peak(step, marks, device)), inputs


def _peak(step: Step, marks: Marks, device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    if marks.compiled:
        return None
    watch = Watch()
    with watch:
        step()
    return watch.live.peak
