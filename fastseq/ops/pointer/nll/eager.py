"""The pointer-generator's loss in plain torch, on any device: values, and their gradients in the same pass.

Rows (targets) go through the vocabulary in chunks: logits, softmax and products of one chunk follow each other, so that
no more than a chunk of logits exists. On a CPU, rows that need no vocabulary (ignored, of weight 0, or an
out-of-vocabulary target) are left out of the products; on a GPU, to find them would be to wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.pointer.nll.differentiable import double_backward
from fastseq.ops.pointer.nll.smoothing import Part, Smoothed, Smoothing, Words

__all__ = ["double_backward", "nll", "nll_grad"]

INF, NAN = math.inf, math.nan

# A chunk's logits: 8 MiB, but at least 128 rows where these fit in 32 MiB. At V = 50k a product of 40 rows takes nearly
# twice as long a row as one of 128.
CHUNK_BYTES, CHUNK_ROWS, CHUNK_MOST_BYTES = 8 << 20, 128, 32 << 20


class Rows(NamedTuple):
    """The N = B*T rows before any logit. R is the dtype of results, P that of the matrix products."""

    x: Tensor  # (N,H) P
    y: Tensor  # (N,) the target, -1 where the row has no part
    weights: Tensor  # (N,) R
    gate: Tensor | None  # (N,) R; None for CopyNet
    mass: Tensor  # (N,) R, log of what can be copied of the target, before the gate; -inf for nothing
    everything: Tensor | None  # (N,) R, for CopyNet: logsumexp of the copy scores
    needed: Tensor | None  # which rows go through the vocabulary; None for all


class Mixture(NamedTuple):
    """What some rows come to, (n,) each, of R."""

    value: Tensor
    log_p: Tensor
    lse: Tensor
    log_gate: Tensor
    log_not_gate: Tensor
    own: Tensor  # the posterior probability that the target was generated
    generated: Tensor  # the same with label smoothing: the gate's gradient is sigmoid(gate) less this
    dead: Tensor  # bool, no gradient: the row has no part, or p(y) = 0


class Gradients(NamedTuple):
    """What a pass through the vocabulary adds to."""

    hidden: Tensor  # (N,H)
    weight: Tensor  # (V,H) R
    bias: Tensor  # (V,) R
    copy: Tensor  # (N,S) R, label smoothing's part; (0,0) without


class Head(NamedTuple):
    """The vocabulary's parameters and the loss's."""

    weight: Tensor  # (V,H) P
    bias: Tensor | None  # (V,) R
    smoothing: Smoothing | None
    z_loss: float

    @property
    def share(self) -> float:
        return 0.0 if self.smoothing is None else self.smoothing.share


@torch.no_grad()
def nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    target_ids: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The value of each target, (B,T); see `fastseq.ops.pointer.nll`."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = _head(hidden, weight, bias, copy, gate, source_ids, label_smoothing, z_loss)
        y = _targets(target_ids, ignore_index, None)
        rows = _rows(hidden, head, copy, gate, source_ids, y, None)
        return _run(rows, head, None).value.view(target_ids.shape)


@torch.no_grad()
def nll_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    target_ids: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    weights: Tensor | None,
) -> tuple[Tensor, ...]:
    """The weighted sum and its gradients; see `fastseq.ops.pointer.nll`. A row of weight 0 is left out."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = _head(hidden, weight, bias, copy, gate, source_ids, label_smoothing, z_loss)
        y = _targets(target_ids, ignore_index, weights)
        rows = _rows(hidden, head, copy, gate, source_ids, y, weights)
        grads = Gradients(
            torch.zeros_like(rows.x, dtype=hidden.dtype),
            copy.new_zeros(weight.shape),
            copy.new_zeros(0 if bias is None else len(bias)),
            copy.new_zeros((len(rows.y), copy.shape[2]) if label_smoothing else (0, 0)),
        )
        mixture = _run(rows, head, grads)
        # A value of 0 is left out: its weight may be that of an ignored row, and anything.
        total = torch.where(mixture.value != 0, mixture.value * rows.weights, 0).sum()
        grad_copy = _grad_copy(rows, mixture, head, copy, source_ids, y)
        if label_smoothing:
            grad_copy += grads.copy.view(copy.shape)
        grad_gate = copy.new_empty(0)
        if rows.gate is not None and gate is not None:
            pull = rows.weights * (rows.gate.sigmoid() - mixture.generated)
            grad_gate = pull.masked_fill_(mixture.dead, 0).view(gate.shape)
        return total, grads.hidden.view(hidden.shape), grads.weight.to(weight.dtype), grads.bias, grad_copy, grad_gate


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Head:
    if gate is None and (label_smoothing or z_loss):
        raise ValueError(f"label_smoothing, z_loss: got {label_smoothing}, {z_loss} without a gate, wanted 0")
    smoothing = Smoothing(copy, source_ids, len(weight), label_smoothing) if label_smoothing else None
    rounded = weight.to(hidden.dtype)  # as any product of this dtype would see it
    return Head(rounded.to(_products(hidden)), bias, smoothing, z_loss)


