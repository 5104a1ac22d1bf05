"""The CRF ops in plain torch, on any device: nll and nll_grad here, the others in `log_domain` and `search`.

nll runs in the scaled domain (`scaled`), which also says for which rows it is right; the others, few or none,
are done again in the exact log domain. Expected counts come from these two; observed counts are taken off
both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastseq.ops.crf import log_domain, scaled
from fastseq.ops.crf.log_domain import double_backward, entropy, token_nll
from fastseq.ops.crf.packing import Packing, gather_tags, on_mask, pack
from fastseq.ops.crf.search import nbest, sample, viterbi

__all__ = [
    "double_backward",
    "entropy",
    "nbest",
    "nll",
    "nll_grad",
    "sample",
    "token_nll",
    "viterbi",
]

CHUNK = 1 << 24  # elements of a (B,K,K) temporary in the log domain


@torch.no_grad()
def nll(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
) -> Tensor:
    """The value alone, (B,); see `fastseq.ops.crf`."""
    mask = on_mask(tags, mask)
    packing = pack(emissions.shape[:2], mask, emissions.device)
    rows, *_ = _nll_and_counts(packing, emissions, tags, mask, (transitions, start, end), None)
    return rows.to(start.dtype)


@torch.no_grad()
def nll_grad(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    weights: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """The weighted sum and its gradient; see `fastseq.ops.crf`. A row of weight 0 is left out."""
    mask = on_mask(tags, mask)
    packing = pack(emissions.shape[:2], mask, emissions.device)
    weights = start.new_ones(len(emissions)) if weights is None else weights.to(start.dtype)
    rows, counts, pairs = _nll_and_counts(packing, emissions, tags, mask, (transitions, start, end), weights * scale)
    total = (rows * weights).masked_fill_(weights * scale == 0, 0).sum().mul_(scale).to(start.dtype)
    firsts = counts.index_select(0, packing.index[: packing.alive]).sum(0)
    lasts = counts.index_select(0, packing.index.index_select(0, packing.last)).sum(0)
    x = _laid_out(counts.view(emissions.shape), emissions)
    return total, x, pairs.to(transitions.dtype).contiguous(), firsts, lasts


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient with the dtype and strides of `torch.empty_like(like)`."""
    if gradient.dtype == like.dtype and like.is_contiguous():
        return gradient
    return torch.empty_like(like).copy_(gradient)


Model = tuple[Tensor, Tensor, Tensor]


def _nll_and_counts(
    packing: Packing,
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    model: Model,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B,) in float64; with weights (B,), the expected less the observed counts, (B*T,K) and (K,K)."""
    transitions, start, _ = model
    batch, steps, k = emissions.shape
    counts = start.new_zeros(0 if weights is None else batch * steps, k)
    pairs = torch.zeros_like(transitions, memory_format=torch.contiguous_format)
    if not packing.sizes:
        return start.new_zeros(batch, dtype=torch.float64), counts, pairs
    x = packing.gather(emissions).to(start.dtype)
    with torch.autocast(x.device.type, enabled=False):  # which would multiply matrices in bfloat16
        f = scaled.forward(packing, x, *model)
        if weights is not None:
            packed, pairs = scaled.backward(packing, f, weights)
            counts.index_copy_(0, packing.index, packed)
    if f.wrong is not None:
        _do_again(f, emissions, mask, model, weights, counts, pairs)
    if tags is None:
        return f.log_z, counts, pairs
    dead = f.log_z == -math.inf
    observed = None if weights is None else weights.masked_fill(dead, 0)
    scores = _observe(packing, x, tags, model, observed, counts, pairs)
    return torch.where(dead, math.inf, f.log_z - scores), counts, pairs


def _do_again(
    f: scaled.Forward,
    emissions: Tensor,
    mask: Tensor | None,
    model: Model,
    weights: Tensor | None,
    counts: Tensor,
    pairs: Tensor,
) -> None:
    """Put right log Z and the expected counts of the wrong rows; a row of weight 0 needs no counts."""
    assert f.wrong is not None
    _, steps, k = emissions.shape
    a, s, e = (p.double() for p in model)
    wrong = f.wrong if weights is None else f.wrong & (weights != 0)
    for rows in wrong.nonzero()[:, 0].split(max(1, CHUNK // k**2)):
        if not len(rows):  # the split of nothing is one piece
            return
        packing = pack((len(rows), steps), None if mask is None else mask[rows], emissions.device)
        x = packing.gather(emissions[rows]).double()
        if weights is None:
            f.log_z[rows] = log_domain.log_partition(packing, x, a, s, e)
        else:
            f.log_z[rows], exact, exact_pairs = log_domain.expectations(packing, x, a, s, e, weights[rows].double())
            counts[rows[packing.index // steps] * steps + packing.index % steps] = exact.to(counts.dtype)
            pairs += exact_pairs


def _observe(
    packing: Packing,
    x: Tensor,
    tags: Tensor,
    model: Model,
    weights: Tensor | None,
    counts: Tensor,
    pairs: Tensor,
) -> Tensor:
    """The scores (B,) of the tags, in float64; with weights, their counts are taken off `counts`, `pairs`."""
    transitions, start, end = model
    k, alive = len(start), packing.alive
    tag = gather_tags(packing, tags, k)
    pair = tag.index_select(0, packing.previous) * k + tag[alive:]
    parts = x.gather(1, tag[:, None])[:, 0].double()
    parts[:alive] += start.index_select(0, tag[:alive])
    parts[alive:] += transitions.flatten().index_select(0, pair)
    parts.index_add_(0, packing.last, end.index_select(0, tag.index_select(0, packing.last)).double())
    if weights is not None:
        weight = -weights.index_select(0, packing.row)
        counts.view(-1).index_add_(0, packing.index * k + tag, weight)
        pairs.view(-1).index_add_(0, pair, weight[alive:])
    return packing.sum(parts)
