"""Disentangled attention in Triton, for CUDA devices from sm_80 on: the kernels of `attention`, with positions.

What each query meets in each slot, q pos_key^T, and each key, k pos_query^T, are two (H,B*S,P) products by torch; the
kernels gather from them. Backward they write the gradients of these products: slots are monotone, so that the keys of a
slot are a run in each row, which a segmented scan sums; two more products by torch follow for each term. No (B,H,S,S)
tensor. Scratch: P elements a token, head and term, and as many in float32 backward.

float32, bfloat16 and float16, head sizes up to 256. Older GPUs (sm_75) have no tensor cores that Triton uses: `eager`
is for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.triton_call import Call

__all__ = ["disentangled_attention", "disentangled_attention_grad"]


def disentangled_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """The output (B,S,H,D) and lse (B,H,S); see `fastseq.ops.attention.disentangled`."""
    with _as_they_are(args[0]):
        return _call(args).forward()


def disentangled_attention_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, pos_key and pos_query; see `fastseq.ops.attention.disentangled`."""
    q, k, _, pos_key, pos_query, slots, cu_seqlens, lengths = args[:8]
    with _as_they_are(q):
        call = _call(args)
        c2p, p2c = (_zeros(q, table) for table in (pos_key, pos_query))
        dq, dk, dv, _ = call.backward(grad_out, grad_lse, out, lse, False, c2p, p2c)
        if cu_seqlens is not None or lengths is not None:  # what is at no position is not read
            there = _positions(q, cu_seqlens, lengths)
            q, k = (x.masked_fill(~there, 0) for x in (q, k))
        pos_key, pos_query = (_used(table, slots, args[9]) for table in (pos_key, pos_query))
        return dq, dk, dv, _meetings_grad(q, pos_key, c2p, dq), _meetings_grad(k, pos_query, p2c, dk)


def _as_they_are(q: Tensor) -> torch.autocast:
    """No autocast, which would multiply float32 matrices in another type."""
    return torch.autocast("cuda" if q.is_cuda else "cpu", enabled=False)


def _call(args: tuple[Any, ...]) -> Call:
    q, k, v, pos_key, pos_query, slots, cu_seqlens, lengths, seed, longest, scale, dropout = args
    rows = None, None, cu_seqlens, cu_seqlens, lengths, seed
    plain = q, k, v, *rows, longest, longest, scale, False, -1, -1, 0.0, dropout
    return Call(plain, _meetings(q, pos_key), _meetings(k, pos_query), slots)


def _by_head(x: Tensor) -> Tensor:
    """(H,B*S,D) of (B,S,H,D)."""
    return x.flatten(0, 1).transpose(0, 1)


def _meetings(x: Tensor, table: Tensor | None) -> Tensor | None:
    """(H,B*S,P) the products of each position with each row of (P,H,D)."""
    return None if table is None else torch.bmm(_by_head(x), table.permute(1, 2, 0))


def _zeros(x: Tensor, table: Tensor | None) -> Tensor | None:
    return None if table is None else x.new_zeros(x.shape[2], x.shape[0] * x.shape[1], len(table), dtype=torch.float32)


def _meetings_grad(x: Tensor, table: Tensor | None, grad: Tensor | None, to_x: Tensor) -> Tensor:
    """Add the gradient of `_meetings` to `to_x`, and return the table's."""
    if table is None or grad is None:
        return x.new_empty(0)
    grad = grad.to(x.dtype)
    _by_head(to_x).baddbmm_(grad, table.transpose(0, 1))
    return torch.empty_like(table, memory_format=torch.contiguous_format).copy_(
        torch.bmm(grad.transpose(1, 2), _by_head(x)).transpose(0, 1)
    )


def _used(table: Tensor | None, slots: Tensor, longest: int) -> Tensor | None:
    """Zeros in the rows of a table that no distance has: a product with 0 would read what they hold."""
    if table is None:
        return None
    middle = len(slots) // 2
    used = slots[max(0, middle + 1 - longest) : middle + longest].clamp(0, len(table) - 1).long()
    unused = torch.ones(len(table), dtype=torch.bool, device=table.device).index_fill_(0, used, False)
    return table.masked_fill(unused[:, None, None], 0)


def _positions(q: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(B,S,1,1) where there are positions."""
    place = torch.arange(q.shape[1], device=q.device)
    if cu_seqlens is None:
        assert lengths is not None
        there = place < lengths[:, None]
    else:
        there = ((place >= cu_seqlens[0]) & (place < cu_seqlens[-1]))[None]
    return there[..., None, None]
