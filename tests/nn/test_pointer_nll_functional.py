"""`fastseq.functional.pointer_generator_nll` and `copynet_nll`: reductions, dtypes, compilers, and every complaint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq.functional import copynet_nll, pointer_generator_nll

B, T, S, H, V, OOV = 3, 4, 5, 6, 8, 2


@pytest.fixture
def args() -> list[Any]:
    """hidden, weight, bias, attention, gate, source_ids, target_ids; two targets do not count."""
    source, target = torch.randint(V + OOV, (B, S)), torch.randint(V, (B, T))
    source[:, 0], target[:, 0], target[0, 3], target[2, 1] = V + 1, V + 1, -100, -100
    floats = torch.randn(B, T, H), torch.randn(V, H), torch.randn(V), torch.randn(B, T, S).softmax(2), torch.randn(B, T)
    return [*(x.requires_grad_() for x in floats), source, target]


def as_documented(args: list[Any], **options: Any) -> Tensor:
    """The lines of torch in the docstring of pointer_generator_nll."""
    hidden, weight, bias, attention, gate, source, target = args
    p = torch.sigmoid(gate)[..., None]
    final = torch.cat([p * F.linear(hidden, weight, bias).softmax(-1), p.new_zeros(B, T, OOV)], -1)
    final = final.scatter_add(-1, source[:, None].expand(attention.shape), (1 - p) * attention)
    return F.nll_loss(final.log().flatten(0, 1), target.flatten(), **options)


def copynet_as_documented(args: list[Any], **options: Any) -> Tensor:
    hidden, weight, bias, scores, source, target = args
    joint = torch.cat([F.linear(hidden, weight, bias), scores], -1).softmax(-1)
    final = torch.cat([joint[..., :V], joint.new_zeros(B, T, OOV)], -1)
    final = final.scatter_add(-1, source[:, None].expand(scores.shape), joint[..., V:])
    return F.nll_loss(final.log().flatten(0, 1), target.flatten(), **options)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("form", ["pointer", "copynet"])
def test_is_the_documented_torch(args: list[Any], form: str, reduction: str) -> None:
    function: Any = pointer_generator_nll if form == "pointer" else copynet_nll
    plain: Any = as_documented if form == "pointer" else copynet_as_documented
    args = args if form == "pointer" else [*args[:4], *args[5:]]
    leaves = [a for a in args if a.is_floating_point()]
    got, wanted = function(*args, reduction=reduction), plain(args, reduction=reduction)
    torch.testing.assert_close(got, wanted.view(got.shape))
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), rtol=2e-5, atol=2e-6
    )
    with torch.no_grad():
        torch.testing.assert_close(function(*args, reduction=reduction), got)


def test_mean_of_nothing_is_zero(args: list[Any]) -> None:
    args[6].fill_(7)
    loss = pointer_generator_nll(*args, ignore_index=7)
    assert float(loss.detach()) == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, args[:5]))
    with torch.no_grad():
        assert float(pointer_generator_nll(*args, ignore_index=7)) == 0


def test_smoothing_of_a_gate_that_only_generates_is_that_of_cross_entropy(args: list[Any]) -> None:
    with torch.no_grad():
        hidden, weight, bias, attention, gate, source, target = args
        target = target.where(target < V, 0)
        z = F.linear(hidden, weight, bias)
        wanted = F.cross_entropy(z.flatten(0, 1), target.flatten(), label_smoothing=0.2)
        gate = torch.full_like(gate, 60.0)
        got = pointer_generator_nll(hidden, weight, bias, attention, gate, source, target, label_smoothing=0.2)
        torch.testing.assert_close(got, wanted)
        extra = pointer_generator_nll(
            hidden, weight, bias, attention, gate, source, target, label_smoothing=0.2, z_loss=0.1
        )
        torch.testing.assert_close(extra - got, 0.1 * (z.logsumexp(2) ** 2)[target >= 0].mean())


@pytest.mark.parametrize("ids", [torch.int32, torch.int16, torch.int8])
def test_ids_of_any_integers(args: list[Any], ids: torch.dtype) -> None:
    wanted = pointer_generator_nll(*args)
    torch.testing.assert_close(pointer_generator_nll(*args[:5], args[5].to(ids), args[6].to(ids)), wanted)


def test_dtypes(args: list[Any]) -> None:
    """Any float64 makes all float64; a float32 weight stays so beside half hidden states."""
    floats, ids = args[:5], args[5:]
    for i in range(5):
        mixed = [x.double() if i == j else x for j, x in enumerate(floats)]
        assert pointer_generator_nll(*mixed, *ids).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        loss = pointer_generator_nll(*(x.to(dtype) if i != 1 else x for i, x in enumerate(floats)), *ids)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, pointer_generator_nll(*args), rtol=0.03, atol=0.03)
        assert [g.dtype for g in torch.autograd.grad(loss, floats)] == [torch.float32] * 5


def test_autocast(args: list[Any]) -> None:
    """Under autocast the products are bfloat16; the weight's gradient is not."""
    with torch.autocast("cpu", torch.bfloat16):
        got = pointer_generator_nll(*args)
    rounded = pointer_generator_nll(args[0].bfloat16(), *args[1:])
    assert got.dtype == torch.float32
    assert torch.equal(got, rounded)
    assert not torch.equal(got, pointer_generator_nll(*args))
    for g, w in zip(torch.autograd.grad(got, args[:5]), torch.autograd.grad(rounded, args[:5]), strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, w)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fullgraph(args: list[Any], reduction: str) -> None:
    def loss(*inputs: Any) -> Tensor:
        return pointer_generator_nll(*inputs, label_smoothing=0.1, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 2):
        some = [
            a[:rows].detach().requires_grad_(a.is_floating_point()) if i not in (1, 2) else a
            for i, a in enumerate(args)
        ]
        got, wanted = compiled(*some), loss(*some)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.autograd.grad(got, some[:5]), torch.autograd.grad(wanted, some[:5]))


