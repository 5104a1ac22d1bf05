"""Dropout of 16 bits an element: its probability, its scale, its gradient, its seed."""

from __future__ import annotations

import pytest
import torch

from fastseq.integrations.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_is_dropped_and_what_is_kept(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 333, dtype=dtype, requires_grad=True)
    residual = torch.full((301, 333), 2.0, requires_grad=True)
    out = dropout(x, p, residual)
    kept = out.detach() > 2.5
    count = x.numel()
    assert abs(float((~kept).sum()) - p * count) < 5 * (p * (1 - p) * count) ** 0.5
    both = float((~kept[:, 1:] & ~kept[:, :-1]).double().mean())  # neighbours are independent
    assert abs(both - p * p) < 0.01
    torch.testing.assert_close(out.detach()[kept], torch.full_like(out[kept], 2 + 1 / (1 - p)), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.detach()[~kept], torch.full_like(out[~kept], 2.0))
    out.sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(x.grad, (kept / (1 - p)).to(dtype), atol=rounding, rtol=0)
    assert bool((residual.grad == 1).all())


def test_seed_and_edges() -> None:
    x = torch.randn(7, 5)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 0.0, x), 2 * x)
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))
    assert dropout(x[:0], 0.5).shape == (0, 5)
