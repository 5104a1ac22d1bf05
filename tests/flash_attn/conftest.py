"""Attention by its formula, in the upcast or in the low precision that flash_attn's test rule compares with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

INF = math.inf


def by_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    kept: Tensor | None = None,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """(B,Sq,Hq,D) out and (B,Hq,Sq) lse, in float64, or in the inputs' dtype with the scale on k, as its test does."""
    work = torch.float64 if upcast else q.dtype
    q, k, v = (x.to(work) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scale = q.shape[3] ** -0.5
    scores = torch.einsum("bihd,bjhd->bhij", q * scale if upcast else q, k if upcast else k * scale)
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    rows, keys = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    distance = rows[:, None] + len(keys) - len(rows) - keys
    if slopes is not None:
        scores = scores - (slopes.view(-1, q.shape[2], 1, 1) * distance.abs()).to(work)
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance > left) if left >= 0 else hidden
    hidden |= (-distance > right) if right >= 0 else hidden
    scores = scores.masked_fill(hidden, -INF)
    nothing = hidden.all(1)
    p = scores.masked_fill(nothing[:, None], 0).softmax(-1).masked_fill(hidden, 0)
    out = torch.einsum("bhij,bjhd->bihd", p if kept is None else p * kept.to(work), v)
    return out, scores.double().logsumexp(-1).masked_fill(nothing, INF)


@pytest.fixture
def formula() -> Callable[..., tuple[Tensor, Tensor]]:
    return by_formula


@pytest.fixture
def rule() -> Callable[..., None]:
    """flash_attn's own test rule: the error is at most twice that of torch in low precision."""

    def hold(name: str, got: Tensor, wanted: Tensor, rough: Tensor, atol: float = 1e-5) -> None:
        assert got.shape == wanted.shape
        if not got.numel():
            return
        error = (got.double() - wanted).abs().max()
        limit = 2 * (rough.double() - wanted).abs().max() + atol
        assert error <= limit, f"{name}: error {float(error):.3g}, of torch {float((limit - atol) / 2):.3g}"

    return hold


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    def make(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        return torch.randn(shape).to(device, dtype).requires_grad_()

    return make
