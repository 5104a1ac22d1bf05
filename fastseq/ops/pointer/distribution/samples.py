"""Argument tuples for the contract tests: ordinary, awkward, hostile; small enough for loops.

A generator is `(device, dtype, seed) -> iterator of argument tuples`; `dtype` is that of logits or hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["heads_and_k", "rows", "rows_and_grad"]

Arguments = tuple[Any, ...]
Case = list[Any]
INF = math.inf

# (B, T, V, S, num_oov): around vector widths and the pieces that kernels work in; nothing of each; then the usual.
SHAPES = [(2, 3, v, 7, 3) for v in (1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 130)]
SHAPES += [(1, 2, 1030, 40, 5), (2, 1, 600, 3, 0), (1, 1, 5, 300, 2)]
SHAPES += [(0, 2, 5, 4, 2), (2, 0, 5, 4, 2), (2, 2, 5, 0, 2), (2, 2, 5, 0, 0), (2, 3, 5, 4, 0), (3, 2, 5, 4, 2)]


class _Maker:
    """Random tensors of one device, dtype and seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.result = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of the result's dtype."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.result)

    def eighths(self, *shape: int) -> Tensor:
        """Small multiples of 1/2, of which many are equal, and whose products and sums are exact in any dtype."""
        return (torch.randint(-4, 5, shape, generator=self.generator) / 2).to(self.device, self.dtype)

    def words(self, low: int, high: int, *shape: int) -> Tensor:
        """Ids in [low, high), which may be negative."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def case(self, b: int, t: int, v: int, s: int, oov: int) -> Case:
        """Logits, attention, gate, source_ids, num_oov; about one source position in six is absent."""
        attention = torch.softmax(2 * self.normal(b, t, s), -1)
        ids = self.words(-(v // 6) - 1, v + oov, b, s)
        return [(2 * self.normal(b, t, v)).to(self.dtype), attention, 2 * self.normal(b, t), ids, oov]


def rows(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(logits, attention, gate, source_ids, num_oov)."""
    make = _Maker(device, dtype, seed)
    for shape in SHAPES[:-1]:
        yield tuple(make.case(*shape))
    for edit in (*_hazards(), *_layouts()):
        case = make.case(3, 4, 20, 9, 4)
        edit(case, make)
        yield tuple(case)
    yield tuple(_strided(make))
    yield tuple(make.case(*SHAPES[-1]))


def rows_and_grad(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(grad, logits, attention, gate, source_ids, num_oov)."""
    make = _Maker(device, dtype, seed + 1)
    for number, (logits, attention, gate, ids, oov) in enumerate(rows(device, dtype, seed)):
        grad = make.normal(*logits.shape[:2], logits.shape[2] + oov)
        if number % 4 == 3 and grad.numel() > 100:
            grad[-1, -1, number % grad.shape[2]] = (math.nan, INF)[number % 8 // 4]
        if number % 5 == 2:  # as of a loss that looks at few words
            grad[..., 1:] = 0
        yield grad, logits, attention, gate, ids, oov


def heads_and_k(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(hidden, weight, bias or None, attention, gate, source_ids, k)."""
    make = _Maker(device, dtype, seed + 2)
    for number, (logits, attention, gate, ids, _) in enumerate(rows(device, dtype, seed)):
        b, t, v = logits.shape
        h = 3 if v < 30 else 5
        weight = make.eighths(v, h)
        bias = None if number % 3 == 1 else make.normal(v)
        if number % 4 == 1:
            weight = weight.to(make.result)
        if bias is not None and number % 6 == 3 and v > 2:
            bias[:2] = -INF
        hidden = make.eighths(b, t, h)
        if bool(logits.isnan().any()):
            hidden[1, 2] = math.nan
        k = min(v, (1, 3, 8)[number % 3])
        yield hidden, weight, bias, attention.abs(), gate, ids, k


def _strided(make: _Maker) -> Case:
    """No tensor is contiguous; the logits' words do not lie side by side."""
    b, t, v, s, oov = SHAPES[-1]
    logits, attention, gate, ids, oov = make.case(t, b, 2 * v, s, oov)
    ids = make.words(-1, v + oov, s, b).t()
    return [logits.transpose(0, 1)[..., ::2], attention.transpose(0, 1), gate.t(), ids, oov]


def _layouts() -> list[Callable[[Case, _Maker], None]]:
    """Rows that lie apart, and rows that are the same memory."""

    def apart(case: Case, make: _Maker) -> None:
        case[0] = make.normal(3, 6, 31).to(make.dtype)[:, 1:5, 3:23]
        case[1] = torch.softmax(make.normal(3, 8, 11), -1)[:, ::2, 2:]
        case[2] = make.normal(6, 4)[::2]

    def shared(case: Case, make: _Maker) -> None:
        case[0] = case[0][:, :1].expand(3, 4, 20)
        case[3] = case[3][:1].expand(3, 9)

    return [apart, shared]


def _hazards() -> list[Callable[[Case, _Maker], None]]:
    """What breaks an implementation that is only right on ordinary numbers."""

    def scale_logits(case: Case, make: _Maker) -> None:
        case[0] *= 200

    def gates(size: float) -> Callable[[Case, _Maker], None]:
        def edit(case: Case, make: _Maker) -> None:
            case[2][:] = size
            case[2][:, ::2] = -size

        return edit

    def forbid(case: Case, make: _Maker) -> None:
        case[0][:, :, 3:17] = -INF

    def forbid_all(case: Case, make: _Maker) -> None:
        case[0][1, 2] = -INF

    def all_out_of_vocabulary(case: Case, make: _Maker) -> None:
        case[3] = make.words(20, 24, 3, 9)

    def one_word(case: Case, make: _Maker) -> None:
        case[3][:] = torch.tensor([[7], [21], [0]])

    def no_source(case: Case, make: _Maker) -> None:
        case[3][1] = -100
        case[1][1] = math.nan  # nobody reads it

    def no_attention(case: Case, make: _Maker) -> None:
        case[1][0] = 0

    def put(which: int, value: float) -> Callable[[Case, _Maker], None]:
        def edit(case: Case, make: _Maker) -> None:
            case[3][1, 5] = 2  # a position that is there
            place = (1, 2) if which == 2 else (1, 2, 5)
            case[which][place] = value

        return edit

    edits = [scale_logits, gates(60.0), gates(200.0), gates(INF), forbid, forbid_all, all_out_of_vocabulary, one_word]
    edits += [no_source, no_attention]
    return edits + [put(which, value) for which in (0, 1, 2) for value in (math.nan, INF)] + [put(1, -INF)]
