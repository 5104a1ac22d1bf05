"""The pointer-generator's loss: the reference against the whole distribution, and every backend on what is hard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.ops.pointer import nll as ops
from fastseq.ops.pointer.nll import reference
from fastseq.testing import backend_of, compare, to_device

INF, NAN = math.inf, math.nan
B, T, S, H, V, OOV = 3, 5, 7, 4, 9, 2
HIDDEN, WEIGHT, BIAS, COPY, GATE, SOURCE, TARGET = range(7)


@pytest.fixture(
    params=[
        pytest.param(b.name, marks=[pytest.mark.gpu] * (b.device == "cuda"))
        for b in ops.nll_grad.backends
        if b.name != "reference"
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced; what it is for."""
    chosen = backend_of(ops.nll_grad, request.param)
    reason = chosen.available()
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with fastseq.use(request.param):
        yield chosen.device or "cpu"


def case(dtype: torch.dtype = torch.float32, *, copynet: bool = False, scale: float = 1.0, v: int = V) -> list[Any]:
    """Seven arguments: duplicates in the source, out-of-vocabulary words, holes; every target has p > 0."""
    result = torch.float64 if dtype == torch.float64 else torch.float32
    source, target = torch.randint(v + OOV, (B, S)), torch.randint(v, (B, T))
    source[:, 1], source[:, 2], source[1, 4] = source[:, 0], v + 1, -1
    target[:, 0], target[:, 1], target[0, 3] = source[:, 0], v + 1, -100
    scores = torch.randn(B, T, S, dtype=result)
    hidden, weight = (torch.randn(B, T, H) * scale).to(dtype), torch.randn(v, H).to(dtype)
    bias, gate = torch.randn(v, dtype=result), torch.randn(B, T, dtype=result)
    return [hidden, weight, bias, scores if copynet else scores.softmax(2), None if copynet else gate, source, target]


def by_enumeration(args: list[Any], label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """(B,T) values from the whole extended distribution: softmax, scatter, log."""
    hidden, weight, bias, copy, gate, source, target = args
    z, v = hidden @ weight.T + (0 if bias is None else bias), len(weight)
    exists = (source >= 0)[:, None]
    if gate is None:
        joint = torch.cat([z, copy.masked_fill(~exists, -INF)], 2).softmax(2)
        words, copied = joint[..., :v], joint[..., v:]
    else:
        p = gate.sigmoid()[..., None]
        words, copied = p * z.softmax(2), (1 - p) * copy.where(exists, 0)
    extended = torch.cat([words, words.new_zeros(*target.shape, OOV)], 2)
    final = extended.scatter_add(2, source.clamp(min=0)[:, None].expand(copied.shape), copied)
    nll = -final.gather(2, target.clamp(min=0)[..., None])[..., 0].log()
    smooth = -final[..., :v].log().mean(2)
    values = (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * z.logsumexp(2) ** 2
    return values.masked_fill(target == -100, 0)


def truth(args: list[Any], *numbers: Any, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """The reference in float64."""
    doubled = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in (*args, weights)]
    return reference.nll_grad(*doubled[:7], *numbers, doubled[7])


def on(device: str, args: list[Any], numbers: Any) -> tuple[Any, ...]:
    """The arguments on the device; skips where the forced backend lacks what `numbers` ask for."""
    there: tuple[Any, ...] = to_device(args, device)
    try:
        ops.nll_grad.choose(*there, *numbers, None)
    except fastseq.registry.BackendError as error:
        pytest.skip(str(error))
    return there


def holds(args: list[Any], device: str, numbers: Any = (-100, 0.0, 0.0), *, tolerance: float = 2e-5) -> None:
    """Values, total and gradients are the float64 truth, relative to the largest gradient of each argument."""
    there = on(device, args, numbers)
    total, *grads = to_device(ops.nll_grad(*there, *numbers, None), "cpu")
    wanted_total, *wanted = truth(args, *numbers)
    torch.testing.assert_close(total.double(), wanted_total, rtol=tolerance, atol=tolerance)
    values = ops.nll(*there, *numbers).cpu()
    torch.testing.assert_close(values.double().sum(), wanted_total, rtol=tolerance, atol=tolerance)
    for g, w in zip(grads, wanted, strict=True):
        largest = float(w.abs().nan_to_num(posinf=0).max()) if w.numel() else 0.0
        torch.testing.assert_close(g.double(), w.to(g.dtype).double(), rtol=tolerance, atol=tolerance * max(largest, 1))


@pytest.mark.parametrize("numbers", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.3, 0.01)])
@pytest.mark.parametrize("copynet", [False, True])
def test_reference_is_the_whole_distribution(copynet: bool, numbers: tuple[float, float]) -> None:
    """Values by enumeration, and gradients by autograd through it."""
    if copynet and numbers != (0.0, 0.0):
        with pytest.raises(ValueError, match="label_smoothing, z_loss"):
            reference.nll(*case(copynet=True), -100, *numbers)
        return
    for with_bias in (True, False):
        args = case(torch.float64, copynet=copynet)
        args[BIAS] = args[BIAS] if with_bias else None
        leaves = [a.requires_grad_() for a in args if a is not None and a.is_floating_point()]
        weights = torch.randn(B, T, dtype=torch.float64)
        wanted = by_enumeration(args, *numbers)
        torch.testing.assert_close(reference.nll(*args, -100, *numbers), wanted.detach())
        total, *grads = reference.nll_grad(*args, -100, *numbers, weights)
        torch.testing.assert_close(total, (wanted * weights).sum().detach())
        by_autograd = torch.autograd.grad((wanted * weights).sum(), leaves)
        compare([g for g in grads if g.numel()], list(by_autograd), 1e-9)


