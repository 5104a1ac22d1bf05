"""The generic runner: it checks every rival against the truth, then times those that are right, interleaved.

A round takes a sample of each rival in turn, then of the floors, and then of the baseline again, as a control:

    A B C floor A'   A B C floor A'   A B C floor A'  ...

Ratios are taken within a round, so that what slows the machine down for a while cancels out, and the interval
of a ratio is that of the rounds' ratios. Where the medians of A and A' differ by more than 10 %, or the
interval of their ratio reaches beyond 25 %, the machine was too busy, and the case is marked "not judged".
A sample is the mean of as many calls as fill 10 ms, up to the moment when all their work is done (`clock`). A rival
whose result is wrong is refused, and not timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastseq_benchmarks import measure
from fastseq_benchmarks.clock import Clock, clock
from fastseq_benchmarks.floor import copy_sampler, fma_sampler
from fastseq_benchmarks.results import CaseResult, RivalResult
from fastseq_benchmarks.stats import estimate, paired_ratio

__all__ = ["CONTROL_TOLERANCE", "Case", "Effort", "Rival", "Run", "Shape", "Suite", "round_robin", "run_case"]

CONTROL_TOLERANCE = 0.10  # of the medians
CONTROL_SPREAD = 0.25  # of the interval of their ratio
CONTROL = "control"
FLOOR = "floor"
COPY = "copy"

Call = Callable[[], Any]
Shape = tuple[int, ...]
Tracks = Mapping[str, Callable[[], float]]


@dataclasses.dataclass(frozen=True)
class Rival:
    """One way to compute a case.

    Attributes:
        name: Its name in the tables.
        call: What is timed.
        result: What the gate compares; runs `call` and gathers its outputs. By default what `call` returns.
        context: Entered around the calls, outside the clock: where a backend is forced.
        tolerance: The error allowed, if not the case's own: for a peer whose precision is known to be low.
        missing: Why it cannot run here; then it is listed and left out.
        probe: Timed beside the others, on work of its own: neither checked nor compared.
    """

    name: str
    call: Call
    result: Call | None = None
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    tolerance: float | None = None
    missing: str = ""
    probe: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one suite.

    Attributes:
        family, suite, letters, shape: Its names; the letters are those of the shape's numbers.
        make_inputs: Inputs from a seed; the functions below get them.
        rivals: All rivals; the first that is right is the baseline.
        truth: The result in float64, computed by the definition.
        check: `check(result, truth)` is the error, 0 for none.
        tolerance: The error allowed.
        work: The multiply-adds that the floor counts, if the case has a floor.
        traffic: The bytes that cannot but be read or written, if they are to be compared with a copy's (on a GPU).
        goals: The speed-up aimed at, by rival.
        dtype, device: Of the inputs.
    """

    family: str
    suite: str
    letters: str
    shape: str
    make_inputs: Callable[[int], Any]
    rivals: Callable[[Any], list[Rival]]
    truth: Callable[[Any], Any]
    check: Callable[[Any, Any], float]
    tolerance: float
    work: Callable[[Any], float] | None = None
    traffic: Callable[[Any], float] | None = None
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases of one kind.

    Attributes:
        cases: `cases(shapes, dtype, device)` makes them.
        letters: What the numbers of a shape are, as in "B,T,K".
        shapes: Those that are run unless others are asked for.
        large: More of them on a GPU.
        quick: Those of a first look, if not the first of `shapes`.
        by_name: Run only if it is asked for.
    """

    cases: Callable[[Sequence[Shape], torch.dtype, str], list[Case]]
    letters: str
    shapes: Sequence[Shape]
    large: Sequence[Shape] = ()
    quick: Sequence[Shape] = ()
    by_name: bool = False


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        budget_s: No round begins after this many seconds, unless there are too few.
        min_rounds: 6 is the fewest that a 95 % interval of a median can be had from.
        max_rounds: Enough.
        sample_s: The shortest sample.
    """

    budget_s: float = 20.0
    min_rounds: int = 7
    max_rounds: int = 100
    sample_s: float = 0.010


class Run:
    """A case under way: checked when it is made, then timed round by round, then evaluated.

    Attributes:
        out: The result so far.
        tracks: What a round samples, in order; nothing where no rival is right.
    """

    def __init__(self, case: Case, effort: Effort, seed: int = 0) -> None:
        self.case = case
        dtype = str(case.dtype).removeprefix("torch.")
        self.out = CaseResult(case.family, case.suite, case.letters, case.shape, dtype, case.device)
        self.out.goals = dict(case.goals)
        self.tracks: dict[str, Callable[[], float]] = {}
        inputs = case.make_inputs(seed)
        rivals, truth = case.rivals(inputs), case.truth(inputs)
        self.out.rivals = [_gate(case, rival, truth) for rival in rivals]
        del truth
        self._admitted = [(rival, r) for rival, r in zip(rivals, self.out.rivals, strict=True) if not r.note]
        baseline = next((rival for rival, _ in self._admitted if not rival.probe), None)
        if baseline is None:
            return
        self.out.baseline = baseline.name
        timer = clock(case.device)
        self.tracks = {rival.name: _sampler(rival, effort.sample_s, timer) for rival, _ in self._admitted}
        self._work = 0.0
        if case.work is not None:
            self.tracks[FLOOR], self._work = fma_sampler(case.device, case.dtype, timer), case.work(inputs)
        if case.traffic is not None:
            self.tracks[COPY], self.out.traffic_bytes = copy_sampler(case.device, timer), case.traffic(inputs)
        self.tracks[CONTROL] = self.tracks[baseline.name]

    def finish(self, samples: Mapping[str, list[float]]) -> CaseResult:
        """The result of all rounds, and what a call costs besides time."""
        if self.tracks:
            _evaluate(self.out, samples, self._work)
            for rival, result in self._admitted:
                if not rival.probe:
                    _measure(rival, result, self.case.device)
        return self.out


