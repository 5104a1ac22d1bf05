"""The runner: it refuses wrong results, interleaves, and knows when a run cannot be judged."""

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastseq_benchmarks import floor, measure, runner
from fastseq_benchmarks.clock import DeviceClock, HostClock, clock
from fastseq_benchmarks.runner import Case, Effort, Rival, round_robin, run_case
from fastseq_benchmarks.stats import estimate, paired_ratio

THREE_ROUNDS = Effort(budget_s=0.0, min_rounds=3, sample_s=0.0)


def case(*rivals: Rival, **changes: Any) -> Case:
    """A case whose right answer is 1.0."""
    fields: dict[str, Any] = {
        "family": "toy",
        "suite": "one",
        "letters": "N",
        "shape": "1",
        "make_inputs": lambda seed: seed,
        "rivals": lambda inputs: list(rivals),
        "truth": lambda inputs: 1.0,
        "check": lambda result, truth: abs(result - truth),
        "tolerance": 1e-6,
    }
    return Case(**fields | changes)


def test_a_wrong_result_is_refused_and_never_timed() -> None:
    calls = []

    def wrong() -> float:
        calls.append(1)
        return 1.5

    out = run_case(case(Rival("right", lambda: 1.0), Rival("wrong", wrong)), THREE_ROUNDS)
    right, refused = out.rivals
    assert right.matches
    assert right.seconds is not None
    assert refused.matches is False
    assert refused.seconds is None
    assert refused.note == "wrong: error 5.0e-01, allowed 1.0e-06"
    assert len(calls) == 1
    assert out.wrong == [refused]


@pytest.mark.parametrize("result", [math.nan, math.inf])
def test_an_error_that_is_no_number_is_refused(result: float) -> None:
    (rival,) = run_case(case(Rival("bad", lambda: result)), THREE_ROUNDS).rivals
    assert rival.matches is False
    assert rival.error is None


def test_a_rival_that_raises_is_refused_and_the_next_is_the_baseline() -> None:
    def fails() -> float:
        raise ValueError("no such thing\nand more")

    out = run_case(case(Rival("fails", fails), Rival("right", lambda: 1.0)), THREE_ROUNDS)
    assert out.rivals[0].note == "failed: ValueError: no such thing"
    assert out.baseline == "right"


def test_a_rival_that_needs_too_much_memory_is_not_wrong() -> None:
    def fails() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    out = run_case(case(Rival("large", fails), Rival("right", lambda: 1.0)), THREE_ROUNDS)
    assert out.rivals[0].note == "does not fit into the memory"
    assert not out.wrong
    assert out.baseline == "right"


def test_a_missing_rival_is_listed_and_left_out() -> None:
    missing = Rival("peer", lambda: 0.0, missing="not installed: pip install it")
    out = run_case(case(missing, Rival("right", lambda: 1.0)), THREE_ROUNDS)
    assert out.rivals[0].note.startswith("not installed")
    assert out.baseline == "right"
    assert not out.wrong


def test_a_rival_may_have_a_tolerance_of_its_own() -> None:
    out = run_case(case(Rival("rough", lambda: 1.05, tolerance=0.1)), THREE_ROUNDS)
    assert out.rivals[0].matches


def test_nothing_right_is_nothing_timed() -> None:
    out = run_case(case(Rival("wrong", lambda: 2.0)), THREE_ROUNDS)
    assert not out.baseline
    assert not out.judged


def test_rounds_are_interleaved() -> None:
    order: list[str] = []

    def track(name: str) -> Any:
        return lambda: order.append(name) or 1.0

    samples = round_robin({name: track(name) for name in ("A", "B", "C", "A'")}, THREE_ROUNDS)
    assert order == ["A", "B", "C", "A'"] * 3
    assert all(len(s) == 3 for s in samples.values())


def test_the_baseline_runs_twice_a_round_and_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def spy(tracks: Any, effort: Effort) -> Any:
        seen.append(list(tracks))
        assert tracks[runner.CONTROL] is tracks["A"]
        return round_robin(tracks, effort)

    monkeypatch.setattr(runner, "round_robin", spy)
    rivals = (Rival("A", lambda: 1.0), Rival("B", lambda: 1.0), Rival("P", lambda: None, probe=True))
    run_case(case(*rivals, work=lambda inputs: 1.0), THREE_ROUNDS)
    assert seen == [["A", "B", "P", runner.FLOOR, runner.CONTROL]]


def verdict(monkeypatch: pytest.MonkeyPatch, control: float) -> bool:
    def samples(tracks: Any, effort: Effort) -> dict[str, list[float]]:
        return {name: [control if name == runner.CONTROL else 1.0] * 8 for name in tracks}

    monkeypatch.setattr(runner, "round_robin", samples)
    return run_case(case(Rival("A", lambda: 1.0)), THREE_ROUNDS).judged


@pytest.mark.parametrize(("control", "judged"), [(1.0, True), (1.09, True), (0.92, True), (1.2, False), (0.8, False)])
def test_a_control_that_disagrees_means_not_judged(
    monkeypatch: pytest.MonkeyPatch, control: float, judged: bool
) -> None:
    assert verdict(monkeypatch, control) is judged


def test_two_entries_with_one_median_but_a_wild_ratio_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(tracks: Any, effort: Effort) -> dict[str, list[float]]:
        spread = {"A": [1.0, 3.0] * 4, runner.CONTROL: [3.0, 1.0] * 4}
        return {name: spread[name] for name in tracks}

    monkeypatch.setattr(runner, "round_robin", samples)
    assert not run_case(case(Rival("A", lambda: 1.0)), THREE_ROUNDS).judged


