"""The definition in plain loops: what every backend is held to, itself held to the formula on whole matrices.

Python floats (float64) and lists, a pair of positions at a time. Slow, CPU only, and never chosen unless forced.
Conventions are those of the package docstring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend", "attend_grad", "sequences"]

INF, NAN = math.inf, math.nan
WORD = 0xFFFFFFFF
Rows = list[list[float]]


@torch.no_grad()
def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """(B,S,H,D) out and (B,H,S) lse."""
    q = args[0]
    b, s, h, _ = q.shape
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((b, h, s), -INF, dtype=torch.float64)
    for head in _heads(*args):
        for i, row in enumerate(head.rows):
            scores = head.scores(i)
            value = _lse(scores)
            p = [m * _p(t, value) for t, m in zip(scores, head.kept(i), strict=True)]
            lse[head.batch, head.h, row] = value
            columns = [_dot(p, column) for column in zip(*head.v, strict=True)]
            out[head.batch, row, head.h] = torch.tensor(columns, dtype=torch.float64)
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


@torch.no_grad()
def attend_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    """The gradients to q, k, v, pos_key and pos_query."""
    given = inputs[:5]
    grads = [torch.zeros(0 if x is None else x.shape, dtype=torch.float64) for x in given]
    for head in _heads(*inputs):
        b, h, rows = head.batch, head.h, slice(head.rows.start, head.rows.stop)
        nothing = torch.zeros(len(head.rows), out.shape[3])
        g = nothing.tolist() if grad_out is None else grad_out[b, rows, h].tolist()
        to_lse = [0.0] * len(head.rows) if grad_lse is None else grad_lse[b, h, rows].tolist()
        found = head.gradients(g, to_lse, out[b, rows, h].tolist(), lse[b, h, rows].tolist())
        for grad, part in zip(grads[:3], found[:3], strict=True):
            grad[b, rows, h] = torch.tensor(part, dtype=torch.float64).view(nothing.shape)
        for grad, part in zip(grads[3:], found[3:], strict=True):
            if part:
                grad[:, h] += torch.tensor(part, dtype=torch.float64)
    return tuple(grad.to(out.dtype) for grad in grads)


class _Head:
    """One head of one sequence: its numbers as lists, of the positions that exist."""

    def __init__(self, args: tuple[Any, ...], number: int, batch: int, rows: range, h: int) -> None:
        q, k, v, pos_key, pos_query, slots, _, _, seed, _, self.scale, self.dropout = args
        self.batch, self.rows, self.h = batch, rows, h
        self.q, self.k, self.v = ([x[batch, row, h].tolist() for row in rows] for x in (q, k, v))
        self.pos_key, self.pos_query = ([] if x is None else x[:, h].tolist() for x in (pos_key, pos_query))
        self.slots, self.middle = slots.tolist(), len(slots) // 2
        self.seed = int(seed) if self.dropout else 0
        self.number = number * q.shape[2] + h

    def slot(self, distance: int) -> int:
        return int(self.slots[distance + self.middle])

    def scores(self, i: int) -> list[float]:
        scores = []
        for j, key in enumerate(self.k):
            t = _dot(self.q[i], key)
            t += _dot(self.q[i], self.pos_key[self.slot(i - j)]) if self.pos_key else 0.0
            t += _dot(key, self.pos_query[self.slot(i - j)]) if self.pos_query else 0.0
            scores.append(self.scale * t)
        return scores

    def gradients(self, g: Rows, to_lse: list[float], out: Rows, lse: list[float]) -> list[Rows]:
        """To q, k, v and the tables, from those to out and lse."""
        inputs = self.q, self.k, self.v, self.pos_key, self.pos_query
        dq, dk, dv, dpos_key, dpos_query = ([[0.0] * len(row) for row in x] for x in inputs)
        for i, top in enumerate(lse):
            if top == -INF:
                continue
            delta = _dot(g[i], out[i]) - to_lse[i]
            for j, (t, m) in enumerate(zip(self.scores(i), self.kept(i), strict=True)):
                p, slot = _p(t, top), self.slot(i - j)
                dp = m * _dot(g[i], self.v[j]) if m else 0.0
                ds = self.scale * p * (dp - delta)
                if m:
                    _add(dv[j], m * p, g[i])
                _add(dq[i], ds, self.k[j])
                _add(dk[j], ds, self.q[i])
                if self.pos_key:
                    _add(dq[i], ds, self.pos_key[slot])
                    _add(dpos_key[slot], ds, self.q[i])
                if self.pos_query:
                    _add(dk[j], ds, self.pos_query[slot])
                    _add(dpos_query[slot], ds, self.k[j])
        return [dq, dk, dv, dpos_key, dpos_query]

    def kept(self, i: int) -> list[float]:
        """The row of m: 0, or the inverse of the share that is kept."""
        threshold = min(math.floor(self.dropout * 65536 + 0.5), 65535)
        if not threshold:
            return [1.0] * len(self.rows)
        kept = 65536 / (65536 - threshold)
        return [kept if _hash(self.seed, self.number, i, j) >= threshold else 0.0 for j in range(len(self.rows))]


def sequences(q: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, max_length: int) -> list[tuple[int, range]]:
    """(row of the batch, positions) of each sequence.

    Raises:
        ValueError: The lengths do not fit.
    """
    size = q.shape[1]
    if cu_seqlens is None:
        ends = [size] * len(q) if lengths is None else lengths.tolist()
        if any(not 0 <= end <= size for end in ends):
            raise ValueError(f"lengths: got {ends}, wanted lengths from 0 to S = {size}")
        return [(b, range(end)) for b, end in enumerate(ends)]
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0 or bounds[-1] > size or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens: got {bounds}, wanted rising boundaries from 0 to the {size} positions at most")
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    if longest > max_length:
        raise ValueError(f"cu_seqlens: got a sequence of {longest} tokens, wanted max_length = {max_length} at most")
    return [(0, range(a, b)) for a, b in itertools.pairwise(bounds)]


def _heads(*args: Any) -> Iterator[_Head]:
    for number, (batch, rows) in enumerate(sequences(args[0], args[6], args[7], args[9])):
        for h in range(args[0].shape[2]):
            yield _Head(args, number, batch, rows, h)


def _dot(a: Any, b: Any) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)))


def _add(to: list[float], factor: float, x: list[float]) -> None:
    to[:] = [a + factor * b for a, b in zip(to, x, strict=True)]


def _p(t: float, lse: float) -> float:
    return 0.0 if lse == -INF else math.exp(min(t - lse, 700.0)) if t == t else NAN


def _lse(values: list[float]) -> float:
    """Sum in the log domain; -inf of nothing, NaN where there is a NaN or +inf."""
    if any(v != v or v == INF for v in values):
        return NAN
    top = max(values, default=-INF)
    return top if top == -INF else top + math.log(sum(math.exp(v - top) for v in values))


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def _hash(seed: int, number: int, i: int, j: int) -> int:
    """16 bits for the query i and the key j, of the head and sequence `number`."""
    low, high = seed & WORD, seed >> 32 & WORD
    a = _mix((_mix((_mix(low) + number) & WORD) + i) & WORD)
    b = _mix(_mix((_mix(high ^ 0x9E3779B9) + number) & WORD) ^ i)
    x = (a + ((j >> 5) * 16 + (j & 15)) * 0x9E3779B9) & WORD
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = (x + b) * 0x846CA68B & WORD
    x ^= x >> 16
    return x >> 16 * (j >> 4 & 1) & 0xFFFF
