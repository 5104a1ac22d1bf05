"""Attention's Triton kernels in Triton's interpreter, on CPU tensors; test_triton runs this as a child.

See triton_crf_interpret. FASTSEQ_ALL_SAMPLES=1 takes some eight times as many; the rest wait for a GPU. Tiles are as
small as can be, so that small inputs have several.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastseq.ops.attention import disentangled, dot_product, triton_call
from fastseq.ops.attention.disentangled import triton as positions
from fastseq.ops.attention.dot_product import triton as backend
from fastseq.registry import OPS
from fastseq.testing import TOLERANCES, backend_of, compare, describe, sample_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
ALL = os.environ.get("FASTSEQ_ALL_SAMPLES") == "1"
NAN, INF = float("nan"), float("inf")
HOSTS = {
    "attention": backend.attention,
    "attention_grad": backend.attention_grad,
    "disentangled_attention": positions.disentangled_attention,
    "disentangled_attention_grad": positions.disentangled_attention_grad,
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = triton_call.options

    def small(kernel: str, *args: Any) -> dict[str, int]:
        sizes = usual(kernel, *args)
        return sizes if kernel == "delta" else sizes | {"BM": 32 if kernel == "query_gradient" else 16, "BN": 16}

    monkeypatch.setattr(triton_call, "options", small)


@pytest.mark.parametrize(
    ("name", "dtype", "every"),
    [
        ("attention", torch.float32, 11),
        ("attention", torch.bfloat16, 29),
        ("attention_grad", torch.float32, 17),
        ("attention_grad", torch.float16, 80),
        ("attention_grad", torch.bfloat16, 80),
        ("disentangled_attention", torch.float32, 17),
        ("disentangled_attention_grad", torch.float32, 19),
        ("disentangled_attention_grad", torch.bfloat16, 80),
    ],
    ids=str,
)
def test_matches_reference(name: str, dtype: torch.dtype, every: int) -> None:
    reference = backend_of(OPS[name], "reference")
    for number, args in list(enumerate(sample_inputs(name, dtype=dtype)))[:: max(1, every // 8) if ALL else every]:
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        try:
            compare(HOSTS[name](*args), reference.run(*args), TOLERANCES[dtype])
            compare(list(args), before, 0.0)
        except AssertionError as error:
            raise AssertionError(f"sample {number}: {describe(args)}\n{error}") from None


def _case(**options: Any) -> list[Any]:
    """Causal, two tiles of queries and three of keys; `options` by the argument's name."""
    q, k, v = torch.randn(1, 20, 2, 8), torch.randn(1, 40, 1, 8), torch.randn(1, 40, 1, 8)
    case = dict.fromkeys(("bias", "slopes", "cu_q", "cu_k", "lengths", "seed"))
    case = {"q": q, "k": k, "v": v, **case, "max_q": 20, "max_k": 40, "scale": 0.3, "causal": True}
    return list((case | {"left": -1, "right": -1, "softcap": 0.0, "dropout": 0.0} | options).values())


def _check(case: list[Any]) -> tuple[Tensor, ...]:
    """Values and gradients are eager's; and the gradients."""
    out, lse = backend.attention(*case)
    compare((out, lse), dot_product.eager.attention(*case), 2e-5)
    args = torch.randn_like(out), torch.randn_like(lse), out, lse, *case, True
    got = backend.attention_grad(*args)
    compare(got, dot_product.eager.attention_grad(*args), 3e-5)
    return out, lse, *got


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"left": 9, "right": 4, "causal": False},
        {"left": 18, "softcap": 2.0},
        {"bias": torch.linspace(-1, 1, 1600).view(1, 2, 20, 40), "lengths": torch.tensor([33], dtype=torch.int32)},
        {"bias": torch.linspace(-1, 1, 40).view(1, 1, 1, 40), "slopes": torch.tensor([0.1, 0.3])},
        {"seed": torch.tensor([-(2**40) - 77]), "dropout": 0.3},
    ],
    ids=lambda options: "-".join(options),
)
def test_more_than_one_tile_everywhere(options: dict[str, Any]) -> None:
    _check(_case(**options))


def test_hidden_numbers_that_are_not_finite_take_no_part() -> None:
    """In tiles that some queries see and others do not: query i sees keys 0 .. i + 20."""
    for poison in (NAN, INF):
        case = _case()
        case[2][0, 33, 0, 5] = poison
        out = backend.attention(*case)[0]
        assert bool(out[0, :13].isfinite().all())
        assert bool(out[0, 13:, :, 5].isnan().all() if poison != poison else (~out[0, 13:, :, 5].isfinite()).all())
        assert int((~out.isfinite()).sum()) == 7 * 2
        case = _case()
        case[0][0, 4, 1, 2] = poison
        out, lse = backend.attention(*case)
        assert bool((lse[0, 1].isnan() == (torch.arange(20) == 4)).all())
        assert bool(lse[0, 0].isfinite().all())
        dq, dk, dv, _ = backend.attention_grad(torch.ones_like(out), None, out, lse, *case, False)
        assert bool(dk[0, :25].isnan().all())
        assert bool(dv[0, :25].isnan().all())
        assert all(bool(x[0, 25:].isfinite().all()) for x in (dk, dv))
        assert int(dq.isnan().sum()) == 8


def test_launches_and_two_runs_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    run = InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (names.append(self.fn.__name__), run(self, *a, **k))[1]
    )
    case = _case(bias=torch.randn(1, 1, 1, 40))
    out, lse = backend.attention(*case)
    assert names == ["forward"]
    args = torch.ones_like(out), None, out, lse, *case, True
    first = backend.attention_grad(*args)
    assert names[1:] == ["delta", "key_gradient", "query_gradient", "bias_gradient"]
    compare(backend.attention_grad(*args), first, 0.0)


def test_runs_of_slots_that_span_tiles_and_jump() -> None:
    """Slots that are one for all distances, rise by one, or skip some."""
    q, k, v = (torch.randn(1, 40, 1, 8) for _ in range(3))
    distances = torch.arange(-40, 41)
    for slots in (distances * 0, distances.clamp(-5, 5) + 5, distances // 7 * 2 + 12):
        tables = torch.randn(26, 1, 8), torch.randn(26, 1, 8)
        case = q, k, v, *tables, slots.int(), None, torch.tensor([37], dtype=torch.int32), None, 40, 0.2, 0.0
        out, lse = positions.disentangled_attention(*case)
        compare((out, lse), disentangled.eager.attend(*case), 2e-5)
        args = torch.randn_like(out), torch.randn_like(lse), out, lse, *case
        compare(positions.disentangled_attention_grad(*args), disentangled.eager.attend_grad(*args), 3e-5)