def test_speedups_are_paired_by_round() -> None:
    slow_spell = [1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 1.0]
    ratio = paired_ratio([2 * s for s in slow_spell], slow_spell)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    for n in (6, 9, 20, 51):
        intervals = [estimate([draw.expovariate(1.0) for _ in range(n)]) for _ in range(2000)]
        held = sum(e.low <= math.log(2) <= e.high for e in intervals) / len(intervals)
        assert 0.94 <= held <= 0.99


def test_few_samples_give_the_whole_range() -> None:
    assert estimate([3.0, 1.0, 2.0]).low == 1.0
    assert estimate([3.0, 1.0, 2.0]).high == 3.0
    with pytest.raises(ValueError, match="samples"):
        estimate([])


def test_ops_and_kept_bytes_of_a_known_graph() -> None:
    x = torch.ones(1000, requires_grad=True)

    def step() -> None:
        x.grad = None
        x.exp().sum().backward()

    assert measure.kept_bytes(step) == 4000  # exp keeps its result
    assert 4 <= measure.count_ops(step) <= 7  # exp, sum, ones_like, expand, mul, and what autograd adds


def test_peak_bytes_sees_a_temporary() -> None:
    peak = measure.peak_bytes(lambda: torch.ones(16 * 2**20, dtype=torch.uint8))
    assert peak is None or 14 * 2**20 < peak < 40 * 2**20


def test_a_short_call_is_repeated_until_the_sample_is_long_enough() -> None:
    count = itertools.count()
    run_case(case(Rival("A", lambda: next(count) * 0 + 1.0)), Effort(0.0, min_rounds=1, sample_s=0.002))
    assert next(count) > 100


# ---- a GPU, as far as it goes without one ----------------------------------------------------------------------------


class FakeGpu:
    """What DeviceClock uses of torch.cuda, with a host's and a device's time, in seconds, that only calls move."""

    def __init__(self) -> None:
        self.host = 0.0
        self.idle_at = 0.0  # when the device has done all that it was given

    def launch(self, seconds: float, *, host: float = 0.0) -> None:
        self.host += host
        self.idle_at = max(self.idle_at, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.idle_at)

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802  (torch's name)
        assert enable_timing
        event = SimpleNamespace(at=math.nan)

        def record() -> None:
            event.at = max(self.host, self.idle_at)

        def elapsed_time(end: Any) -> float:
            assert self.host >= end.at, "the event is not there yet: torch raises"
            return 1e3 * (end.at - event.at)

        event.record, event.elapsed_time = record, elapsed_time
        return event


def test_a_devices_work_is_timed_to_its_end_and_nothing_before_it() -> None:
    gpu = FakeGpu()
    timer = DeviceClock(gpu)
    gpu.launch(100.0)  # another's, still running
    timer.start()
    for _ in range(3):
        gpu.launch(2.0, host=0.5)
    assert gpu.host < gpu.idle_at  # the calls came back long before
    assert timer.stop() == pytest.approx(0.5 + 3 * 2.0)
    timer.start()
    for _ in range(3):
        gpu.launch(0.1, host=2.0)  # the host is too slow to keep the device busy
    assert timer.stop() == pytest.approx(3 * 2.0 + 0.1)


def test_a_case_on_a_gpu_is_timed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(runner, "clock", lambda device: DeviceClock(gpu) if device == "cuda" else HostClock())
    monkeypatch.setattr(runner, "copy_sampler", lambda device, timer: lambda: 1e-9)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 0)
    monkeypatch.setattr(measure, "device_work", lambda call: (3, 2, 1))

    def call(seconds: float) -> Any:
        return lambda: gpu.launch(seconds) or 1.0

    slow, fast = Rival("slow", call(2.0)), Rival("fast", call(0.5))
    out = run_case(case(slow, fast, device="cuda", traffic=lambda inputs: 2.5e8), THREE_ROUNDS)
    assert [r.seconds.median for r in out.rivals if r.seconds] == [2.0, 0.5]
    assert out.judged
    second = out.rivals[1]
    assert second.speedup is not None
    assert second.speedup.median == 4.0
    assert (second.kernels, second.launches, second.waits) == (3, 2, 1)
    assert out.copy_bytes_per_s == pytest.approx(1e9)
    assert second.copy_share is not None
    assert second.copy_share.median == pytest.approx(0.5)  # 0.25 s to copy the bytes, 0.5 s for the call


def test_the_clock_of_a_cpu_is_the_hosts() -> None:
    assert isinstance(clock("cpu"), HostClock)
    timer = clock("cpu")
    timer.start()
    assert 0 <= timer.stop() < 1


def test_a_copy_counts_a_byte_read_and_a_byte_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steady(HostClock):
        def stop(self) -> float:
            return 1.0

    monkeypatch.setattr(floor, "COPY_BYTES", 1000)
    assert floor.copy_sampler("cpu", Steady())() == pytest.approx(1 / 2000)


def test_events_of_a_profile_are_counted() -> None:
    host, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    on_the_host = ("aten::mul", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemsetAsync", "cudaStreamSynchronize")
    events = [SimpleNamespace(name=name, device_type=host) for name in (*on_the_host, "cudaDeviceSynchronize")]
    assert measure.count_events(events) is None
    on_the_gpu = ("void fastseq::crf::sweep", "triton_sweep", "Memset (Device)")
    events += [SimpleNamespace(name=name, device_type=gpu) for name in on_the_gpu]
    assert measure.count_events(events) == (3, 3, 1)