def test_second_derivative(args: list[Any]) -> None:
    doubles = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    for reduction in ("mean", "none"):
        assert torch.autograd.gradgradcheck(
            lambda *x, r=reduction: pointer_generator_nll(*x, *doubles[5:], reduction=r), doubles[:5], fast_mode=True
        )


def test_a_training_step_is_one_op(args: list[Any], chosen: list[str]) -> None:
    with fastseq.use("eager"):
        pointer_generator_nll(*args).backward()
    assert chosen == ["eager"]


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.zeros(B, H), ValueError, r"hidden: got shape \(3, 6\), wanted \(B, T, H\)"),
        (0, torch.zeros(B, T, H).long(), TypeError, "hidden: got int64"),
        (0, [1.0], TypeError, "hidden: got list, wanted a tensor"),
        (1, torch.zeros(V, H + 1), ValueError, r"weight: got shape \(8, 7\), wanted \(V, H\) = \(8, 6\)"),
        (1, torch.zeros(0, H), ValueError, "V at least 1"),
        (2, torch.zeros(V + 1), ValueError, r"bias: got shape \(9,\), wanted \(V,\) = \(8,\)"),
        (3, torch.zeros(B, S), ValueError, r"attention: got shape \(3, 5\)"),
        (
            3,
            torch.zeros(B, T, S, device="meta"),
            ValueError,
            "attention: got a tensor on meta, wanted cpu",
        ),
        (4, torch.zeros(B, T, 1), ValueError, r"gate: got shape \(3, 4, 1\), wanted \(B, T\)"),
        (4, None, TypeError, "gate: got NoneType"),
        (5, torch.zeros(B, S + 1).long(), ValueError, r"source_ids: got shape \(3, 6\)"),
        (6, torch.zeros(B, T), TypeError, "target_ids: got float32"),
        (6, torch.full((B, T), -3), ValueError, "target_ids: got the id -3"),
    ],
)
def test_complaints(args: list[Any], place: int, value: Any, error: Any, message: str) -> None:
    args[place] = value
    with pytest.raises(error, match=message):
        pointer_generator_nll(*args)


def test_complaints_about_options(args: list[Any]) -> None:
    with pytest.raises(ValueError, match="reduction: got 'token_mean', wanted one of none, sum, mean"):
        pointer_generator_nll(*args, reduction="token_mean")
    for options in ({"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pointer_generator_nll(*args, **options)
    with pytest.raises(ValueError, match="copy_scores: got shape"):
        copynet_nll(*args[:3], args[3][:, :1], *args[5:])
