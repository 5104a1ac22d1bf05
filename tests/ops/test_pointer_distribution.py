"""The pointer-generator's distribution: the reference against the naive form, second derivatives, hazards, bad ids."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops.pointer import distribution as ops
from fastseq.ops.pointer.distribution import eager, reference
from fastseq.registry import OPS
from fastseq.testing import backend_of

INF = math.inf
NAMES = [b.name for b in OPS["pointer_distribution"].backends if b.device != "cuda" and b.name != "reference"]
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Any:
    """Each backend of the distribution that is for a CPU, forced."""
    reason = backend_of(ops.distribution, request.param).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(request.param):
        yield request.param


def random_case(b: int, t: int, v: int, s: int, oov: int, dtype: torch.dtype = torch.float64) -> Case:
    attention = torch.randn(b, t, s, dtype=dtype).softmax(-1)
    return torch.randn(b, t, v, dtype=dtype), attention, torch.randn(b, t, dtype=dtype), torch.randint(v + oov, (b, s))


def naive(logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, num_oov: int) -> Tensor:
    """As in the paper, in float64."""
    logits, attention, gate = logits.double(), attention.double(), gate.double()
    generated = torch.sigmoid(gate)[..., None] * logits.softmax(-1)
    final = torch.cat([generated, generated.new_zeros(*gate.shape, num_oov)], -1)
    index = source_ids[:, None].expand(attention.shape)
    return final.scatter_add(-1, index, torch.sigmoid(-gate)[..., None] * attention)


@pytest.mark.parametrize("run", [reference, eager])
def test_the_definition_is_the_naive_form(run: Any) -> None:
    for shape in ((2, 3, 7, 5, 2), (1, 2, 4, 6, 0), (2, 1, 1, 3, 1)):
        case, oov = random_case(*shape), shape[-1]
        leaves = [x.requires_grad_() for x in case[:3]]
        wanted = naive(*case, oov)
        torch.testing.assert_close(run.distribution(*case, oov), wanted.detach())
        torch.testing.assert_close(run.distribution(*case, oov).sum(-1), torch.ones(shape[:2], dtype=torch.float64))
        grad = torch.randn_like(wanted)
        grads = torch.autograd.grad(wanted, leaves, grad)
        torch.testing.assert_close(run.distribution_grad(grad, *(x.detach() for x in case), oov), grads)


def test_the_second_derivative_is_the_naive_forms() -> None:
    case = random_case(2, 3, 7, 5, 2)
    leaves = [x.requires_grad_() for x in case[:3]]
    found = []
    for form in (ops.distribution, naive):
        first = torch.autograd.grad((form(*case, 2) ** 3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    torch.testing.assert_close(*found)


def test_reference_topk_is_that_of_the_naive_form() -> None:
    for k in (1, 4, 9):
        _, attention, gate, ids = random_case(2, 3, 9, 6, 3)
        hidden, weight, bias = torch.randn(2, 3, 4).double(), torch.randn(9, 4).double(), torch.randn(9).double()
        wanted = naive(hidden @ weight.T + bias, attention, gate, ids, 3).log().topk(k)
        torch.testing.assert_close(reference.topk(hidden, weight, bias, attention, gate, ids, k), tuple(wanted))


@pytest.mark.parametrize("gate", [60.0, -60.0, 200.0, -200.0, INF, -INF])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_extremes_are_exact(backend: str, gate: float, scale: float) -> None:
    """Saturated gates and confident models, in float32, relative to float64."""
    logits, attention, gates, ids = random_case(2, 3, 50, 20, 4, torch.float32)
    logits, gates = logits * scale, torch.full_like(gates, gate)
    wanted = naive(logits, attention, gates, ids, 4)
    got = ops.distribution(logits, attention, gates, ids, 4)
    likely = wanted > 1e-37  # what float32 holds in full
    torch.testing.assert_close(got[likely].double(), wanted[likely], rtol=3e-5, atol=0)
    torch.testing.assert_close(got[~likely].double(), wanted[~likely], rtol=0, atol=1e-37)


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_the_best_words_where_probabilities_underflow(name: str) -> None:
    reason = backend_of(ops.topk, name).available()
    if reason is not None:
        pytest.skip(reason)
    _, attention, gate, ids = random_case(2, 3, 40, 5, 2, torch.float32)
    hidden, weight = 30 * torch.randn(2, 3, 8), torch.randn(40, 8)
    for size in (-300.0, 300.0):
        args = hidden, weight, None, attention, torch.full_like(gate, size), ids, 40
        with fastseq.use(name):
            values, words = ops.topk(*args)
        wanted, _ = reference.topk(*args)
        assert wanted.min() < -150
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-3)
        assert all(len(set(row.tolist())) == 40 for row in words.flatten(0, 1))


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_the_best_words_of_many_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces as in one: with more rows than a piece has."""
    reason = backend_of(ops.topk, name).available()
    if reason is not None:
        pytest.skip(reason)
    _, attention, gate, ids = random_case(3, 7, 30, 6, 4)
    args = torch.randn(3, 7, 5).double(), torch.randn(30, 5).double(), torch.randn(30).double(), attention, gate, ids
    with fastseq.use(name):
        whole = ops.topk(*args, 6)
        monkeypatch.setattr(eager, "CHUNK", 5 * 30)
        pieces = ops.topk(*args, 6)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(whole, reference.topk(*args, 6))


def test_ids_that_are_too_large(backend: str) -> None:
    case = random_case(2, 3, 7, 5, 2)
    case[3][1, 2] = 9
    grad = torch.randn(2, 3, 9).double()
    if backend == "emulator":  # a GPU kernel does not raise: the rows of that source are NaN
        final, (to_logits, *_) = ops.distribution(*case, 2), ops.distribution_grad(grad, *case, 2)
        assert final.isnan().all((1, 2)).tolist() == to_logits.isnan().all((1, 2)).tolist() == [False, True]
        assert not final[0].isnan().any()
        return
    with pytest.raises(ValueError, match=r"source_ids: got 9, wanted ids below V \+ num_oov = 9"):
        ops.distribution(*case, 2)
    with pytest.raises(ValueError, match="source_ids: got 9"):
        ops.distribution_grad(grad, *case, 2)


def test_training_runs_without_the_naive_form(chosen: list[str]) -> None:
    """A loss on the distribution costs two op calls, whatever the backend."""
    case = random_case(2, 3, 7, 5, 2)
    leaves = [x.requires_grad_() for x in case[:3]]
    final = ops.distribution(*case, 2)
    final.log().sum().backward()
    assert len(chosen) == 2
    wanted = torch.autograd.grad(naive(*case, 2).log().sum(), leaves)
    torch.testing.assert_close(tuple(x.grad for x in leaves), wanted)
