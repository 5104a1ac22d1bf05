"""Plain torch, as fast as it goes: products by distance, which a skewed view brings to their places, without a gather.

The tables are laid out by distance first, (H,2L-1,D) with L the longest sequence: then what a query meets, one row of
q @ table^T, lies as the row of scores does, only one element further to the left in each row than in the one before.
That is a matter of strides, in both directions; rows go by in blocks, since those of a block meet only a part of the
table. What takes S*S space exists for a few sequences or heads at a time, and nothing of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.disentangled.differentiable import double_backward
from fastseq.ops.attention.disentangled.layout import Layout, Part

__all__ = ["attend", "attend_grad", "double_backward"]

INF, NAN = math.inf, math.nan
ROWS = 96  # that meet a part of a table together


@torch.no_grad()
def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """(B,S,H,D) out and (B,H,S) lse."""
    with torch.autocast(args[0].device.type, enabled=False):  # which would multiply matrices in bfloat16
        layout = Layout(*args)
        q, k, v = (layout.heads(x) for x in args[:3])
        tables = layout.table(args[3], falling=True), layout.table(args[4], falling=False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for part in layout.chunks():
            t = _scores(layout, part, q, k, *tables)
            lse[part] = total = _logsumexp(t)
            p = t.sub_(total.masked_fill_(total == -INF, 0)[..., None]).exp_()
            kept = layout.kept(part)
            out[part] = (p if kept is None else p.mul_(kept)) @ v[part]
        return layout.positions(out).to(args[0].dtype), layout.rows(lse)


@torch.no_grad()
def attend_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    """The gradients to q, k, v, pos_key and pos_query."""
    with torch.autocast(out.device.type, enabled=False):
        layout = Layout(*inputs)
        q, k, v = (layout.heads(x) for x in inputs[:3])
        tables = layout.table(inputs[3], falling=True), layout.table(inputs[4], falling=False)
        g = torch.zeros_like(q) if grad_out is None else layout.heads(grad_out)
        delta = (g * layout.heads(out)).sum(3)
        if grad_lse is not None:
            delta -= layout.columns(grad_lse, 0.0)
        lse = layout.columns(lse, -INF)
        lse = lse.masked_fill(lse == -INF, INF)  # so that nothing is in such a row
        grads = [None if x is None else torch.zeros_like(x) for x in (q, k, v, *tables)]
        for part in layout.chunks():
            _differentiate(layout, part, (q, k, v, *tables), g, delta, lse, grads)
        found = [layout.positions(x) for x in grads[:3] if x is not None]
        found.append(layout.slots(inputs[3], grads[3], falling=True))
        found.append(layout.slots(inputs[4], grads[4], falling=False))
        return tuple(x.to(out.dtype) for x in found)


def _differentiate(
    layout: Layout,
    part: Part,
    inputs: Sequence[Any],
    g: Tensor,
    delta: Tensor,
    lse: Tensor,
    grads: Sequence[Any],
) -> None:
    """Add the part's gradients to `grads`."""
    q, k, v, key_table, query_table = inputs
    dq, dk, dv, d_key_table, d_query_table = grads
    heads = part[0]
    p = _scores(layout, part, q, k, key_table, query_table).sub_(lse[part][..., None]).exp_()
    dp, kept = g[part] @ v[part].transpose(2, 3), layout.kept(part)
    ds = (dp if kept is None else dp.mul_(kept)).sub_(delta[part][..., None]).mul_(p).mul_(layout.scale)
    dv[part] = (p if kept is None else p.mul_(kept)).transpose(2, 3) @ g[part]
    dq[part], dk[part] = ds @ k[part], ds.transpose(2, 3) @ q[part]
    if key_table is not None:
        _spread(ds, q[part], key_table[heads], dq[part], d_key_table[heads])
    if query_table is not None:
        _spread(ds.transpose(2, 3), k[part], query_table[heads], dk[part], d_query_table[heads])


def _scores(
    layout: Layout, part: Part, q: Tensor, k: Tensor, key_table: Tensor | None, query_table: Tensor | None
) -> Tensor:
    """(h,n,L,L) scores, -inf at keys that do not exist."""
    t = q[part] @ k[part].transpose(2, 3)
    if key_table is not None:
        _add_met(t, q[part], key_table[part[0]])
    if query_table is not None:
        _add_met(t.transpose(2, 3), k[part], query_table[part[0]])
    t *= layout.scale
    return t if layout.gone is None else t.masked_fill_(layout.gone[part[1], None], -INF)


def _add_met(t: Tensor, x: Tensor, table: Tensor) -> None:
    """Add the products of x (h,n,L,D) with the rows of a table (h,2L-1,D) to t (h,n,L,L): at (a,b), row L-1 + b - a."""
    for rows, near in _blocks(x.shape[2]):
        block = x[:, :, rows]
        met = block.flatten(1, 2) @ table[:, near].transpose(1, 2)
        t[:, :, rows] += _skewed(met.view(*block.shape[:3], met.shape[2]))


def _spread(ds: Tensor, x: Tensor, table: Tensor, to_x: Tensor, to_table: Tensor) -> None:
    """Add the gradients of `_add_met` to those of x and of the table; `ds` (h,n,L,L) is that of t."""
    for rows, near in _blocks(x.shape[2]):
        block, near_table = x[:, :, rows], table[:, near]
        wide = x.new_zeros((*block.shape[:3], near_table.shape[1]))
        _skewed(wide).copy_(ds[:, :, rows])
        flat = wide.flatten(1, 2)
        to_x[:, :, rows] += (flat @ near_table).view(block.shape)
        to_table[:, near] += flat.transpose(1, 2) @ block.flatten(1, 2)


def _blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """Rows, and the part of a table that they meet: with few rows it is hardly more than half."""
    for first in range(0, size, ROWS):
        last = min(first + ROWS, size)
        yield slice(first, last), slice(size - last, 2 * size - 1 - first)


def _skewed(x: Tensor) -> Tensor:
    """(h,n,R,L) whose element (a,b) is the element (a, R-1 + b - a) of (h,n,R,L+R-1), contiguous."""
    rows, width = x.shape[2:]
    strides = (*x.stride()[:2], width - 1, 1)
    return x.as_strided((*x.shape[:2], rows, width - rows + 1), strides, x.storage_offset() + rows - 1)


def _logsumexp(t: Tensor) -> Tensor:
    """Over the last dimension: NaN where there is a NaN or +inf."""
    total = t.logsumexp(3)
    return total.masked_fill_(total == INF, NAN)
