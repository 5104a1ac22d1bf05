"""attend_grad as a composition that torch can differentiate any number of times; its S*S tensors exist at once.

For double backward only, so float64 throughout, and by gathers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.disentangled.layout import Layout
from fastseq.ops.derivatives import pull_back

__all__ = ["attend_grad", "double_backward"]

INF = math.inf


def double_backward(inputs: Sequence[Any], grad_grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of sum <grad_grads, attend_grad(*inputs)>: one for each of the sixteen inputs, None for most."""
    given = [i for i, g in enumerate(grad_grads) if g is not None]

    def objective(*leaves: Any) -> Tensor:
        found = attend_grad(*leaves[:9], *inputs[9:])
        value = found[0].new_zeros(())
        for i, grad in zip(given, leaves[9:], strict=True):
            value = value + (grad * found[i]).sum()
        return value

    with torch.autocast(inputs[2].device.type, enabled=False):
        found = pull_back(objective, (*inputs[:9], *(grad_grads[i] for i in given)), None)
    return *found[:9], *(None,) * 7


def attend_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> list[Tensor]:
    """The gradients to q, k, v, pos_key and pos_query, in float64."""
    layout = Layout(*inputs)
    layout.dtype = torch.float64
    q, k, v = (layout.heads(x) for x in inputs[:3])
    key_table, query_table = layout.table(inputs[3], falling=True), layout.table(inputs[4], falling=False)
    g = torch.zeros_like(q) if grad_out is None else layout.heads(grad_out)
    delta = (g * layout.heads(out)).sum(3)
    if grad_lse is not None:
        delta = delta - layout.columns(grad_lse.double(), 0.0)
    lse = layout.columns(lse.double(), -INF)
    dead = lse == -INF
    t = (q @ k.transpose(2, 3) + _met(q, key_table) + _met(k, query_table).transpose(2, 3)) * layout.scale
    out_of_it = dead[..., None] if layout.gone is None else dead[..., None] | layout.gone[:, None]
    p = (t - lse.masked_fill(dead, 0)[..., None]).masked_fill(out_of_it, -INF).exp()
    kept = layout.kept((slice(None), slice(None)))
    dp, mp = g @ v.transpose(2, 3), p
    if kept is not None:
        dp, mp = dp * kept, p * kept
    ds = p * (dp - delta[..., None]) * layout.scale
    to_q, to_key_table = _moved(ds, q, key_table)
    to_k, to_query_table = _moved(ds.transpose(2, 3), k, query_table)
    to_q, to_k, to_v = ds @ k + to_q, ds.transpose(2, 3) @ q + to_k, mp.transpose(2, 3) @ g
    found = [layout.positions(x) for x in (to_q, to_k, to_v)]
    found.append(layout.slots(inputs[3], to_key_table, falling=True))
    found.append(layout.slots(inputs[4], to_query_table, falling=False))
    return found


def _places(x: Tensor) -> Tensor:
    """(H,N,L,L) at (a,b): where the distance of b from a lies in a table."""
    places = torch.arange(x.shape[2], device=x.device)
    return (places - places[:, None] + len(places) - 1).expand(*x.shape[:2], -1, -1)


def _met(x: Tensor, table: Tensor | None) -> Tensor:
    """(H,N,L,L) the product of each position with the table's row of each other position."""
    if table is None:
        return x.new_zeros(())
    return (x @ table.transpose(1, 2)[:, None]).gather(3, _places(x))


def _moved(ds: Tensor, x: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of `_met` to its arguments."""
    if table is None:
        return torch.zeros_like(x), None
    wide = ds.new_zeros((*x.shape[:3], table.shape[1])).scatter(3, _places(x), ds)
    return wide @ table[:, None], (wide.transpose(2, 3) @ x).sum(1)
