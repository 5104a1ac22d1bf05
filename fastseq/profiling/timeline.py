"""From a Chrome trace to the time of each place: what ran, on whose behalf, forward or backward.

torch's profiler writes down every operator call. What lies inside a module's mark is its forward pass. A node of the
backward pass has the sequence number of the forward call that made it, and so belongs to the module of that call.
What a place has besides its calls is Python's time.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastseq.profiling.marks import Path

STEP: Path = ()
"""The step's own code, outside all modules."""

DATA, CLIP, OPTIMIZER, ZERO_GRAD, NO_LAYER = (
    (name,) for name in ("data loading", "gradient clipping", "optimizer", "zero_grad", "backward, of no layer")
)
TORCH_MARKS = {"enumerate(DataLoader)#": DATA, "Optimizer.step#": OPTIMIZER, "Optimizer.zero_grad#": ZERO_GRAD}
"""What torch marks itself: how those names begin."""

STEP_MARK = "fastseq.profile: step"
ENGINE = "autograd::engine::evaluate_function: "
NOT_PYTHON = re.compile(r"Backward\d+$|::|Compiled")
"""Names of what runs outside Python: torch's own nodes, operators, and what torch.compile has made."""

_WAITS = ("Synchronize", "cudaMemcpy")


class Key(NamedTuple):
    """What time is added up by: where, in which direction, and whether it is Python's."""

    place: Path
    backward: bool
    python: bool


@dataclass
class Total:
    """What a key came to, over all recorded steps.

    Attributes:
        us: microseconds of the host.
        events, marks: written down in that time, which is what recording has cost it.
        calls: operators called, not counting those that operators call.
        gpu_us: microseconds of kernels and copies launched.
        launches: of those.
    """

    us: float = 0.0
    events: int = 0
    marks: float = 0.0
    calls: int = 0
    gpu_us: float = 0.0
    launches: int = 0


