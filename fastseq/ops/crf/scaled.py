"""Forward-backward in the scaled domain, in plain torch, and the proof of which rows it is right for.

The mathematics is in the package docstring. A step forward is mm, mul, mm (a sum), div; a step backward is
mul, mm; all into buffers made beforehand. Everything else is done once for all steps.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastseq.ops.crf.packing import Packing

__all__ = ["Forward", "backward", "forward"]

TINY = 2.0**-90  # an alpha below this, before scaling, may belong to a path that is about to be lost
PRUNED = 62.0  # nats (2^-90): factors below exp(-62) are left out, and answered for afterwards
MARGIN = 30.0  # nats by which all that is left out must be below log Z


@dataclasses.dataclass
class Forward:
    """The scaled forward pass.

    Attributes:
        log_z: (B,) float64, in the order of the batch; without meaning in a row that is not right.
        wrong: (B,) the rows that are not proved right; None if all are.
        x: (N,K) exp(emissions - their maximum at the position).
        alpha: (N,K) scaled to sum 1.
        scale: (N,1) the sums before scaling.
        edges: (K,K) exp(transitions - their maximum).
        last: (B',K) beta at each row's last position: exp(end - its maximum) / z, so that alpha . beta = 1.
    """

    log_z: Tensor
    wrong: Tensor | None
    x: Tensor
    alpha: Tensor
    scale: Tensor
    edges: Tensor
    last: Tensor


def forward(packing: Packing, x: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Forward:
    """(N,K), (K,K), (K,), (K,), of one dtype, N > 0: the scaled forward pass."""
    lowest = torch.finfo(x.dtype).min  # where everything is -inf, for -inf - -inf is NaN
    top = x.amax(1, keepdim=True).clamp_(min=lowest)
    top_a, top_s, top_e = (p.amax().clamp_(min=lowest) for p in (transitions, start, end))
    x, gap_x = _exp(x, top)
    edges, gap_a = _exp(transitions, top_a)
    first, gap_s = _exp(start, top_s)
    last, gap_e = _exp(end, top_e)
    alpha, scale = _recursion(packing, x, edges, first)
    z = alpha.index_select(0, packing.last) @ last

    alive = packing.order[: len(z)]
    tops = (packing.lengths[: len(z)] - 1) * top_a.double() + (top_s.double() + top_e.double())
    peaks = packing.sum(top[:, 0].double()).index_add_(0, alive, tops)  # as if every maximum were on one path
    log_z = packing.sum(scale[:, 0].double().log_()).index_add_(0, alive, z.double().log_()).add_(peaks)

    wrong = ~log_z.isfinite()
    wrong[alive] |= ~(z >= TINY)
    if not bool((alpha * scale).amin() >= TINY):
        wrong[packing.row[_loses_a_path(packing, x, alpha, scale, edges, first)]] = True
    gaps = [gap.amin() for gap in (gap_a, gap_s, gap_e) if gap is not None]
    if gaps or gap_x is not None:
        gap = torch.stack([*gaps, z.new_tensor(math.inf)]).amin().repeat(packing.shape[0])
        if gap_x is not None:
            gap.scatter_reduce_(0, packing.row, gap_x, "amin")
        bound = peaks + packing.row_lengths * math.log(x.shape[1])  # no set of paths sums to more
        wrong |= ~(bound - log_z + MARGIN < gap)
    return Forward(log_z, wrong if bool(wrong.any()) else None, x, alpha, scale, edges, last / z[:, None])


def _exp(values: Tensor, top: Tensor) -> tuple[Tensor, Tensor | None]:
    """exp(values - top) without factors below exp(-PRUNED), and the least gap left out of each row."""
    below = values - top
    if bool(below.amin() >= -PRUNED):
        return below.exp_(), None
    left_out = below < -PRUNED
    gap = torch.where(left_out & (below > -math.inf), -below, math.inf).amin(-1)
    return below.masked_fill_(left_out, -math.inf).exp_(), gap


def _recursion(packing: Packing, x: Tensor, edges: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled alphas (N,K), and their sums (N,1) before scaling."""
    alpha, scale, ones = torch.empty_like(x), x.new_empty(len(x), 1), x.new_ones(x.shape[1], 1)
    x_steps, alphas, scales = packing.steps(x), packing.steps(alpha), packing.steps(scale)
    previous = torch.mul(first, x_steps[0], out=alphas[0])
    previous.div_(torch.mm(previous, ones, out=scales[0]))
    sizes = packing.sizes  # len() of a tensor takes as long as a small product
    for t in range(1, len(sizes)):
        now, total = alphas[t], scales[t]
        torch.mm(previous[: sizes[t]] if sizes[t] < sizes[t - 1] else previous, edges, out=now)
        now.mul_(x_steps[t])
        torch.mm(now, ones, out=total)  # a sum, sooner than torch.sum
        previous = now.div_(total)
    return alpha, scale


def _loses_a_path(packing: Packing, x: Tensor, alpha: Tensor, scale: Tensor, edges: Tensor, first: Tensor) -> Tensor:
    """(N,) whether some tag there is reached over nonzero factors, and is tiny."""
    reached = torch.empty_like(alpha)
    reached[: packing.alive] = first
    reached[packing.alive :] = (alpha > 0).to(x).index_select(0, packing.previous) @ (edges > 0).to(x)
    return ((reached > 0) & (x > 0) & (alpha * scale < TINY)).any(1)


def backward(packing: Packing, f: Forward, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Expected counts of tags (N,K) and transitions (K,K), times each row's weight (B,); 0 in rows not right.

    beta is scaled so that alpha . beta = 1. Rounding makes that drift with T, so each posterior is divided by
    its sum. Tags that nothing reaches are left out: there beta has no bound. Uses up f.x and f.alpha.
    """
    alpha, last = f.alpha, f.last
    x = f.x.div_(f.scale)
    x.masked_fill_(alpha == 0, 0)
    if f.wrong is not None:
        out = f.wrong.index_select(0, packing.row)[:, None]
        x.masked_fill_(out, 0)
        alpha.masked_fill_(out, 0)
        last = last.masked_fill(f.wrong.index_select(0, packing.order[: len(last)])[:, None], 0)

    ahead, beta, transposed = torch.zeros_like(x), torch.empty_like(x), f.edges.t()
    beta.index_copy_(0, packing.last, last)
    x_steps, aheads, betas = packing.steps(x), packing.steps(ahead), packing.steps(beta)
    sizes = packing.sizes
    for t in range(len(sizes) - 1, 0, -1):
        place, result = aheads[t - 1], betas[t - 1]
        if sizes[t] < sizes[t - 1]:
            place, result = place[: sizes[t]], result[: sizes[t]]
        torch.mul(x_steps[t], betas[t], out=place)
        torch.mm(place, transposed, out=result)

    counts = beta.mul_(alpha)
    sums = counts.sum(1)
    factor = weights.index_select(0, packing.row).div_(sums)
    if f.wrong is not None:
        factor.masked_fill_(sums == 0, 0)
    pairs = alpha.mul_(factor[:, None]).t() @ ahead
    return counts.mul_(factor[:, None]), pairs.mul_(f.edges)
