"""The Triton kernels of the CRF in Triton's interpreter, on CPU tensors; test_triton runs this file as a child.

The interpreter is switched on for a whole process, before triton is imported, and takes 10 us an operation: so samples
are small, and a part of them. FASTSEQ_ALL_SAMPLES=1 takes all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastseq.ops import crf
from fastseq.ops.crf import reference, triton_rows
from fastseq.ops.crf import triton as backend
from fastseq.testing import compare, describe, sample_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
ALL = os.environ.get("FASTSEQ_ALL_SAMPLES") == "1"
INF = float("inf")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    names: list[str] = []
    run = InterpretedFunction.run

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return names


@triton.jit
def _to_float(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, triton_rows.as_float(tl.load(x + at)))


@triton.jit
def _from_float(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, triton_rows.from_float(tl.load(x + at), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = torch.empty(2**16)
    _to_float[(1,)](backend._bits(every), out, 2**16)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)
    numbers = torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32).view(torch.float32)
    numbers[: 2**15] = torch.randn(2**15)
    numbers[:8] = torch.tensor([0.0, -0.0, INF, -INF, float("nan"), 3.4e38, 1.00390625, 1.01171875])  # two are ties
    half = torch.empty(2**16, dtype=dtype)
    _from_float[(1,)](numbers, backend._bits(half), 2**16)
    torch.testing.assert_close(half, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


def _some(op: Any, dtype: torch.dtype, every: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Every so many of the samples of at most 40 positions, each with its number, another part for each dtype."""
    small = [(n, args) for n, args in enumerate(sample_inputs(op, dtype=dtype)) if args[0].shape[:2].numel() <= 40]
    yield from small if ALL else small[len(str(dtype)) % every :: every]


@pytest.mark.parametrize(
    ("name", "dtype", "every"),
    [
        *(("nll_grad", dtype, every) for dtype, every in ((torch.float32, 4), (torch.float16, 9), (torch.bfloat16, 9))),
        *(("nll", torch.float32, 8), ("nll", torch.float64, 12), ("nll_grad", torch.float64, 9)),
        *(("viterbi", torch.float32, 3), ("viterbi", torch.float64, 6), ("viterbi", torch.bfloat16, 6)),
    ],
)
def test_matches_reference(name: str, dtype: torch.dtype, every: int) -> None:
    for number, args in _some(getattr(crf, name), dtype, every):
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        try:
            compare(getattr(backend, name)(*args), getattr(reference, name)(*args))
            compare(list(args), before, 0.0)
        except AssertionError as error:
            raise AssertionError(f"sample {number}: {describe(args)}\n{error}") from None


def _case(b: int, t: int, k: int) -> list[Any]:
    x, a, s, e = (torch.randn(shape) for shape in ((b, t, k), (k, k), (k,), (k,)))
    return [x, torch.randint(k, (b, t)), None, a, s, e]


def _check(case: list[Any], *, only: slice = slice(None)) -> None:
    compare(backend.nll(*case)[only], reference.nll(*case)[only])
    compare(backend.nll_grad(*case, None, 1.0), reference.nll_grad(*case, None, 1.0), 3e-5)


@pytest.mark.parametrize("nats", [80.0, 400.0, 1e4])
@pytest.mark.parametrize("where", ["end", "middle", "start", "edge"])
def test_the_lost_path(nats: float, where: str) -> None:
    """Tag 1 falls behind tag 0, which then dies, or (start) was never alive: there it is beta that loses the path."""
    case = _case(1, 14, 3)
    x, tags, _, a, s, e = case
    a[0, 1:], a[1:, 0] = -INF, -INF
    x[0, 3:11, 0] += nats / 8
    {"end": e, "middle": x[0, 12], "start": s, "edge": a[0]}[where][0] = -INF
    tags[:] = torch.tensor([1, 2]).repeat(7)
    _check(case)


def test_the_lost_path_beside_another() -> None:
    """Tag 1 falls 200 nats behind tag 0, which then has to go on as tag 2 and loses 250: only `lost` tells."""
    case = _case(1, 15, 3)
    x, tags, _, a, s, e = case
    for v in (a, s, e):
        v[:] = 0
    a[0, 1], a[1, 0], a[1, 2], a[2, :2] = -INF, -INF, -INF, -INF
    s[2] = -INF
    x[0, :10] = torch.tensor([20.0, 0.0, -40.0])
    x[0, 10:] = torch.tensor([-INF, 0.0, -50.0])
    tags[:] = 1
    _check(case)


