"""The pointer-generator's Triton kernels in Triton's interpreter, on CPU tensors; test_triton runs this as a child.

See triton_crf_interpret. FASTSEQ_ALL_SAMPLES=1 takes all samples.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastseq.ops.pointer.nll import reference
from fastseq.ops.pointer.nll import triton as backend
from fastseq.testing import TOLERANCES, compare, describe, sample_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
ALL = os.environ.get("FASTSEQ_ALL_SAMPLES") == "1"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "dtype", "every"),
    [
        *(("nll_grad", dtype, every) for dtype, every in ((torch.float32, 2), (torch.float16, 4), (torch.bfloat16, 4))),
        *(("nll", dtype, every) for dtype, every in ((torch.float32, 4), (torch.bfloat16, 8))),
    ],
    ids=str,
)
def test_matches_reference(name: str, dtype: torch.dtype, every: int) -> None:
    samples = [(n, args) for n, args in enumerate(sample_inputs(f"pointer_{name}", dtype=dtype)) if not args[8]]
    for number, args in samples if ALL else samples[::every]:
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        try:
            limit = TOLERANCES[dtype]  # of the products
            compare(getattr(backend, name)(*args), getattr(reference, name)(*args), limit)
            compare(list(args), before, 0.0)
        except AssertionError as error:
            raise AssertionError(f"sample {number}: {describe(args)}\n{error}") from None


def _case(b: int, t: int, s: int, h: int, v: int) -> list[Any]:
    hidden, weight, bias, gate = (torch.randn(shape) for shape in ((b, t, h), (v, h), (v,), (b, t)))
    source = torch.randint(v + 3, (b, s))
    target = torch.where(torch.rand(b, t) < 0.5, source[:, :1], torch.randint(v, (b, t)))
    return [hidden, weight, bias, torch.randn(b, t, s).softmax(-1), gate, source, target, -100, 0.0, 0.0]


def _check(case: list[Any], weights: Tensor | None = None) -> tuple[Tensor, ...]:
    compare(backend.nll(*case), reference.nll(*case))
    got = backend.nll_grad(*case, weights)
    compare(got, reference.nll_grad(*case, weights), 3e-5)
    return got


def test_more_than_one_tile_everywhere() -> None:
    """70 rows, 200 words in 3 parts, 150 positions, and 130 columns: more than a program's share of each."""
    case = _case(2, 35, 150, 130, 200)
    case[0] *= 0.3
    _check(case, torch.rand(2, 35))


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("gate", [-200.0, -60.0, 0.0, 60.0, 200.0])
def test_saturated(scale: float, gate: float) -> None:
    case = _case(1, 4, 5, 4, 20)
    case[0] *= scale
    case[4][:] = gate
    got, wanted = backend.nll_grad(*case, None), reference.nll_grad(*case, None)
    compare(got, wanted, 1e-4 if scale > 1 else 2e-5)  # rounding of logits of a thousand


def test_rows_that_have_no_part_may_hold_anything() -> None:
    """Ignored, of weight 0, out of the vocabulary: their hidden states are not looked at."""
    case, weights = _case(1, 5, 4, 6, 9), torch.ones(1, 5)
    hidden, source, target = case[0], case[5], case[6]
    target[:] = 3
    target[0, 1], weights[0, 2], target[0, 3], source[0, 0] = -100, 0.0, 10, 10
    _check(case, weights)
    hidden[0, 1:4] = NAN
    total, grad_hidden, *rest = _check(case, weights)
    assert bool(total.isfinite())
    assert not bool(grad_hidden[0, 1:4].any())
    assert all(bool(g.isfinite().all()) for g in rest)


def test_impossible_and_forbidden_words() -> None:
    case = _case(1, 3, 4, 6, 9)
    case[2][5] = -INF
    case[5][0] = torch.tensor([1, 2, 10, -1])
    case[6][0] = torch.tensor([5, 11, 10])  # forbidden, nowhere, copied
    values = backend.nll(*case)
    assert values.isinf().tolist() == [[True, True, False]]
    _check(case)


def test_nan_and_wrong_targets_stay_in_their_row() -> None:
    case = _case(2, 2, 3, 4, 7)
    clean = backend.nll_grad(*case, None)
    case[0][0, 1, 0], case[6][1, 0] = NAN, -7
    case[6][0, 1] = 3
    values, got = backend.nll(*case), backend.nll_grad(*case, None)
    assert values.isnan().tolist() == [[False, True], [True, False]]
    assert bool(got[2].isnan().any())
    for spoilt, wanted in zip(got[4:], clean[4:], strict=True):
        torch.testing.assert_close(spoilt[0, 0], wanted[0, 0], rtol=0, atol=0)


def test_launches_and_two_runs_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    run = InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (names.append(self.fn.__name__), run(self, *a, **k))[1]
    )
    case = _case(1, 3, 4, 6, 90)
    first = backend.nll_grad(*case, None)
    assert names == ["scores", "rows", "hidden_gradient", "weight_gradient"]
    compare(backend.nll_grad(*case, None), first, 0.0)
    names.clear()
    backend.nll(*case)
    assert names == ["scores", "rows"]
