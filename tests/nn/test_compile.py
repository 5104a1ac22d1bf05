"""torch.compile without a graph break, and torch.export with dynamic sizes, of the loss and of Viterbi."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastseq.nn import CRF, tag_constraints

K = 3


def make(batch_first: bool) -> CRF:
    transitions, start, end = tag_constraints(["O", "B", "I"])
    return CRF(K, batch_first, allowed_transitions=transitions, allowed_start=start, allowed_end=end)


def batch(b: int, t: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (
        torch.randn(b, t, K),
        torch.randint(2, (b, t)),
        torch.arange(t) < torch.randint(1, t + 1, (b, 1)),
    )
    return tensors if batch_first else tuple(x.transpose(0, 1).contiguous() for x in tensors)  # type: ignore


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean", "none"])
def test_fullgraph_loss(reduction: str) -> None:
    crf = make(batch_first=True)
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager", dynamic=True)
    for b, t in ((2, 5), (4, 7)):
        x, tags, mask = batch(b, t, True)
        x.requires_grad_()
        leaves = [x, *crf.parameters()]
        got, want = compiled(x, tags, mask, reduction), crf(x, tags, mask, reduction)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


@pytest.mark.parametrize("batch_first", [False, True])
def test_fullgraph_viterbi(batch_first: bool) -> None:
    crf = make(batch_first)
    x, _, mask = batch(3, 6, batch_first)
    got = torch.compile(crf.viterbi, fullgraph=True, backend="aot_eager")(x, mask)
    torch.testing.assert_close(got, crf.viterbi(x, mask))


@pytest.mark.parametrize("batch_first", [False, True])
def test_export(batch_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.crf = make(batch_first)

        def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            losses = (self.crf(x, tags, mask, r) for r in ("sum", "mean", "token_mean", "none"))
            return *losses, *self.crf.viterbi(x, mask)

    model = Model()
    rows, steps = torch.export.Dim("rows", max=64), torch.export.Dim("steps", max=64)
    sizes = {0: rows, 1: steps} if batch_first else {0: steps, 1: rows}
    exported = torch.export.export(model, batch(3, 5, batch_first), dynamic_shapes=(sizes,) * 3).module()
    other = batch(6, 9, batch_first)
    torch.testing.assert_close(exported(*other), model(*other))
