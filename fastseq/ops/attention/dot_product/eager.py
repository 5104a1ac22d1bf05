"""Attention in plain torch, on any device: matrix products and passes over blocks of scores, in place.

A block is some queries of some sequences with all their keys, of a size that stays in a cache (on a GPU: that keeps it
busy), so that nothing of size N*H*Sq*Sk exists. Half types are computed in float32. Packed sequences are padded, on a
CPU in groups of nearly the same lengths.

What a query does not see never reaches its results, even if it is NaN: hidden scores are overwritten, and hidden rows
of q, k, v and grad_out, which products multiply by 0, have their NaN and infinities replaced by 0 first. Where a query
does see one, its result is made NaN by other means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product.arguments import Arguments, Batch, batches, geometry, pad
from fastseq.ops.attention.dot_product.differentiable import double_backward, weights
from fastseq.ops.attention.dropout import keep_mask, kept_scale, threshold

__all__ = ["attention", "attention_grad", "double_backward", "weights"]

INF, NAN = math.inf, math.nan
BLOCK_BYTES = {"cpu": 2 << 20}  # of the scores of a block, where it has more than BLOCK_ROWS queries
BLOCK_BYTES_ELSEWHERE, BLOCK_ROWS = 64 << 20, 16


class _Heads(NamedTuple):
    """A padded batch in R and by heads; the G = Hq/Hk query heads of a kv head are together."""

    batch: Batch
    args: Arguments
    q: Tensor  # (n,Hk,G,Lq,D), any strides
    k: Tensor  # (n,Hk,Lk,D)
    v: Tensor
    bad: Tensor | None  # (n,Hk,Lk) which rows of v, 0 then, were not finite; None for none, or where all see them
    bias: Tensor | None  # (n|1,Hk|1,G|1,Lq|1,Lk|1)


class _Block(NamedTuple):
    """Some sequences and queries; scores are (n,Hk,G,r,Lk)."""

    sequences: slice
    rows: slice
    q: Tensor  # (n*Hk,G*r,D)
    k: Tensor  # (n*Hk,Lk,D)
    v: Tensor
    scores: Tensor
    tanh: Tensor | None  # of the scores before bias and slopes, where there is a softcap
    hidden: Tensor | None  # (n|1,1,1,r,Lk) what is not visible
    keep: Tensor | None  # (n,Hk,G,r,Lk)


@torch.no_grad()
def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; see `fastseq.ops.attention.dot_product`."""
    args = Arguments(*arguments)
    out, lse = _with_padding(args.q, args), _with_padding(args.q[..., 0], args, args.result).fill_(-INF)
    with torch.autocast(args.q.device.type, enabled=False):
        for batch in batches(args):
            heads = _without_bad_values(_heads(batch, args))
            padded = (out, lse)
            if batch.to_q is not None:
                padded = out.new_empty(batch.q.shape), lse.new_empty(batch.q.shape[:3])
            for block in _blocks(heads):
                found, norm = _forward(block, heads)
                place = block.sequences, block.rows
                padded[0][place] = found.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)
                padded[1][place] = norm.permute(0, 3, 1, 2).flatten(2)
            if batch.to_q is not None:
                for whole, part in zip((out, lse), padded, strict=True):
                    whole[0].index_copy_(0, batch.to_q, part.flatten(0, 1))
    return _without_padding(out, args), _in_order(_without_padding(lse, args).transpose(1, 2))


@torch.no_grad()
def attention_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients to q, k, v and bias; see `fastseq.ops.attention.dot_product`."""
    args, with_bias = Arguments(*arguments[:17]), arguments[17] and arguments[3] is not None
    with torch.autocast(args.q.device.type, enabled=False):
        rows = _of_rows(grad_out, grad_lse, out, lse, args)
        grads = [_with_padding(x, args) for x in args[:3]]
        grad_bias = args.number.new_zeros(args.bias.shape if args.bias is not None and with_bias else 0)
        for batch in batches(args):
            heads = _heads(batch, args)
            heads = heads._replace(q=_finite(heads.q), k=_finite(heads.k), v=_finite(heads.v))
            found = _backward(heads, [_pad_rows(x, batch) for x in rows], grad_bias if with_bias else None)
            for whole, part, to in zip(grads, found, (batch.to_q, batch.to_k, batch.to_k), strict=True):
                if to is None:
                    whole.copy_(part)
                else:
                    whole[0].index_copy_(0, to, part.to(whole.dtype).flatten(0, 1))
    dq, dk, dv = (_without_padding(g, args) for g in grads)
    return dq, dk, dv, grad_bias if args.bias is None else grad_bias.to(args.bias.dtype)


def _with_padding(x: Tensor, args: Arguments, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor like `x`; of packed sequences zeros, with one token more, where padding is written to."""
    if args.cu_seqlens_q is None:
        return x.new_empty(x.shape, dtype=dtype)
    return x.new_zeros(1, x.shape[1] + 1, *x.shape[2:], dtype=dtype)


def _in_order(x: Tensor) -> Tensor:
    """A contiguous copy, whose strides are those of its shape also where a size is 1."""
    return x.clone(memory_format=torch.contiguous_format)