@pytest.mark.parametrize("copynet", [False, True])
@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_confident_models(device: str, scale: float, copynet: bool) -> None:
    """The usual 1e-12 in the logarithm is wrong by any factor here, and its gradient is 0."""
    args = case(scale=scale, copynet=copynet)
    if scale > 100:
        args[TARGET][:, 1::2] = args[SOURCE][:, :1]  # what is copied of the target keeps p(y) a float32
    holds(args, device, tolerance=2e-4 if scale > 100 else 2e-5)


@pytest.mark.parametrize("gate", [60.0, -60.0, 200.0, -200.0])
@pytest.mark.parametrize("numbers", [(-100, 0.0, 0.0), (-100, 0.1, 0.01)])
def test_saturated_gate(device: str, gate: float, numbers: Any) -> None:
    args = case()
    args[GATE][:] = gate
    if abs(gate) > 100:  # a word that the gate leaves no way to but e^-200
        args[TARGET][:] = args[SOURCE][:, :1] if gate < 0 else 3
    holds(args, device, numbers)


def test_gradient_where_nothing_is_copied_of_a_word_that_is_there(device: str) -> None:
    """-(1-r)/c is 0/0 here; the gradient is not."""
    args = case()
    args[COPY][args[SOURCE][:, None].expand(B, T, S) == args[TARGET][:, :, None]] = 0
    args[TARGET][:, 1] = 4
    holds(args, device)
    args[SOURCE][:, 3], args[TARGET][:, 2], args[COPY][:, 2, 3] = 2, 2, 0
    grads = ops.nll_grad(*to_device(args, device), -100, 0.0, 0.0, None)
    assert bool((grads[4][:, 2, 3] < 0).all())


@pytest.mark.parametrize("copynet", [False, True])
def test_forbidden_and_impossible_words(device: str, copynet: bool) -> None:
    """A word of bias -inf can be copied; where it cannot, and where an unknown word is nowhere, p is 0."""
    args = case(copynet=copynet)
    args[BIAS][2:4] = -INF
    args[SOURCE][:, 0], args[SOURCE][:, 1:] = 2, 5
    args[TARGET] = torch.tensor([[2, 3, V, 5, 0]] * B)
    values = ops.nll(*to_device(args, device), -100, 0.0, 0.0).cpu()
    assert values.isposinf().tolist() == [[False, True, True, False, False]] * B
    total, *grads = to_device(ops.nll_grad(*to_device(args, device), -100, 0.0, 0.0, None), "cpu")
    args[TARGET][:, 1:3] = -100
    _, *wanted = truth(args, -100, 0.0, 0.0)
    assert float(total) == INF
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("place", [HIDDEN, GATE, COPY])
def test_a_bad_row_spoils_no_other(device: str, place: int) -> None:
    args = case()
    args[TARGET][1, 2], args[SOURCE][1, 0] = 3, 3
    wanted = to_device(ops.nll_grad(*on(device, args, (-100, 0.1, 0.01)), -100, 0.1, 0.01, None), "cpu")
    clean = ops.nll(*to_device(args, device), -100, 0.1, 0.01).cpu()
    args[place][1, 2] = NAN
    values = ops.nll(*to_device(args, device), -100, 0.1, 0.01).cpu()
    got = to_device(ops.nll_grad(*to_device(args, device), -100, 0.1, 0.01, None), "cpu")
    spoilt = torch.zeros(B, T, dtype=torch.bool)
    spoilt[1, 2] = True
    assert bool(values[spoilt].isnan().all())
    torch.testing.assert_close(values[~spoilt], clean[~spoilt])
    assert bool(got[1][spoilt].isnan().all())
    assert bool(got[2].isnan().all())
    for g, w in zip((got[1], got[4], got[5]), (wanted[1], wanted[4], wanted[5]), strict=True):
        torch.testing.assert_close(g[~spoilt], w[~spoilt])
    args[TARGET][1, 2] = -100  # and it spoils nothing if it is ignored
    compare(to_device(ops.nll_grad(*to_device(args, device), -100, 0.1, 0.01, None), "cpu")[0], values[~spoilt].sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master", [False, True])
def test_half_types(device: str, dtype: torch.dtype, master: bool) -> None:
    """Within the rounding of the products; with a float32 master weight, its gradient is float32."""
    args = case(dtype)
    rounded = [a.double() if a is not None and a.dtype == dtype else a for a in args]
    args[WEIGHT] = args[WEIGHT].float() if master else args[WEIGHT]
    total, *grads = to_device(ops.nll_grad(*to_device(args, device), -100, 0.0, 0.0, None), "cpu")
    wanted_total, *wanted = truth(rounded, -100, 0.0, 0.0)
    limit = 2e-3 if dtype == torch.float16 else 2e-2
    assert (grads[0].dtype, grads[1].dtype) == (dtype, torch.float32 if master else dtype)
    torch.testing.assert_close(total.double(), wanted_total, rtol=limit, atol=limit)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=limit, atol=limit)