def _products(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: that of hidden, but float32 where a CPU has none of a half type."""
    if hidden.device.type != "cpu" or hidden.dtype in (torch.float32, torch.float64):
        return hidden.dtype
    fast = hidden.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _targets(target_ids: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
    """(B,T) the targets, -1 where a row has no part."""
    ignored = target_ids == ignore_index
    if target_ids.device.type == "cpu":
        wrong = target_ids[(target_ids < 0) & ~ignored]
        if len(wrong):
            wanted = f"0 or more, or ignore_index = {ignore_index}"
            raise ValueError(f"target_ids: got the id {int(wrong[0])}, wanted {wanted}")
    if weights is not None:
        ignored = ignored | (weights == 0)
    return target_ids.masked_fill(ignored, -1)


def _match(source_ids: Tensor, y: Tensor) -> Tensor:
    """(B,T,S) whether the source word is the target; a negative id is nobody's."""
    return source_ids.masked_fill(source_ids < 0, -2)[:, None, :] == y[:, :, None]


def _rows(
    hidden: Tensor,
    head: Head,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    y: Tensor,
    weights: Tensor | None,
) -> Rows:
    match = _match(source_ids, y)
    everything = None
    if gate is not None:
        mass = torch.where(match, copy, 0).sum(2).log_()
    else:
        mass = torch.where(match, copy, -INF).logsumexp(2)
        everything = copy.masked_fill((source_ids < 0)[:, None], -INF).logsumexp(2).view(-1)
        everything.masked_fill_(everything == INF, NAN)
    mass = mass.view(-1)
    mass.masked_fill_(mass == INF, NAN)
    x, y = hidden.reshape(-1, hidden.shape[2]).to(head.weight.dtype), y.view(-1)
    through = y >= 0
    if gate is not None and head.smoothing is None and not head.z_loss:
        through &= y < len(head.weight)
    needed = None
    if y.device.type != "cpu":
        x = x.masked_fill(~through[:, None], 0)  # they go through, and must be harmless
    elif not through.all():
        needed = through.nonzero()[:, 0]
    w = torch.ones_like(mass) if weights is None else weights.reshape(-1)
    return Rows(x, y, w, None if gate is None else gate.reshape(-1), mass, everything, needed)


def _run(rows: Rows, head: Head, grads: Gradients | None) -> Mixture:
    """Take the rows through the vocabulary, chunk by chunk; add to `grads` on the way."""
    nothing = torch.full_like(rows.mass, -INF)
    whole, _ = _mix(rows, head, slice(None), nothing, torch.zeros_like(nothing), None)
    for number, part in enumerate(_chunks(rows, head)):
        x, y = rows.x[part], rows.y[part, None].clamp(0, len(head.weight) - 1)
        z = _logits(x, head, rows.mass.dtype)
        at_target = z.gather(1, y)[:, 0]
        words = None if head.smoothing is None else head.smoothing.read(z, part)
        top = z.amax(1, keepdim=True)
        norm = z.sub_(top).exp_().sum(1)  # z is exp(logits - top) from here on
        mixture, smoothed = _mix(rows, head, part, at_target, top[:, 0] + norm.log(), words)
        for all_rows, these in zip(whole, mixture, strict=True):
            all_rows[part] = these
        if grads is not None:
            _differentiate(rows, head, part, z.div_(norm[:, None]), y, mixture, words, smoothed, grads, number == 0)
    return whole


def _chunks(rows: Rows, head: Head) -> Iterator[Part]:
    row_bytes = max(len(head.weight) * rows.mass.element_size(), 1)
    size = max(CHUNK_BYTES // row_bytes, min(CHUNK_ROWS, CHUNK_MOST_BYTES // row_bytes), 1)
    for start in range(0, len(rows.y if rows.needed is None else rows.needed), size):
        part = slice(start, start + size)
        yield part if rows.needed is None else rows.needed[part]


def _logits(x: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """(n,V) logits in R."""
    if x.dtype == dtype:
        return x @ head.weight.t() if head.bias is None else torch.addmm(head.bias, x, head.weight.t())
    z = _mm(x, head.weight.t(), dtype)
    return z if head.bias is None else z.add_(head.bias)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A product of half types, in R: cuBLAS can leave its sums unrounded."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def _mix(
    rows: Rows, head: Head, part: Part, at_target: Tensor, lse: Tensor, words: Words | None
) -> tuple[Mixture, Smoothed | None]:
    """Mix what is generated, from the target's logit and lse (n,), with what is copied."""
    y, mass = rows.y[part], rows.mass[part]
    known = (y >= 0) & (y < len(head.weight))
    if rows.everything is None:
        assert rows.gate is not None
        gate = rows.gate[part]
    else:  # CopyNet: the gate that its joint softmax comes to; the mass as a share of all scores
        gate = lse - rows.everything[part]
        mass = torch.where(mass == -INF, mass, mass - rows.everything[part])
    log_gate, log_not_gate = F.logsigmoid(gate), F.logsigmoid(-gate)
    own = torch.where(known, log_gate + (at_target - lse), -INF)
    log_p = torch.logaddexp(own, log_not_gate + mass)
    own = torch.where(known, (own - log_p).exp(), 0)
    value, generated, smoothed = -log_p, own, None
    if head.smoothing is not None and words is not None:
        smoothed = head.smoothing.mix(words, log_gate, log_not_gate, lse)
        value = (1 - head.share) * value + head.share * smoothed.value
        generated = (1 - head.share) * own + head.share * smoothed.generated
    if head.z_loss:
        value = value + head.z_loss * lse * lse
    value = value.masked_fill(y < 0, 0)
    dead = (y < 0) | (value == INF)
    return Mixture(value, log_p, lse, log_gate, log_not_gate, own, generated, dead), smoothed


def _differentiate(
    rows: Rows,
    head: Head,
    part: Part,
    softmax: Tensor,
    y: Tensor,
    mixture: Mixture,
    words: Words | None,
    smoothed: Smoothed | None,
    grads: Gradients,
    first: bool,
) -> None:
    """Turn `softmax` (n,V) into the gradient to the logits, and add what follows from it to `grads`."""
    w = rows.weights[part].masked_fill(mixture.dead, 0)
    pull = mixture.generated if rows.everything is None else mixture.log_gate.exp()
    if head.z_loss:
        pull = pull + 2 * head.z_loss * mixture.lse
    target = w * mixture.own * (1 - head.share)
    alpha, beta = (v.masked_fill_(mixture.dead, 0) for v in (w * pull, target))
    grad_z = softmax.mul_(alpha[:, None]).scatter_add_(1, y, -beta[:, None])
    if head.smoothing is not None and words is not None and smoothed is not None:
        head.smoothing.add_to_logits(grad_z, words, smoothed, w)
        grads.copy[part] = head.smoothing.grad_copy(words, smoothed, w, mixture.log_not_gate)
    if len(grads.bias):
        grads.bias.add_(grad_z.sum(0))
    x, dtype = rows.x[part], grads.weight.dtype
    if x.dtype == dtype:
        grads.hidden[part] = torch.mm(grad_z, head.weight).to(grads.hidden.dtype)
        grads.weight.addmm_(grad_z.t(), x, beta=0 if first else 1)
    else:
        small = grad_z.to(x.dtype)
        grads.hidden[part] = _mm(small, head.weight, dtype).to(grads.hidden.dtype)
        grads.weight.add_(_mm(small.t(), x, dtype))


def _grad_copy(rows: Rows, mixture: Mixture, head: Head, copy: Tensor, source_ids: Tensor, y: Tensor) -> Tensor:
    """(B,T,S) the gradient to attention or copy scores, without label smoothing's part."""
    match, dead = _match(source_ids, y), mixture.dead.view(y.shape)[:, :, None]
    w, log_p, log_gate, log_not_gate, lse = (
        v.view(y.shape)[:, :, None]
        for v in (rows.weights, mixture.log_p, mixture.log_gate, mixture.log_not_gate, mixture.lse)
    )
    if rows.everything is None:
        pull = -(w * (1 - head.share) * (log_not_gate - log_p).exp()).masked_fill_(dead, 0)
        return torch.where(match, pull, 0)
    scores = copy - (lse - log_gate)  # less the log of all that is summed, in both branches
    pull = scores.exp() - torch.where(match, (scores - log_p).exp(), 0)
    return pull.mul_(w).masked_fill_(dead | (source_ids < 0)[:, None], 0)
