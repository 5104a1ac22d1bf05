"""Attention's weights and its gradient as compositions that torch can differentiate any number of times.

For exact attention weights and for double backward, which is in float64 throughout: their S*S tensors exist at once.
Hidden scores are -inf before exp, so that no derivative of theirs is 0 * inf; NaN and infinities are taken from factors
of products, and put into the scores of those that see them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.attention.dot_product.arguments import Arguments, Batch, geometry, one_batch, pad
from fastseq.ops.attention.dropout import keep_mask, kept_scale, threshold

__all__ = ["double_backward", "gradient", "weights"]

INF, NAN = math.inf, math.nan
FLOATS = range(8)
"""The places of grad_out, grad_lse, out, lse, q, k, v and bias among the inputs of attention_grad."""


def weights(*arguments: Any) -> Tensor:
    """(N,Hq,max_q,max_k) the softmax before dropout, 0 where nothing is visible; of R, differentiable."""
    args = Arguments(*arguments)
    with torch.autocast("cpu" if args.q.is_meta else args.q.device.type, enabled=False):
        batch = one_batch(args)
        scores, _ = _scores(batch, args, *_by_heads(batch, args.result)[:2])
        rows, keys = scores.shape[2:]
        forbidden = scores == -INF
        dead = forbidden.all(-1, keepdim=True)
        p = scores.masked_fill(dead, 0).softmax(-1).masked_fill(forbidden, 0)
        return F.pad(p, (0, args.max_k - keys, 0, args.max_q - rows))


def double_backward(inputs: Sequence[Any], grad_grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of sum <grad_grads, attention_grad(*inputs)>.

    One for each of the first eight of the 22 inputs, None for one that is None or that has no part.
    """
    again, leaves = torch.is_grad_enabled(), list(inputs)
    places = [i for i in FLOATS if inputs[i] is not None]
    for i in places:
        x = inputs[i]
        # A view: an input may depend on another input, and that path is the caller's, not ours.
        leaves[i] = x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_()
    found: list[Tensor | None] = [None] * len(FLOATS)
    with torch.enable_grad(), torch.autocast(inputs[4].device.type, enabled=False):
        outputs = gradient(*leaves)
        pairs = [(g, x) for g, x in zip(grad_grads, outputs, strict=True) if g is not None and x.requires_grad]
        if pairs:
            grads, xs = [g.to(x.dtype) for g, x in pairs], [x for _, x in pairs]
            wanted = [leaves[i] for i in places]
            results = torch.autograd.grad(xs, wanted, grads, create_graph=again, allow_unused=True)
            for i, result in zip(places, results, strict=True):
                found[i] = result
    return tuple(found)


def gradient(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The outputs of attention_grad, in float64."""
    args, with_bias = Arguments(*arguments[:17]), arguments[17]
    batch = one_batch(args)
    q, k, v = _by_heads(batch, torch.float64)
    scores, slope = _scores(batch, args, q, k)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    delta = (grad_out.double() * out.double()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.double().transpose(1, 2)
    rows, delta, lse = (_rows(x, batch) for x in (grad_out, delta[..., None], lse.transpose(1, 2)[..., None]))
    dead, hidden = lse == -INF, scores == -INF
    lse = lse.masked_fill(dead, 0).masked_fill(~rows.isfinite().all(-1, keepdim=True), NAN)
    rows, delta = _finite(rows).masked_fill(dead, 0), delta.masked_fill(dead, 0)
    p = (scores.masked_fill(dead, -INF) - lse).masked_fill(hidden, -INF).exp()
    factor = _dropout(batch, args, p)
    grad = (p * ((rows @ _finite(v).mT) * factor - delta)).masked_fill(hidden, 0)
    grad_bias = _to_bias(grad, args, batch) if with_bias and args.bias is not None else grad.new_empty(0)
    grad_products = grad * slope * args.scale
    return (
        _unpad(grad_products @ _finite(k), batch.to_q, args.q),
        _unpad(grad_products.mT @ _finite(q), batch.to_k, args.k),
        _unpad((p * factor).mT @ rows, batch.to_k, args.v),
        grad_bias,
    )


def _by_heads(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(n,Hq,L,D) q, k and v, those of the kv heads once for each of their query heads."""
    group = batch.q.shape[2] // batch.k.shape[2]
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, 1) for x in (batch.k, batch.v))
    return batch.q.to(dtype).transpose(1, 2), k, v


def _rows(x: Tensor, batch: Batch) -> Tensor:
    """(B,Sq,Hq,...) as (n,Hq,Lq,...), in float64."""
    if batch.to_q is not None:
        x = pad(x, batch.to_q, (batch.q.shape[0], batch.q.shape[1]))
    return x.double().transpose(1, 2)


def _unpad(x: Tensor, tokens: Tensor | None, like: Tensor) -> Tensor:
    """(n,Hq,L,D) as (B,S,H,D) of `like`, summed over the query heads of a kv head."""
    x = x.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2)
    if tokens is None:
        return x
    into = x.new_zeros(like.shape[1] + 1, *like.shape[2:])
    return into.index_copy(0, tokens, x.flatten(0, 1))[None, :-1]


def _to_bias(grad: Tensor, args: Arguments, batch: Batch) -> Tensor:
    """(n,Hq,Lq,Lk) in the shape of the bias, which may be longer than the sequences are."""
    assert args.bias is not None
    assert batch.bias is not None
    grad, shape = grad.sum_to_size(batch.bias.shape), args.bias.shape
    return F.pad(grad, (0, shape[3] - grad.shape[3], 0, shape[2] - grad.shape[2]))


def _scores(batch: Batch, args: Arguments, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | float]:
    """(n,Hq,Lq,Lk) the scores, -inf where hidden, and their derivative by scale * q k^T."""
    bad = ~q.isfinite().all(-1)[..., :, None] | ~k.isfinite().all(-1)[..., None, :]
    scores: Tensor = (_finite(q) @ _finite(k).mT) * args.scale
    slope: Tensor | float = 1.0
    if args.softcap > 0:
        tanh = (scores / args.softcap).tanh()
        scores, slope = args.softcap * tanh, 1 - tanh.square()
    if batch.bias is not None:
        scores = scores + batch.bias.to(scores.dtype)
    visible, distance = geometry(batch, args, torch.arange(q.shape[2], device=q.device))
    if batch.slopes is not None and distance is not None:
        scores = scores - batch.slopes[:, :, None, None].to(scores.dtype) * distance.abs()[:, None]
    scores = scores.masked_fill(bad, NAN)
    return scores if visible is None else scores.masked_fill(~visible[:, None], -INF), slope


def _dropout(batch: Batch, args: Arguments, p: Tensor) -> Tensor | float:
    """What probabilities are multiplied by."""
    if not threshold(args.dropout) or args.seed is None:
        return 1.0
    heads = batch.ids[:, None] * p.shape[1] + torch.arange(p.shape[1], device=p.device)
    rows = torch.arange(p.shape[2], device=p.device)
    kept = keep_mask(args.seed, heads, rows, p.shape[3], args.dropout)
    return kept.to(p.dtype) * kept_scale(args.dropout)


def _finite(x: Tensor) -> Tensor:
    """`x` with 0 for NaN and infinities, which has no gradient there."""
    return x.masked_fill(~x.isfinite(), 0)
