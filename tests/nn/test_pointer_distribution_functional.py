"""`fastseq.functional.pointer_generator_distribution` and `_topk`: dtypes, autocast, compilation, every complaint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional as F

B, T, V, S, H, OOV = 2, 3, 11, 5, 4, 2


@pytest.fixture
def copying() -> tuple[Tensor, Tensor, Tensor]:
    """Attention, gate, source_ids."""
    return torch.randn(B, T, S).softmax(-1), torch.randn(B, T), torch.randint(V + OOV, (B, S))


def test_the_formula_of_the_docstring(copying: Any) -> None:
    attention, gate, ids = copying
    logits = torch.randn(B, T, V)
    p = torch.sigmoid(gate)[..., None]
    final = torch.cat([p * logits.softmax(-1), p.new_zeros(B, T, OOV)], -1)
    final = final.scatter_add(-1, ids[:, None].expand(attention.shape), (1 - p) * attention)
    got = F.pointer_generator_distribution(logits, attention, gate, ids, OOV)
    torch.testing.assert_close(got, final)
    torch.testing.assert_close(F.pointer_generator_distribution(logits, attention, gate, ids.int(), OOV), got)
    weight, bias, hidden = torch.randn(V, H), torch.randn(V), torch.randn(B, T, H)
    final = F.pointer_generator_distribution(torch.nn.functional.linear(hidden, weight, bias), *copying, OOV)
    torch.testing.assert_close(F.pointer_generator_topk(hidden, weight, bias, *copying, 4), tuple(final.log().topk(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(copying: Any, dtype: torch.dtype) -> None:
    logits, (attention, gate, ids) = torch.randn(B, T, V).to(dtype).requires_grad_(), copying
    for other in (torch.float32, torch.float64, torch.bfloat16):
        final = F.pointer_generator_distribution(logits, attention.to(other), gate, ids, OOV)
        assert final.dtype == (torch.float64 if torch.float64 in (dtype, other) else torch.float32)
        (grad,) = torch.autograd.grad((final**2).sum(), logits)
        assert grad.dtype == dtype
    hidden, weight = torch.randn(B, T, H).to(dtype), torch.randn(V, H)
    values, words = F.pointer_generator_topk(hidden, weight, None, *copying, 3)
    assert (values.dtype, words.dtype) == (final.dtype if dtype == torch.float64 else torch.float32, torch.int64)
    wide = F.pointer_generator_topk(hidden.double(), weight.double(), None, *copying, 3)
    torch.testing.assert_close(values.double(), wide[0], rtol=1e-5, atol=1e-5)  # nothing was rounded to half
    assert words.equal(wide[1])
    halves = F.pointer_generator_topk(hidden.bfloat16(), weight.bfloat16(), None, *copying, 3)[0]
    torch.testing.assert_close(halves.double(), wide[0], rtol=0.05, atol=0.05)


def test_compiled_whole_and_autocast(copying: Any) -> None:
    logits, hidden, weight = torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, H), torch.randn(V, H)

    def both(logits: Tensor) -> tuple[Tensor, ...]:
        words = F.pointer_generator_topk(hidden, weight, None, *copying, 3)
        return F.pointer_generator_distribution(logits, *copying, OOV), *words

    plain = both(logits)
    for got in (torch.compile(both, fullgraph=True, backend="aot_eager")(logits), _autocast(both, logits)):
        torch.testing.assert_close(got, plain)
        (grad,) = torch.autograd.grad(got[0].square().sum(), logits)
        torch.testing.assert_close(grad, torch.autograd.grad(plain[0].square().sum(), logits, retain_graph=True)[0])


def _autocast(both: Any, logits: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return both(logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(T, V)}, ValueError, r"logits: got shape \(3, 11\), wanted \(B, T, V\)"),
        ({"logits": torch.randn(B, T, 0)}, ValueError, "with V > 0"),
        ({"logits": torch.ones(B, T, V).long()}, TypeError, "logits: got int64, wanted float64 or"),
        ({"logits": None}, TypeError, "logits: got NoneType, wanted a tensor"),
        ({"attention": torch.randn(B, S)}, ValueError, r"attention: got shape \(2, 5\), wanted \(B, T, S\)"),
        ({"gate": torch.randn(B, T, 1)}, ValueError, r"gate: got shape \(2, 3, 1\), wanted \(B, T\)"),
        (
            {"gate": torch.randn(B, T, device="meta")},
            ValueError,
            "gate: got a tensor on meta, wanted cpu, where logits is",
        ),
        ({"source_ids": torch.randn(B, S)}, TypeError, "source_ids: got float32, wanted int64"),
        ({"source_ids": torch.ones(B, S + 1).long()}, ValueError, r"source_ids: got shape \(2, 6\), wanted \(B, S\)"),
        ({"source_ids": torch.full((B, S), V + OOV)}, ValueError, "source_ids: got 13, wanted ids below"),
        ({"num_oov": -1}, ValueError, "num_oov: got -1, wanted at least 0"),
        ({"num_oov": torch.tensor(2)}, TypeError, "num_oov: got Tensor, wanted an int"),
    ],
)
def test_complaints(copying: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("attention", "gate", "source_ids")
    good: dict[str, Any] = {"logits": torch.randn(B, T, V), **dict(zip(names, copying, strict=True)), "num_oov": OOV}
    with pytest.raises(error, match=message):
        F.pointer_generator_distribution(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: got 0, wanted at least 1"),
        ({"k": V + 1}, ValueError, "k: got 12, wanted 1 to V = 11"),
        ({"k": 2.0}, TypeError, "k: got float, wanted an int"),
        ({"hidden": torch.randn(B, H)}, ValueError, r"hidden: got shape \(2, 4\), wanted \(B, T, H\)"),
        ({"weight": torch.randn(V, H + 1)}, ValueError, r"weight: got shape \(11, 5\), wanted \(V, H\)"),
        ({"weight": torch.randn(V)}, ValueError, r"weight: got shape \(11,\), wanted \(V, H\)"),
        ({"bias": torch.randn(V + 1)}, ValueError, r"bias: got shape \(12,\), wanted \(V,\)"),
    ],
)
def test_complaints_about_the_best_words(
    copying: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ("attention", "gate", "source_ids")
    good: dict[str, Any] = {"hidden": torch.randn(B, T, H), "weight": torch.randn(V, H), "bias": torch.randn(V), "k": 3}
    with pytest.raises(error, match=message):
        F.pointer_generator_topk(**{**good, **dict(zip(names, copying, strict=True)), **change})
