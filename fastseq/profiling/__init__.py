"""Where the time of a training step goes: `profile` runs a few steps of anyone's loop, and says what they are made of.

marks.py says which module runs, record.py runs the steps, timeline.py reads their trace, tree.py makes rows of it;
advice.py says what the figures say, and trial.py tries what fastseq.patch would give.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import nn

from fastseq.gpu_watch import GpuWatch, Sample
from fastseq.profiling.advice import NOTHING, Evidence, advice, of_trial
from fastseq.profiling.marks import Marks
from fastseq.profiling.record import Step, memory, recorded, seconds
from fastseq.profiling.tree import Phase, build, rows
from fastseq.profiling.trial import try_patch

__all__ = ["Phase", "Profile", "profile"]


@dataclass
class Profile:
    """What a training step is made of; `str` of it is a table.

    Attributes:
        step_ms: milliseconds of a step, timed while nothing was watched.
        recorded_ms: the same while the profiler wrote down every call.
        phases: what `step_ms` is made of, in the order of a step.
        calls: operators called a step.
        python_share: of the step that is outside operators.
        kept_bytes: that are kept for the backward pass, parameters not counted; None for a compiled model.
        peak_bytes: on a GPU the most that torch held; elsewhere the most that the tensors made in a step hold at once,
            None for a compiled model.
        launches: kernels and copies a step on a GPU.
        waits: times a step that the host waits for the GPU.
        gpu: how busy and how full the GPU was; None without one.
        device: in words.
        advice: what could be faster, each with the figure that was measured for it.
    """

    step_ms: float
    recorded_ms: float
    phases: list[Phase]
    calls: float
    python_share: float
    kept_bytes: int | None
    peak_bytes: int | None
    launches: float
    waits: float
    gpu: Sample | None
    device: str
    advice: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """The lines below the table."""
        lines = [
            f"{self.step_ms:.2f} ms a step, timed on its own; recording made it {self.recorded_ms:.2f} ms, which the "
            "phases do without.",
            f"{self.calls:.0f} operator calls a step; {self.python_share:.0%} of it is Python, outside operators.",
        ]
        if self.kept_bytes is not None:
            lines.append(f"{_mb(self.kept_bytes)} MB are kept for the backward pass.")
        if self.peak_bytes is not None:
            lines.append(f"{_mb(self.peak_bytes)} MB live at the peak.")
        if self.launches:
            lines.append(f"{self.launches:.0f} launches and {self.waits:.0f} waits for the GPU a step.")
        return [*lines, *([str(self.gpu)] if self.gpu else []), self.device]

    def cells(self) -> list[list[str]]:
        """The table as text: a heading, a line for each phase, and the sum."""
        whole = Phase("a step")
        for phase in self.phases:
            whole.add(phase)
        on_gpu = ["GPU ms", "launches"] if self.launches else []
        lines = [["", "ms", "share", "fwd", "bwd", "calls", "kept MB", *on_gpu]]
        for phase in (*self.phases, whole):
            times = (phase.forward_ms, phase.backward_ms)
            shown = [_ms(phase.ms), f"{phase.share:.1%}", *(_ms(ms) if ms >= 0.005 else "" for ms in times)]
            kept = _mb(phase.kept_bytes) if phase.kept_bytes else ""
            gpu = [_ms(phase.gpu_ms), f"{phase.launches:.0f}"] if on_gpu else []
            lines.append([phase.name, *shown, f"{phase.calls:.0f}" if phase.calls else "", kept, *gpu])
        return lines

    def __str__(self) -> str:
        lines = self.cells()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = []
        for name, *figures in lines:
            right = [cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True)]
            table.append("  ".join([name.ljust(widths[0]), *right]))
        return "\n".join([*table, "", *self.summary(), "", *self.advice])


def profile(
    step: Step,
    *,
    model: nn.Module | None = None,
    steps: int = 10,
    warmup: int = 3,
    trace: str | File | None = None,
    patch: bool = True,
) -> Profile:
    """Say where the time of a training step goes, and what could be faster.

    The step is run some eight times as often as `steps` says, and really trains: weights, optimizer and data loader go
    on. Everything else is left as it was. Its time is that of steps that nothing watches. The phases come from others,
    under torch's profiler: a module has its forward pass and, by autograd's numbers, the backward pass of what it did;
    what recording costs is taken off by the number of calls. A module that is compiled is one phase.

    Args:
        step: A function without arguments that does one training step: batch, forward, backward, optimizer.
        model: The model, where the step calls parts of it only; else what the step calls is found.
        steps: Steps that are timed, before and after as many that are recorded.
        warmup: Steps before those, after a first one.
        trace: A file for the Chrome trace of the recorded steps (chrome://tracing, ui.perfetto.dev), or None.
        patch: Where `fastseq.patch` knows layers of the model, patch it, time the step in turns with and without, and
            unpatch it again.

    Returns:
        The phases, and advice.

    Raises:
        TypeError: `step` cannot be called, or `model` is no module.
        ValueError: a count is too small, or there is no folder for the trace.

    Example:
        >>> model = torch.nn.Linear(8, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def step():
        ...     model(torch.ones(4, 8)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> print(profile(step))  # doctest: +SKIP
    """
    _check(step, model, steps, warmup, trace)
    marks = Marks(model)
    with marks:  # to know the modules, and where they are; what is compiled is compiled once for this, once without
        step()
    for _ in range(warmup):
        step()
    device = _device(marks.roots)
    with GpuWatch(device, interval=0.1) as watch:
        spent = seconds(step, steps, device)
        gpu = watch.mean()
    reading, costs = recorded(step, steps, marks, device, File(trace) if trace is not None else None)
    spent += seconds(step, steps, device)
    step_ms = 1e3 * spent / (2 * steps)
    needs, inputs = memory(step, marks, device)
    tree = build(reading, needs.kept, marks.modules, step_ms, costs)
    whole = tree.whole
    found = Evidence(tree, whole, reading, marks, inputs, step_ms, device, gpu)
    trials = {root: try_patch(root, step, steps, device) for root in marks.roots if patch}
    said = [of_trial(trial, marks.path(root), tree) for root, trial in trials.items() if trial is not None]
    return Profile(
        step_ms=step_ms,
        recorded_ms=reading.us / 1e3 / reading.steps,
        phases=rows(tree),
        calls=whole.calls,
        python_share=whole.python_ms / step_ms,
        kept_bytes=needs.kept_bytes,
        peak_bytes=needs.peak_bytes,
        launches=whole.launches,
        waits=reading.waits / reading.steps,
        gpu=gpu,
        device=_in_words(device),
        advice=[*said, *advice(found)] or [NOTHING],
    )


def _check(step: Any, model: Any, steps: int, warmup: int, trace: str | File | None) -> None:
    if not callable(step):
        raise TypeError(f"step: a function that does one training step is wanted, got {type(step).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: a torch.nn.Module or None is wanted, got {type(model).__name__}")
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: a count of at least {least} is wanted, got {value!r}")
    if trace is not None and not File(trace).absolute().parent.is_dir():
        raise ValueError(f"trace: a file in a folder that exists is wanted, got {str(trace)!r}")


def _device(roots: list[nn.Module]) -> torch.device:
    """Where the step computes: on the GPU of a parameter that has one."""
    devices = [parameter.device for root in roots for parameter in root.parameters()]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
