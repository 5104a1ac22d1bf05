"""The runner: it refuses wrong results, interleaves, and knows when a run cannot be judged."""

import itertools
import math
import random
from typing import Any

import pytest
import torch

from fastseq_benchmarks import measure, runner
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
