"""Viterbi, n-best (no host sync) and sampling, in plain torch: loops over T, vectorised over the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastseq.ops.crf import log_domain
from fastseq.ops.crf.packing import OFF, left_align, pack

__all__ = ["nbest", "sample", "viterbi"]


def _aligned(emissions: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """(T,B,K) the rows moved to the left, time-major; (B,T) where each step comes from; (B,) lengths."""
    batch, steps, _ = emissions.shape
    if mask is None:
        lengths = torch.full((batch,), steps, device=emissions.device)
        return emissions.transpose(0, 1).to(dtype).contiguous(), None, lengths
    places, lengths = left_align(mask)
    rows = torch.arange(batch, device=mask.device)
    return emissions[rows, places.t()].to(dtype), places, lengths


def _placed(path: Tensor, places: Tensor | None) -> Tensor:
    """(..., T) in step order -> the same at the positions they came from."""
    path = path.contiguous()
    return path if places is None else torch.empty_like(path).scatter_(-1, places.expand_as(path), path)


@torch.no_grad()
def viterbi(
    emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The best path and its score; see `fastseq.ops.crf`.

    Only scores are kept; the best previous tag is found again along the path: fl(max_i(s_i + A_ij) + x_j),
    which the loop computes, is max_i fl(fl(s_i + A_ij) + x_j), which the rule for ties is about.
    """
    x, places, lengths = _aligned(emissions, mask, start.dtype)
    steps, batch, k = x.shape
    path = torch.full((steps, batch), OFF, device=x.device)
    if steps == 0:
        return path.t().contiguous(), start.new_zeros(batch)
    transposed = transitions.t().contiguous()
    scores, sums = torch.empty_like(x), x.new_empty(batch, k, k)
    torch.add(start, x[0], out=scores[0])
    for before, now, emission in zip(scores[:-1], scores[1:], x[1:], strict=True):
        torch.add(before[:, None, :], transposed, out=sums)  # (row, to, from)
        torch.amax(sums, 2, out=now)
        now.add_(emission)

    final = lengths.clamp(min=1) - 1
    best, last = (_at(scores, final) + end).max(1)
    tag = last
    for t in range(steps - 1, -1, -1):
        if t < steps - 1:
            step = scores[t] + transposed.index_select(0, tag)
            step += x[t + 1].gather(1, tag[:, None])
            tag = torch.where(final == t, last, step.argmax(1))
        path[t] = tag
    path, best = _finished(path.t(), best, x, lengths)
    return _placed(path, places), best


def _at(steps: Tensor, final: Tensor) -> Tensor:
    """(T,B,...), (B,) -> (B,...): the step `final` of each row."""
    return steps[final, torch.arange(len(final), device=final.device)]


def _finished(path: Tensor, score: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B,...,T), (B,...): tags of -100 past the end, NaN scores where emissions (T,B,K) have NaN or +inf."""
    batch, steps = len(lengths), path.shape[-1]
    ones = (1,) * (path.dim() - 2)
    on = torch.arange(steps, device=x.device) < lengths.view(batch, *ones, 1)
    poisoned = ((x.amax(2) < math.inf).logical_not_().t() & on.view(batch, steps)).any(1).view(batch, *ones)
    empty = (lengths == 0).view(batch, *ones)
    return path.masked_fill(~on, OFF), score.masked_fill(poisoned, math.nan).masked_fill(empty, 0)


@torch.no_grad()
def nbest(
    emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n best paths and their scores; see `fastseq.ops.crf`, and the reference for ties.

    kept[t] is (B,K,n): for each tag, the scores of the n best prefixes that end in it, best first. A
    candidate is numbered i*n + r, for the r-th best that ends in i, and the sort is stable: that is the rule
    for ties.
    """
    x, places, lengths = _aligned(emissions, mask, start.dtype)
    steps, batch, k = x.shape
    kept = x.new_full((steps, batch, k, n), -math.inf)
    came_from = torch.zeros(steps, batch, k * n, dtype=torch.int64, device=x.device)
    if steps == 0:
        none = x.new_full((batch, n), -math.inf)
        return came_from.new_empty(batch, n, 0), none.index_fill_(1, came_from.new_zeros(min(n, 1)), 0)
    kept[0, :, :, 0] = start + x[0]
    for t in range(1, steps):
        sums = kept[t - 1][:, None] + transitions.t()[:, :, None]  # (row, to, from, place)
        sums += x[t][:, :, None, None]
        kept[t], chosen = _best(sums.flatten(2), n)
        came_from[t] = chosen.flatten(1)

    final = lengths.clamp(min=1) - 1
    scores, last = _best((_at(kept, final) + end[:, None]).flatten(1), n)
    path = torch.empty(steps, batch, n, dtype=torch.int64, device=x.device)
    now = last
    for t in range(steps - 1, -1, -1):
        if t < steps - 1:
            now = torch.where((final == t)[:, None], last, came_from[t + 1].gather(1, now))
        path[t] = now // n
    paths, scores = _finished(path.permute(1, 2, 0), scores, x, lengths)
    scores[:, 1:].masked_fill_((lengths == 0)[:, None], -math.inf)  # an empty row has one path
    paths = paths.masked_fill(~(scores > -math.inf)[:, :, None], OFF)
    return _placed(paths, None if places is None else places[:, None, :]), scores


def _best(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(..., M) -> (..., n) the greatest scores, and which they are; equal ones in order."""
    values, which = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :n], which[..., :n]


@torch.no_grad()
def sample(
    uniforms: Tensor, emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Exact samples by inverse CDF, last tag first, in the float64 log domain; see `fastseq.ops.crf`."""
    packing = pack(emissions.shape[:2], mask, emissions.device)
    out = torch.full((len(uniforms), packing.row_lengths.numel() * emissions.shape[1]), OFF, device=emissions.device)
    if packing.sizes:
        transitions, start, end = transitions.double(), start.double(), end.double()
        alpha = log_domain.alphas(packing, packing.gather(emissions).double(), transitions, start)
        drawn = _draw_backwards(uniforms.flatten(1).index_select(1, packing.index).double(), alpha, transitions, end)
        possible = log_domain.safe_lse(torch.cat(alpha)[packing.last] + end, 1) > -math.inf  # NaN is not
        rows = torch.zeros_like(packing.order, dtype=torch.bool).index_copy_(
            0, packing.order[: packing.alive], possible
        )
        out.index_copy_(1, packing.index, drawn.masked_fill_(~rows[packing.row], OFF))
    return out.view(uniforms.shape)


def _draw_backwards(uniforms: Tensor, alpha: list[Tensor], transitions: Tensor, end: Tensor) -> Tensor:
    """(n,N) uniforms, the log alphas of each step (B_t,K) -> (n,N) tags."""
    by_step, transposed = uniforms.split([len(a) for a in alpha], 1), transitions.t()
    drawn: list[Tensor] = []
    for a, uniform in zip(reversed(alpha), reversed(by_step), strict=True):
        going_on = drawn[-1].shape[1] if drawn else 0
        ahead = end.expand(len(uniforms), len(a) - going_on, -1)
        if drawn:
            ahead = torch.cat([transposed[drawn[-1]], ahead], 1)
        logits = a + ahead
        cumulative = (logits - logits.amax(2, keepdim=True)).exp_().cumsum(2)
        total = cumulative[:, :, -1:]
        below = (cumulative <= uniform[:, :, None] * total).sum(2)
        drawn.append(torch.minimum(below, (cumulative < total).sum(2)))  # even for a uniform of 1
    return torch.cat(drawn[::-1], 1)