def run_case(case: Case, effort: Effort, seed: int = 0) -> CaseResult:
    """Check, time and measure all rivals of a case."""
    run = Run(case, effort, seed)
    return run.finish(round_robin(run.tracks, effort) if run.tracks else {})


def round_robin(tracks: Tracks, effort: Effort) -> dict[str, list[float]]:
    """Sample the tracks in turn, round after round; every track has one sample a round."""
    samples: dict[str, list[float]] = {name: [] for name in tracks}
    gc.collect()
    start = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - start > effort.budget_s:
            break
        for name, sample in tracks.items():
            samples[name].append(sample())
    return samples


def _gate(case: Case, rival: Rival, truth: Any) -> RivalResult:
    """Run a rival once and compare; its note says why it is not to be timed, if so."""
    out = RivalResult(rival.name, note=rival.missing)
    if rival.missing or rival.probe:
        return out
    try:
        with rival.context():
            out.error = float(case.check((rival.result or rival.call)(), truth))
    except torch.OutOfMemoryError:
        out.note = "does not fit into the memory"
        return out
    except Exception as error:  # a rival that fails must not end the others' run
        out.matches, out.note = False, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return out
    allowed = case.tolerance if rival.tolerance is None else rival.tolerance
    out.matches = out.error <= allowed  # False for NaN
    if not out.matches:
        out.note = f"wrong: error {out.error:.1e}, allowed {allowed:.1e}"
    if not math.isfinite(out.error):
        out.error = None  # JSON has no NaN; the note has said it
    return out


def _sampler(rival: Rival, sample_s: float, timer: Clock) -> Callable[[], float]:
    """A function that takes one sample; how many calls fill it is found out here, once."""

    def run(calls: int) -> float:
        with rival.context():
            if calls > 1:
                rival.call()  # the track before left its own data in the caches; a long call does not care
            timer.start()
            for _ in range(calls):
                rival.call()
            return timer.stop() / calls

    once = min(run(1) for _ in range(2))
    if once < sample_s:
        once = run(max(2, math.ceil(sample_s / 4 / once)))  # the first calls are slower than the rest
    calls = max(1, math.ceil(sample_s / max(once, 1e-9)))

    def sample() -> float:
        gc.disable()  # as timeit does: a collection is not this sample's own cost
        try:
            return run(calls)
        finally:
            gc.enable()

    return sample


def _evaluate(out: CaseResult, samples: Mapping[str, list[float]], work: float) -> None:
    """Turn the samples into medians, speed-ups, shares of the floor, and the verdict on the run itself."""
    base = samples[out.baseline]
    out.rounds = len(base)
    out.control = paired_ratio(base, samples[CONTROL])
    ratio = estimate(base).median / estimate(samples[CONTROL]).median
    spread = max(out.control.high, 1 / out.control.low)
    out.judged = max(ratio, 1 / ratio) <= 1 + CONTROL_TOLERANCE and spread <= 1 + CONTROL_SPREAD
    if FLOOR in samples:
        out.fma_per_s = 1 / estimate(samples[FLOOR]).median
    if COPY in samples:
        out.copy_bytes_per_s = 1 / estimate(samples[COPY]).median
    for rival in out.rivals:
        if rival.note:
            continue
        rival.seconds = estimate(samples[rival.name])
        if rival.matches is None:
            continue
        rival.speedup = paired_ratio(base, samples[rival.name])
        if FLOOR in samples:
            rival.floor_share = paired_ratio([work * s for s in samples[FLOOR]], samples[rival.name])
        if COPY in samples and out.traffic_bytes is not None:
            rival.copy_share = paired_ratio([out.traffic_bytes * s for s in samples[COPY]], samples[rival.name])


def _measure(rival: Rival, out: RivalResult, device: str) -> None:
    """The costs besides time, after the timing: counting operators slows a call down."""
    with rival.context():
        out.peak_bytes = measure.peak_bytes(rival.call, device)
        out.kept_bytes = measure.kept_bytes(rival.call)
        out.ops = measure.count_ops(rival.call)
        work = measure.device_work(rival.call) if device == "cuda" else None
        if work is not None:
            out.kernels, out.launches, out.waits = work
