"""Length buckets: the compiled module and its Python twin agree bit for bit, and plans are as claimed."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseq import _host_python, host

needs_module = pytest.mark.skipif(host._implementation is _host_python, reason="the compiled module is not built")
LENGTHS = st.lists(st.integers(0, 30), max_size=60)
WINDOWS = st.sampled_from([None, 1, 2, 100])
SEEDS = st.integers(0, 2**64 - 1)
LIMITS = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 9), "drop_last": st.booleans()}),
    st.fixed_dictionaries({"max_tokens": st.integers(30, 99)}),
    st.fixed_dictionaries({"batch_size": st.integers(1, 9), "max_tokens": st.integers(30, 99)}),
)


@needs_module
@settings(max_examples=300, deadline=None)
@given(LENGTHS, LIMITS, SEEDS, WINDOWS)
def test_both_implementations_agree(lengths: list[int], limits: dict[str, Any], seed: int, window: int | None) -> None:
    compiled = host.bucket_batches(lengths, seed=seed, window=window, **limits)
    with mock.patch.object(host, "_implementation", _host_python):
        python = host.bucket_batches(lengths, seed=seed, window=window, **limits)
    assert [b.tolist() for b in compiled] == [b.tolist() for b in python]
    assert {b.dtype for b in [*compiled, *python]} <= {np.dtype(np.int64)}


@settings(max_examples=200, deadline=None)
@given(LENGTHS, LIMITS, SEEDS, WINDOWS)
def test_every_index_once_within_the_limits(
    lengths: list[int], limits: dict[str, Any], seed: int, window: int | None
) -> None:
    batches = host.bucket_batches(lengths, seed=seed, window=window, **limits)
    indices = [i for batch in batches for i in batch.tolist()]
    assert len(set(indices)) == len(indices)
    if limits.get("drop_last"):
        assert all(len(batch) == limits["batch_size"] for batch in batches)
        assert len(indices) == len(lengths) - len(lengths) % limits["batch_size"]
    else:
        assert sorted(indices) == list(range(len(lengths)))
    for batch in batches:
        assert 0 < len(batch) <= limits.get("batch_size", len(batch))
        assert len(batch) * max(lengths[i] for i in batch) <= limits.get("max_tokens", 10**9)


@pytest.mark.parametrize("lengths", [[1, 1, 10], [1, 10, 10], [4, 9, 2, 9, 9, 1, 5], [3, 3, 3, 8, 1]])
def test_one_window_pads_least(lengths: list[int]) -> None:
    """Against all ways to split the sequences into full batches and one that is not."""
    size = 3 if len(lengths) > 5 else 2

    def cost(batches: list[list[int]]) -> int:
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    def splits(order: tuple[int, ...], start: int) -> list[list[int]]:
        cuts = sorted({0, *range(start, len(order), size), len(order)})
        return [list(order[i:j]) for i, j in itertools.pairwise(cuts)]

    rest = len(lengths) % size
    starts = [
        rest or size,
        size,
    ]  # the batch that is not full comes first or last; permutations do the others
    least = min(cost(splits(p, s)) for p in itertools.permutations(range(len(lengths))) for s in starts)
    plan = host.bucket_batches(lengths, size, 3, window=None)
    assert cost([b.tolist() for b in plan]) == least


def test_less_padding_than_at_random() -> None:
    lengths = np.random.default_rng(0).geometric(0.05, 5000)
    at_random = np.array_split(np.random.default_rng(1).permutation(5000), 5000 // 32)
    waste = [host.padding_waste(lengths, host.bucket_batches(lengths, 32, 0, window=w)) for w in (None, 100, 10, 1)]
    assert waste == sorted(waste)
    assert waste[1] < 0.05 < 0.6 < host.padding_waste(lengths, at_random)


def test_seeds() -> None:
    lengths = np.arange(1000) % 37
    plans = [[b.tolist() for b in host.bucket_batches(lengths, 16, seed)] for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_a_plan_of_today_is_one_of_tomorrow() -> None:
    """A resumed run must find the plan that it left."""
    plan = host.bucket_batches([5, 3, 8, 1, 9, 2, 7], 3, 42)
    assert [b.tolist() for b in plan] == [[0], [6, 2, 4], [3, 5, 1]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lengths": [[1, 2]], "batch_size": 2}, ValueError, r"lengths: got shape \(1, 2\), wanted \(N,\)"),
        ({"lengths": [1.5], "batch_size": 2}, TypeError, "lengths: got dtype float64, wanted integers"),
        ({"lengths": [-1], "batch_size": 2}, ValueError, "lengths: got -1, wanted at least 0"),
        ({"lengths": [1]}, ValueError, "batch_size: got None"),
        ({"lengths": [1], "batch_size": 0}, ValueError, "batch_size: got 0, wanted 1 to"),
        ({"lengths": [1], "batch_size": 2.0}, TypeError, "batch_size: got float, wanted an integer"),
        ({"lengths": [1], "batch_size": True}, TypeError, "batch_size: got bool"),
        ({"lengths": [1], "batch_size": 1, "seed": -1}, ValueError, "seed: got -1"),
        ({"lengths": [1], "batch_size": 1, "window": 0}, ValueError, "window: got 0"),
        ({"lengths": [9], "max_tokens": 8}, ValueError, "max_tokens: got 8, wanted at least the longest"),
        ({"lengths": [9], "max_tokens": 9, "drop_last": True}, ValueError, "drop_last: needs a batch_size"),
        ({"lengths": [9], "batch_size": 1, "drop_last": np.ones(2)}, TypeError, "drop_last: got ndarray, wanted True"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        host.bucket_batches(**arguments)


def test_a_device_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="device: got 'tpu', wanted 'cpu' or 'cuda'"):
        host.multiplies_bf16("tpu")


def test_no_sequences() -> None:
    assert host.bucket_batches([], 3, 0) == []
    assert host.padding_waste([], []) == 0.0


@needs_module
def test_cpu_features_agree() -> None:
    import platform
    import sys

    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert host._implementation.cpu_features() == _host_python.cpu_features()
    assert host.cpu_features()["isa"] in ("baseline", "avx2", "avx512")


def test_keeps_memory() -> None:
    import platform

    taken = host.keep_memory()
    assert taken == (platform.libc_ver()[0] == "glibc")
    if not taken:
        return
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 23)  # 64 MiB, and given back
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(5)) < 8  # of at least 32, where pages are huge
    assert host.keep_memory(False)
    assert min(faults() for _ in range(5)) >= 32