@dataclass
class Reading:
    """What a trace says.

    Attributes:
        steps: recorded.
        us: microseconds of all of them, recording included.
        totals: what they are made of.
        op_us: microseconds of each operator, by place; operators inside of operators are part of these.
        first: of each place, when it first ran.
        waits: times that the host waited for the GPU.
    """

    steps: int = 0
    us: float = 0.0
    totals: defaultdict[Key, Total] = field(default_factory=lambda: defaultdict(Total))
    op_us: defaultdict[Path, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    first: dict[Path, float] = field(default_factory=dict)
    waits: int = 0


@dataclass
class _Frame:
    """An event that runs: until when, and what its time counts as."""

    end: float
    key: Key
    kind: str
    in_op: bool


def read(events: Iterable[Mapping[str, Any]], names: Mapping[str, Path]) -> Reading:
    """Adds up the events of a trace.

    Args:
        events: of the Chrome trace format, as torch writes it.
        names: the place of each mark of `Marks`.
    """
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    host = [event for event in timed if event.get("cat") in ("cpu_op", "user_annotation")]
    steps = [event for event in host if event["name"] == STEP_MARK]
    if not steps:
        return Reading()
    # Other threads, such as a loader's, run beside the step; those of the backward pass run while it waits.
    threads = {steps[0]["tid"]} | {event["tid"] for event in host if event["name"].startswith(ENGINE)}
    host = [event for event in host if event["tid"] in threads]
    sweep = _Sweep(names, steps[0]["tid"])
    for event in sorted(host, key=lambda event: (event["ts"], -event["dur"])):
        sweep.add(event)
    sweep.advance(float("inf"))
    _add_gpu(sweep, [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")])
    spans = [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    waits = [event["ts"] for event in timed if event.get("cat") == "cuda_runtime" and _waits(event["name"])]
    sweep.reading.waits = sum(any(a <= at <= b for a, b in spans) for at in waits)
    return sweep.reading


def _waits(name: str) -> bool:
    return name.endswith(_WAITS)  # cudaMemcpyAsync does not


def _add_gpu(sweep: _Sweep, events: Iterable[Mapping[str, Any]]) -> None:
    """Adds what the GPU has done to the places whose operators launched it."""
    for event in events:
        key = sweep.launchers.get(event.get("args", {}).get("External id"))
        if key is not None:
            total = sweep.reading.totals[key]
            total.gpu_us += event["dur"]
            total.launches += 1


class _Sweep:
    """Goes through the host's events in the order of their beginnings, with a stack of those that run."""

    def __init__(self, names: Mapping[str, Path], main: Any) -> None:
        self.names, self.main = names, main
        self.reading = Reading()
        self.launchers: dict[Any, Key] = {}
        self._stack: list[_Frame] = []
        self._now = 0.0
        self._owners: dict[int, Path] = {}
        self._after_backward = False
        self._clips = False
        self._pending = defaultdict[Key, Total](Total)

    def advance(self, to: float) -> None:
        """Gives the time until `to` to the innermost events that run."""
        while self._stack:
            frame = self._stack[-1]
            until = min(frame.end, to)
            self._total(frame.key).us += max(0.0, until - self._now)
            self._now = max(self._now, until)
            if frame.end > to:
                return
            self._stack.pop()
            if frame.kind == "step":
                self._settle(Key(STEP, False, True))
        self._now = max(self._now, to)

    def add(self, event: Mapping[str, Any]) -> None:
        """An event begins."""
        self.advance(event["ts"])
        name, args, end = event["name"], event.get("args", {}), event["ts"] + event["dur"]
        if not self._stack:
            if name == STEP_MARK:
                self.reading.steps += 1
                self.reading.us += event["dur"]
                self._push(_Frame(end, Key(STEP, False, True), "step", False))
            return
        parent = self._stack[-1]
        frame = self._frame(name, args, end, parent, event["cat"])
        marked = frame.kind in ("mark", "torch mark")
        for key, share in ((parent.key, 0.5), (frame.key, 0.5)) if marked else ((parent.key, 1.0),):
            total = self._total(key)
            total.marks, total.events = total.marks + share * marked, total.events + (not marked)
        if frame.kind == "op" and not parent.in_op:
            self._total(frame.key).calls += 1
            self.reading.op_us[frame.key.place][name] += event["dur"]
            self._clips |= self._after_backward and "norm" in name
        if event["tid"] == self.main and frame.kind not in ("engine", "node") and "Sequence number" in args:
            self._owners[args["Sequence number"]] = frame.key.place  # the last call of a number has made its node
        self.launchers[args.get("External id")] = frame.key
        self.reading.first.setdefault(frame.key.place, event["ts"])
        self._push(frame)

    def _frame(self, name: str, args: Mapping[str, Any], end: float, parent: _Frame, category: str) -> _Frame:
        """What an event's time counts as, by its name and by what it lies in."""
        key = parent.key
        place = self.names.get(name) or next((p for n, p in TORCH_MARKS.items() if name.startswith(n)), None)
        if category == "user_annotation" and place is not None:
            if not key.backward:
                self._settle(Key(CLIP if place == OPTIMIZER and self._clips else STEP, False, True))
            kind = "mark" if name in self.names else "torch mark"
            return _Frame(end, Key(place, key.backward, True), kind, False)
        if name.startswith(ENGINE):
            place = self._owners.get(args.get("Sequence number", -1), NO_LAYER if not key.backward else key.place)
            if not key.backward:
                between = any(total.calls for total in self._pending.values())
                self._settle(Key(STEP, False, True) if between else Key(place, True, False))
                self._after_backward = True
            return _Frame(end, Key(place, True, False), "engine", False)
        if parent.kind == "engine" and not name.startswith("aten::"):  # those add up what several nodes give one
            return _Frame(end, key._replace(python=not NOT_PYTHON.search(name)), "node", "Compiled" in name)
        if NOT_PYTHON.search(name):
            return _Frame(end, key._replace(python=False), "op", True)
        return _Frame(end, key, "other", parent.in_op)

    def _push(self, frame: _Frame) -> None:
        if self._stack:
            frame.end = min(frame.end, self._stack[-1].end)
        self._stack.append(frame)

    def _total(self, key: Key) -> Total:
        # What lies after a backward pass and outside all marks is known by what comes next.
        pending = self._after_backward and key.place == STEP and not key.backward
        return (self._pending if pending else self.reading.totals)[key]

    def _settle(self, key: Key) -> None:
        """Gives what has been pending since the last backward pass to a place; what are operators' stays so."""
        for pending, part in self._pending.items():
            total = self.reading.totals[key._replace(python=key.python and pending.python)]
            for name, value in vars(part).items():
                setattr(total, name, getattr(total, name) + value)
        if self._pending:
            self.reading.first.setdefault(key.place, self._now)
        self._pending.clear()
        self._after_backward = self._clips = False