@pytest.mark.parametrize("where", ["edge", "emission"])
def test_a_pruned_factor_that_matters(where: str) -> None:
    """The way 0 1 1 has a factor of -100, which is left out; 0 2 1 has two of -60: only the gap tells."""
    case = _case(1, 3, 4)
    x, tags, _, a, s, e = case
    a[:], x[:], s[:], e[:] = -INF, -INF, 0.0, 0.0
    a[1, 1], a[3, 3], a[2, 1], x[0, 0, 0], x[0, 2, 1] = 0.0, 0.0, -60.0, 0.0, 0.0
    if where == "edge":
        a[0, 1:3], x[0, 1, 1:3] = torch.tensor([-100.0, -60.0]), 0.0
    else:
        a[0, 1:3], x[0, 1, 1:] = 0.0, torch.tensor([-100.0, -60.0, 0.0])
    tags[:] = torch.tensor([0, 1, 1])
    assert float(backend.nll(*case)) < 1e-3
    _check(case)


@pytest.mark.parametrize("low", [-61.9, -62.1, -100.0, -1e4, -INF])
def test_low_transitions(low: float) -> None:
    """Those that are pruned matter where nothing else is possible; those just not pruned must not underflow."""
    case = _case(1, 7, 4)
    case[3][0, 1:], case[3][3, 3], case[4][2], case[5][1] = low, low, low, low
    case[0][0, 2, 1:] = low
    case[1][:] = torch.tensor([0, 0, 0, 0, 0, 0, 0])
    _check(case)


def test_padding_beside_a_wide_row() -> None:
    """K of 100 is padded to 128 with what must not count; 3 blocks of positions, holes across their borders."""
    case = _case(1, 37, 100)
    case[2] = torch.rand(1, 37) < 0.8
    compare(backend.nll_grad(*case, None, 1.0), crf.eager.nll_grad(*case, None, 1.0), 2e-5)


def test_nan_and_wrong_tags_stay_in_their_row() -> None:
    case = _case(4, 5, 3)
    clean, (_, gradient, *_) = backend.nll(*case), backend.nll_grad(*case, None, 1.0)
    case[0][1, 2, 0] = float("nan")
    case[1][2, 3] = 2**40
    values, (total, spoilt, *parameters) = backend.nll(*case), backend.nll_grad(*case, None, 1.0)
    assert values.isnan().tolist() == [False, True, True, False]
    assert all(bool(v.isnan().all()) for v in (total, spoilt[1:3], *parameters))
    for got, wanted in ((values, clean), (spoilt, gradient)):
        torch.testing.assert_close(got[::3], wanted[::3], rtol=0, atol=0)
    weights = torch.tensor([1.0, 0.0, 0.0, 2.0])
    left = [v[::3] if i < 2 else v for i, v in enumerate(case)]
    got, wanted = backend.nll_grad(*case, weights, 0.1), reference.nll_grad(*left, weights[::3], 0.1)
    compare((got[0], got[1][::3], *got[2:]), wanted)
    assert not bool(got[1][1:3].any())


def test_viterbi_ties_go_to_the_first() -> None:
    x, a, s, e = (torch.randint(-1, 2, shape).float() for shape in ((3, 9, 5), (5, 5), (5,), (5,)))
    compare(backend.viterbi(x, None, a, s, e), reference.viterbi(x, None, a, s, e), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_launches(launches: list[str], dtype: torch.dtype) -> None:
    x, tags, mask, a, s, e = (v if v is None or not v.is_floating_point() else v.to(dtype) for v in _case(2, 3, 3))
    runs: list[tuple[Callable[[], Any], list[str], list[str]]] = [
        (lambda: backend.nll(x, tags, mask, a, s, e), ["sweep"], ["exact"]),
        (
            lambda: backend.nll_grad(x, tags, mask, a, s, e, None, 1.0),
            ["sweep", "posterior"],
            ["exact", "reduce"],
        ),
        (lambda: backend.viterbi(x, mask, a, s, e), [], ["viterbi"]),
    ]
    for run, scaled, exact in runs:
        launches.clear()
        run()
        assert launches == (scaled if dtype == torch.float32 else []) + exact


def test_two_runs_are_bitwise_equal() -> None:
    case = _case(2, 20, 3)
    compare(backend.nll_grad(*case, None, 1.0), backend.nll_grad(*case, None, 1.0), 0.0)