def _without_padding(x: Tensor, args: Arguments) -> Tensor:
    return x if args.cu_seqlens_q is None else x[0, :-1][None]


def _heads(batch: Batch, args: Arguments) -> _Heads:
    dtype, kv_heads = args.result, batch.k.shape[2]
    q = batch.q.to(dtype).transpose(1, 2).unflatten(1, (kv_heads, -1))
    k, v = (x.to(dtype).transpose(1, 2).contiguous() for x in (batch.k, batch.v))
    bias = batch.bias
    if bias is not None:
        bias = bias.unflatten(1, (1, 1) if bias.shape[1] == 1 else (kv_heads, -1))
    return _Heads(batch, args, q, k, v, None, bias)


def _without_bad_values(heads: _Heads) -> _Heads:
    """Take from v what is not finite, if there is a query that may not see it."""
    args, batch = heads.args, heads.batch
    windows = args.causal or args.window_left >= 0 or args.window_right >= 0
    if not windows and batch.lengths_q is None and batch.lengths_k is None:
        return heads
    finite = _finite(heads.v)
    return heads if finite is heads.v else heads._replace(v=finite, bad=~heads.v.isfinite().all(-1))


def _blocks(heads: _Heads) -> Iterator[_Block]:
    """Cut the batch into blocks, and compute the scores of each."""
    n, kv_heads, group, most_q, _ = heads.q.shape
    row_bytes = max(kv_heads * group * heads.k.shape[2] * heads.k.element_size(), 1)
    size = BLOCK_BYTES.get(heads.q.device.type, BLOCK_BYTES_ELSEWHERE)
    row_step = min(max(size // row_bytes, BLOCK_ROWS), max(most_q, 1))
    step = max(size // (row_bytes * row_step), 1)
    for first in range(0, n, step):
        for row in range(0, most_q, row_step):
            yield _block(heads, slice(first, min(first + step, n)), slice(row, min(row + row_step, most_q)))


def _block(heads: _Heads, sequences: slice, rows: slice) -> _Block:
    args, batch = heads.args, heads.batch
    q = heads.q[sequences, :, :, rows]
    shape = (*q.shape[:4], heads.k.shape[2])
    q, k, v = q.flatten(0, 1).flatten(1, 2), heads.k[sequences].flatten(0, 1), heads.v[sequences].flatten(0, 1)
    flat = torch.baddbmm(args.number, q, k.mT, beta=0, alpha=args.scale)
    scores, tanh = flat.view(shape), None
    if args.softcap > 0:
        tanh = scores.div_(args.softcap).tanh_()
        scores = tanh * args.softcap
    if heads.bias is not None:
        scores += _slice(heads.bias, sequences, rows)
    queries = torch.arange(rows.start, rows.stop, device=q.device)
    part = batch._replace(
        lengths_q=None if batch.lengths_q is None else batch.lengths_q[sequences],
        lengths_k=None if batch.lengths_k is None else batch.lengths_k[sequences],
    )
    visible, distance = geometry(part, args, queries)
    if batch.slopes is not None and distance is not None:
        slopes = _slice(batch.slopes[:, :, None, None], sequences, rows).to(args.result)
        scores -= (slopes * distance.abs()[:, None]).unflatten(1, shape[1:3])
    keep = None
    if threshold(args.dropout) and args.seed is not None:
        ids = batch.ids[sequences, None] * (shape[1] * shape[2]) + torch.arange(shape[1] * shape[2], device=q.device)
        keep = keep_mask(args.seed, ids, queries, shape[4], args.dropout).view(shape)
    hidden = None if visible is None else ~visible[:, None, None]
    return _Block(sequences, rows, q, k, v, scores, tanh, hidden, keep)


def _slice(x: Tensor, sequences: slice, rows: slice) -> Tensor:
    """The part of something broadcastable, (n|1,...,Lq|1,Lk|1), that belongs to a block."""
    x = x if x.shape[0] == 1 else x[sequences]
    return x if x.shape[-2] == 1 else x[..., rows, :]


def _forward(block: _Block, heads: _Heads) -> tuple[Tensor, Tensor]:
    """(n,Hk,G,r,D) the output and (n,Hk,G,r) the logsumexp of a block; its scores are used up."""
    scores, v = block.scores, block.v
    if not scores.shape[-1]:
        return scores.new_zeros(*scores.shape[:-1], v.shape[-1]), scores.new_full(scores.shape[:-1], -INF)
    if block.hidden is not None:
        scores.masked_fill_(block.hidden, -INF)
    top = scores.amax(-1, keepdim=True)
    scores.sub_(top.masked_fill(top == -INF, 0)).exp_()
    norm = scores.sum(-1, keepdim=True)
    if block.keep is not None:
        scores.masked_fill_(~block.keep, 0)
    out = torch.bmm(scores.view(len(v), -1, scores.shape[-1]), v).view(*scores.shape[:-1], v.shape[-1])
    dead = top == -INF
    out.mul_(kept_scale(heads.args.dropout) / norm).masked_fill_(dead, 0)
    if heads.bad is not None and block.hidden is not None:
        seen = heads.bad[block.sequences, :, None, None] & ~block.hidden
        out.masked_fill_(seen.any(-1, keepdim=True), NAN)
    return out, (top + norm.log()).masked_fill_(dead, -INF)[..., 0]


class _Rows(NamedTuple):
    """What the backward pass knows of each query of a padded batch."""

    grad_out: Tensor  # (n,Hk,G,Lq,D) 0 where it is not finite
    lse: Tensor  # (n,Hk,G,Lq,1) +inf where there is no gradient, NaN where grad_out is not finite
    delta: Tensor  # (n,Hk,G,Lq,1)


def _of_rows(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, args: Arguments
) -> list[Tensor]:
    """grad_out (B,Sq,Hq,D), lse and delta (B,Sq,Hq), made fit for products."""
    lse = lse.transpose(1, 2)
    dead = lse == -INF
    if grad_out is None:
        grad_out, delta = torch.zeros_like(out, dtype=args.result), torch.zeros_like(lse)
    else:
        grad_out = grad_out.to(args.result)
        delta = (grad_out * out).sum(-1)
        lse = lse.masked_fill(~grad_out.isfinite().all(-1), NAN)
        grad_out = grad_out.masked_fill(dead[..., None] | ~grad_out.isfinite(), 0)
    if grad_lse is not None:
        delta = delta - grad_lse.transpose(1, 2)
    return [grad_out, lse.masked_fill(dead, INF), delta.masked_fill(dead, 0)]


def _pad_rows(x: Tensor, batch: Batch) -> Tensor:
    """(B,Sq,Hq,...) as (n,Hk,G,Lq,...)."""
    if batch.to_q is not None:
        x = pad(x, batch.to_q, (batch.q.shape[0], batch.q.shape[1]))
    x = x.transpose(1, 2).unflatten(1, (batch.k.shape[2], -1))
    return x if x.dim() == 5 else x[..., None]


def _backward(heads: _Heads, of_rows: list[Tensor], grad_bias: Tensor | None) -> tuple[Tensor, ...]:
    """(n,Lq,Hq,D), (n,Lk,Hk,D) twice: the gradients of a batch, in R; adds to grad_bias."""
    rows = _Rows(*of_rows)
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (heads.q, heads.k, heads.v))
    for block in _blocks(heads) if heads.k.shape[2] else ():
        p, grad_scores, place = _differentiate(block, heads, rows, grad_bias)
        flat = (len(block.v), -1, block.scores.shape[-1])
        grad_rows = rows.grad_out[place].flatten(0, 1).flatten(1, 2)
        grad_v[block.sequences].flatten(0, 1).baddbmm_(p.view(flat).mT, grad_rows)
        grad_k[block.sequences].flatten(0, 1).baddbmm_(grad_scores.view(flat).mT, block.q)
        grad_q[place] = torch.bmm(grad_scores.view(flat), block.k).view(grad_q[place].shape)
    return grad_q.flatten(1, 2).transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _differentiate(
    block: _Block, heads: _Heads, rows: _Rows, grad_bias: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """The probabilities after dropout, and the gradient to scale * q k^T times the scale; both like the scores."""
    place = (block.sequences, slice(None), slice(None), block.rows)
    p = block.scores.sub_(rows.lse[place]).exp_()
    if block.hidden is not None:
        p.masked_fill_(block.hidden, 0)
    grad_rows = rows.grad_out[place].flatten(0, 1).flatten(1, 2)
    grad = torch.bmm(grad_rows, block.v.mT).view(p.shape)
    kept = p
    if block.keep is not None:
        factor = kept_scale(heads.args.dropout)
        grad.mul_(factor).masked_fill_(~block.keep, 0)
        kept = (p * factor).masked_fill_(~block.keep, 0)
    grad.sub_(rows.delta[place]).mul_(p)
    if block.hidden is not None:  # delta may be NaN
        grad.masked_fill_(block.hidden, 0)
    if grad_bias is not None:
        _add_to_bias(grad.flatten(1, 2), block, heads, grad_bias)
    if block.tanh is not None:
        grad.mul_(1 - block.tanh.square())
    return kept, grad.mul_(heads.args.scale), place


def _add_to_bias(grad: Tensor, block: _Block, heads: _Heads, grad_bias: Tensor) -> None:
    """Add the gradient (n,Hq,r,Lk) of a block, summed over what the bias is broadcast over."""
    shape = [1 if size == 1 else whole for size, whole in zip(grad_bias.shape, grad.shape, strict=True)]
    grad = grad.sum_to_size(shape)
    rows = slice(None) if grad_bias.shape[2] == 1 else block.rows
    there = grad_bias[:, :, rows, : shape[3]]
    if grad_bias.shape[0] == 1:
        there += grad
    else:
        there.index_add_(0, heads.batch.ids[block.sequences], grad)


def _finite(x: Tensor) -> Tensor:
    """`x` with 0 for NaN and infinities. On a CPU, `x` itself where there is none, which is quick to see there."""
    if x.device.type == "cpu" and math.isfinite(float(x.sum())):
        return x
    return x.nan_to_num(0.0, 0.0, 0.0)
