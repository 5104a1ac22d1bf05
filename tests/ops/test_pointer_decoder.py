"""The decoder ops beyond the contract: against a naive loop under autograd, and what the conventions promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops.pointer import decoder as ops
from fastseq.ops.pointer.decoder.samples import decoders
from fastseq.registry import OPS
from fastseq.testing import backend_of

B, T, S, H, E, M, A = 3, 4, 5, 3, 2, 4, 6
BACKENDS = ("reference", "cpu", "eager")
MASK, COVERAGE, W_COVERAGE = 3, 7, 14


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    """Each backend of a CPU in turn, forced; skips what this machine does not have."""
    reason = backend_of(OPS["pointer_decoder"], request.param).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(request.param):
        yield request.param


def naive(args: list[Any]) -> list[Tensor]:
    """The published loop, a step at a time, with torch's own cell."""
    inputs, memory, features, mask, h, c, context, coverage, w_context, w_ih, w_hh, bias, w_q, b_q, w_cov, v = args
    mask = torch.ones(memory.shape[:2], dtype=torch.bool) if mask is None else mask
    steps = []
    for t in range(inputs.shape[1]):
        x = inputs[:, t] + context @ w_context.t()
        h, c = torch.lstm_cell(x, (h, c), w_ih, w_hh, bias, torch.zeros_like(bias))
        query = torch.cat((h, c), 1) @ w_q.t() + b_q
        inside = features + query[:, None] + (0 if w_cov is None else coverage[..., None] * w_cov)
        weights = (torch.tanh(inside) @ v).exp() * mask
        total = weights.sum(1, keepdim=True)
        attention = weights / torch.where(total == 0, 1, total)
        context = (attention[..., None] * memory).sum(1)
        loss = (torch.where(attention <= coverage, attention, coverage) * mask).sum(1)
        coverage = coverage + attention
        steps.append((x, h, c, context, attention, loss))
    *outputs, loss = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    return [*outputs, coverage, loss]


def case(*, mask: bool = True, coverage: bool = True) -> list[Any]:
    """Float64 arguments that require gradients; holes in the mask, and a row with no position on."""
    shapes: list[Any] = [(B, T, E), (B, S, M), (B, S, A), None, (B, H), (B, H), (B, M), (B, S), (E, M)]
    shapes += [(4 * H, E), (4 * H, H), (4 * H,), (A, 2 * H), (A,), (A,), (A,)]
    args = [None if shape is None else torch.randn(shape, dtype=torch.float64) for shape in shapes]
    args[COVERAGE] = torch.rand(B, S, dtype=torch.float64)
    args[W_COVERAGE] = args[W_COVERAGE] if coverage else None
    args = [a if a is None else a.requires_grad_() for a in args]
    args[MASK] = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool() if mask else None
    return args


def floats(args: list[Any]) -> list[Tensor]:
    return [a for a in args if a is not None and a.requires_grad]


@pytest.mark.parametrize("coverage", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_values_and_all_gradients_are_those_of_the_loop(backend: str, mask: bool, coverage: bool) -> None:
    args = case(mask=mask, coverage=coverage)
    got, want = ops.decoder(*args), naive(args)
    torch.testing.assert_close(list(got), want)
    weights = [torch.randn_like(w) for w in want]
    for used in (range(7), (0,), (4, 6), (5,), (1, 3)):  # the gradients of the other outputs are absent
        grads = [
            torch.autograd.grad(
                [out[i] for i in used], floats(args), [weights[i] for i in used], allow_unused=True, retain_graph=True
            )
            for out in (got, want)
        ]
        for leaf, *pair in zip(floats(args), *grads, strict=True):
            torch.testing.assert_close(*(torch.zeros_like(leaf) if g is None else g for g in pair))


def test_only_what_is_wanted_gets_a_gradient() -> None:
    args = [a if a is None else a.detach() for a in case(coverage=False)]
    args[0].requires_grad_()
    loss = sum(out.square().sum() for out in ops.decoder(*args))
    assert torch.autograd.grad(loss, args[0])[0].shape == (B, T, E)
    args = case(coverage=False)
    gradient = torch.autograd.grad(ops.decoder(*args)[0].sum(), args[9])[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(naive(args)[0].sum(), args[9])[0])


def test_second_derivatives_are_those_of_the_loop() -> None:
    args = case()
    found = []
    for outputs in (ops.decoder(*args), naive(args)):
        loss = sum(out.square().sum() for out in outputs)
        first = torch.autograd.grad(loss, floats(args), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), floats(args)))
    torch.testing.assert_close(*found)


