"""The same loss as a composition that torch can differentiate any number of times; its (B,T,V) tensors exist at once.

For double backward only, so float64 throughout, and written to be exact where the loss is: a branch that is switched
off (-inf) has derivative 0, and not the NaN of -inf - -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.derivatives import pull_back

__all__ = ["double_backward", "total"]

INF = math.inf


def double_backward(
    inputs: Sequence[Any], grad_total: Tensor | None, grad_grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of grad_total * total + sum <grad_grads, grads>, of nll_grad(*inputs).

    One for each of the eleven inputs, None for those that are not floating-point tensors.
    """
    tensors, (ignore_index, label_smoothing, z_loss, weights) = inputs[:7], inputs[7:]

    def objective(*leaves: Any) -> Tensor:
        whole = total(leaves[:7], ignore_index, label_smoothing, z_loss, leaves[7])
        value = whole.new_zeros(()) if grad_total is None else grad_total * whole
        pairs = [(g, x) for g, x in zip(grad_grads, leaves[:5], strict=True) if g is not None and x is not None]
        if pairs:
            wanted = [x for _, x in pairs]
            found = torch.autograd.grad(whole, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
            value = value + sum((g * d).sum() for (g, _), d in zip(pairs, found, strict=True))
        return value

    found = pull_back(objective, (*tensors, weights), None)
    return *found[:7], None, None, None, found[7]


def total(
    tensors: Sequence[Any], ignore_index: int, label_smoothing: float, z_loss: float, weights: Tensor | None
) -> Tensor:
    """() the weighted sum of the values, in float64, of the first seven arguments of the op, and the others."""
    hidden, weight, bias, copy, gate, source_ids, target_ids = tensors
    dtype, (hidden, copy) = hidden.dtype, (hidden.double(), copy.double())
    gate = None if gate is None else gate.double()
    off = target_ids == ignore_index
    if weights is not None:
        off = off | ((weights == 0) & _poisoned(hidden, copy, gate, source_ids))
    # Rows that have no part become harmless ones, so that nothing of theirs can reach a gradient.
    hidden, copy = hidden.masked_fill(off[:, :, None], 0), copy.masked_fill(off[:, :, None], 0)
    y, source_ids = target_ids.masked_fill(off, 0), source_ids[:, None].expand(copy.shape)
    copy = copy.masked_fill(source_ids < 0, -INF if gate is None else 0)
    z = F.linear(hidden, weight.to(dtype).double(), None if bias is None else bias.double())
    if gate is None:
        values = _copynet(z, copy, source_ids, y, off)
    else:
        values = _pointer_generator(z, copy, gate.masked_fill(off, 0), source_ids, y, off, label_smoothing, z_loss)
    values = values.masked_fill(values == INF, INF).masked_fill(off, 0)  # p(y) = 0: no gradient
    return values.sum() if weights is None else torch.where(off, 0, values * weights).sum()


def _poisoned(hidden: Tensor, copy: Tensor, gate: Tensor | None, source_ids: Tensor) -> Tensor:
    """(B,T) whether a row holds a NaN or +inf."""
    read = copy.masked_fill((source_ids < 0)[:, None], 0)
    poisoned = ~hidden.isfinite().all(2) | (read.isnan() | (read == INF)).any(2)
    return poisoned if gate is None else poisoned | ~gate.isfinite()


def _log(total: Tensor, top: Tensor, off: Tensor) -> Tensor:
    """Return log(total) + top, +inf with gradient 0 where top is -inf, which `total` was then not scaled by."""
    dead = top == -INF
    value = total.masked_fill(dead | off, 1).log() + top.masked_fill(dead, 0)
    return value.masked_fill(dead, -INF)


def _mixture(a: Tensor, mass: Tensor, log_not_gate: Tensor, off: Tensor) -> Tensor:
    """Return log(exp(a) + exp(log_not_gate) mass), with its gradient where mass is 0 or a is -inf."""
    top = torch.maximum(a, log_not_gate + mass.log()).detach()
    shift = top.masked_fill(top == -INF, 0)
    return _log((a - shift).exp() + (log_not_gate - shift).exp() * mass, top, off)


def _pointer_generator(
    z: Tensor,
    copy: Tensor,
    gate: Tensor,
    source_ids: Tensor,
    y: Tensor,
    off: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """(B,T) values."""
    vocabulary, lse = z.shape[2], z.logsumexp(2)
    log_gate, log_not_gate = F.logsigmoid(gate), F.logsigmoid(-gate)
    known = y < vocabulary
    at_target = z.gather(2, y.clamp(0, vocabulary - 1)[:, :, None])[:, :, 0]
    own = (log_gate + at_target - lse).masked_fill(~known, -INF)
    match = source_ids == y[:, :, None]
    copied = log_not_gate.masked_fill(~match.any(2), 0)
    values = -_mixture(own, torch.where(match, copy, 0).sum(2), copied, off)
    if label_smoothing:
        inside = (source_ids >= 0) & (source_ids < vocabulary)
        ids = source_ids.masked_fill(~inside, 0)
        mass = torch.zeros_like(z).scatter_add(2, ids, torch.where(inside, copy, 0))
        a = z + (log_gate - lse)[:, :, None]
        every = _mixture(a, mass, log_not_gate[:, :, None].expand_as(z), off[:, :, None])
        values = (1 - label_smoothing) * values - label_smoothing * every.mean(2)
    return values + z_loss * lse.square() if z_loss else values


def _copynet(z: Tensor, scores: Tensor, source_ids: Tensor, y: Tensor, off: Tensor) -> Tensor:
    """(B,T) values of CopyNet's joint softmax over words and source positions."""
    every = torch.cat([z, scores], 2)
    words = torch.arange(z.shape[2], device=z.device).expand(z.shape)
    chosen = every.masked_fill(torch.cat([words, source_ids], 2) != y[:, :, None], -INF)
    top = chosen.amax(2).detach()
    total = (chosen - top.masked_fill(top == -INF, 0)[:, :, None]).exp().sum(2)
    return every.logsumexp(2) - _log(total, top, off)