@pytest.mark.parametrize("numbers", [(-100, 0.0, 0.0), (-100, 0.1, 0.01)])
def test_many_chunks(device: str, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a chunk of logits has, and not a multiple."""
    monkeypatch.setattr(ops.eager, "CHUNK_BYTES", 4 * 4 * V)
    monkeypatch.setattr(ops.eager, "CHUNK_ROWS", 4)
    holds(case(), device, numbers)


def test_nothing_as_large_as_the_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at a time nor for backward; and rows that need no vocabulary have no row in a product."""
    b, t, v = 4, 40, 2000
    monkeypatch.setattr(ops.eager, "CHUNK_BYTES", 16 * 4 * v)
    monkeypatch.setattr(ops.eager, "CHUNK_ROWS", 16)
    leaves = [torch.randn(b, t, 2), torch.randn(v, 2), torch.randn(v), torch.rand(b, t, 3), torch.randn(b, t)]
    source, target = torch.randint(v, (b, 3)), torch.randint(v, (b, t))
    target[:2], target[2], source[:] = -100, v + 1, v + 1
    largest, rows, kept = 0, 0, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest, rows
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            if func is torch.ops.aten.addmm.default and out.shape[1] == v:
                rows += out.shape[0]
            return out

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with Watch():
        ops.eager.nll_grad(*leaves, source, target, -100, 0.0, 0.0, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ops.loss(*(x.requires_grad_() for x in leaves), source, target, -100, 0.0, 0.0, None)
    assert rows == t  # of the four sentences, two are ignored and one is out of the vocabulary
    assert largest < b * t * v / 4
    assert kept < 4 * v * 3


def test_gradients_are_handed_over(device: str) -> None:
    """The gradient arrives without a copy if what comes is 1; then again, scaled, from the same graph."""
    args = [a.requires_grad_() if a.is_floating_point() else a for a in to_device(case(), device)]
    leaves = args[:5]
    loss = ops.loss(*args, -100, 0.0, 0.0, None)
    wanted = ops.nll_grad.run(*(a.detach() for a in args), -100, 0.0, 0.0, None)[1:]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    compare(list(first), list(wanted), 0.0)
    first[0].zero_()  # the caller's now
    again = torch.autograd.grad(loss * 0.5, leaves)
    compare(list(again), [0.5 * w for w in wanted], 1e-6)


@pytest.mark.parametrize("copynet", [False, True])
def test_second_derivative_where_p_is_zero(copynet: bool) -> None:
    """Rows without a gradient have no second derivative either, and spoil no other."""
    args = case(torch.float64, copynet=copynet)
    args[BIAS][2:4] = -INF
    args[SOURCE][:, 0], args[TARGET][:, 0], args[TARGET][0, 1], args[TARGET][1, 1] = 5, 5, V + 99, 2
    args[HIDDEN][0, 3] = NAN  # ignored
    args = [a.requires_grad_() if a is not None and a.is_floating_point() else a for a in args]
    leaves = [a for a in args[:5] if a is not None]

    def second(arguments: list[Any]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(ops.nll(*arguments, -100, 0.0, 0.0).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g[~g.isnan()] ** 2).sum() for g in first), leaves)

    got = second(args)
    with torch.no_grad():
        dead = ops.nll(*args, -100, 0.0, 0.0) == INF
    assert int(dead.sum()) >= 2
    args[TARGET] = args[TARGET].masked_fill(dead, -100)
    compare(list(got), list(second(args)), 1e-12)
    assert all(bool(g.isfinite().all()) for g in got)


def test_errors() -> None:
    args = case()
    args[TARGET][1, 1] = -7
    for backend in ("eager", "reference", "cpu"):
        if backend_of(ops.nll, backend).available() is None:
            with fastseq.use(backend), pytest.raises(ValueError, match=r"target_ids: got the id -7"):
                ops.nll(*args, -100, 0.0, 0.0)
            with fastseq.use(backend), pytest.raises(ValueError, match="label_smoothing"):
                ops.nll(*case(copynet=True), -100, 0.1, 0.0)