def test_compiled_second_derivatives_are_an_error_not_a_zero() -> None:
    args = case()

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: ops.decoder(x, *args[1:])[0].square().sum())(x).sum()

    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.func.grad(slope)(args[0].detach())


def test_a_beam_shares_its_source(backend: str) -> None:
    beam = 3
    args = [a if a is None else a.detach() for a in case()]
    wide = [a if a is None else a.repeat_interleave(beam, 0) if i < 8 else a for i, a in enumerate(args)]
    for i in (0, 4, 5, 6, 7):
        wide[i] = wide[i] + torch.rand_like(wide[i])
    shared = [*wide[:1], *args[1:4], *wide[4:]]
    torch.testing.assert_close(ops.decoder(*shared), ops.decoder(*wide))
    shared[0].requires_grad_()
    with pytest.raises(ValueError, match="memory"):
        ops.decoder(*shared)[0].sum().backward()


def test_what_is_off_is_not_read(backend: str) -> None:
    args = case()
    off = ~args[MASK]
    hidden = [args[i].detach().masked_fill(off[..., None], math.nan).requires_grad_() for i in (1, 2)]
    dirty = [args[0], *hidden, *args[3:]]
    torch.testing.assert_close(ops.decoder(*dirty), ops.decoder(*args))
    grads = [
        torch.autograd.grad(ops.decoder(*a)[3].square().sum(), floats(a), allow_unused=True) for a in (dirty, args)
    ]
    torch.testing.assert_close(*grads)
    assert not grads[0][1][off].any()


def test_nan_stays_in_its_row(backend: str) -> None:
    clean = case(mask=False)
    dirty = [a if a is None else a.detach().clone().requires_grad_() for a in clean]
    with torch.no_grad():
        dirty[1][1] = math.nan
    outputs = [ops.decoder(*args) for args in (dirty, clean)]
    others = torch.tensor([0, 2])
    torch.testing.assert_close([o[others] for o in outputs[0]], [o[others] for o in outputs[1]])
    assert outputs[0][3][1].isnan().all()
    grads = [torch.autograd.grad(out[3].sum(), floats(args)) for out, args in zip(outputs, (dirty, clean), strict=True)]
    for i in range(7):  # inputs, memory, features and the four parts of the state
        torch.testing.assert_close(grads[0][i][others], grads[1][i][others])
    assert grads[0][10].isnan().any()


def test_a_tie_of_the_coverage_loss_is_the_attentions(backend: str) -> None:
    args = case(mask=False, coverage=False)
    with torch.no_grad():
        args[COVERAGE].copy_(ops.decoder(*args)[4][:, 0])  # cov = a at the first step
    one = [args[0][:, :1], *args[1:]]
    loss = ops.decoder(*one)[6].sum()
    torch.testing.assert_close(loss.detach(), torch.tensor(float(B), dtype=torch.float64))
    assert torch.autograd.grad(loss, args[COVERAGE])[0].abs().max() == 0


def test_the_samples_are_held_to_the_loop() -> None:
    """The reference too is only as right as this: on every finite sample with a source for each row."""
    count = 0
    for args in decoders("cpu", torch.float64, 0):
        empty = 0 in args[0].shape[:2] or len(args[0]) != len(args[1])
        if empty or any(a is not None and a.isnan().any() for a in args) or args[15].abs().max() > 20:
            continue
        with fastseq.use("reference"):
            torch.testing.assert_close(list(ops.decoder(*args)), naive(list(args)))
        count += 1
    assert count >= 15


def test_nothing_of_every_step_and_position_is_kept() -> None:
    args = [a.detach() if isinstance(a, Tensor) else a for a in case()]
    args[0].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = ops.decoder(*args)
    own = {x.data_ptr() for x in itertools.chain(args, outputs) if x is not None}
    assert {x.data_ptr() for x in kept} <= own
