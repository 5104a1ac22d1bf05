"""The CRF sums in the float64 log domain: right on every input, differentiable any number of times, not fast.

Serves the rows that the scaled domain cannot prove right, double backward, and the ops without a fast form.
The (B,K,K) sums of a step are temporaries; what is kept for a backward pass is O(B T K).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.crf.packing import Packing, gather_tags, on_mask, pack
from fastseq.ops.derivatives import pull_back

__all__ = ["alphas", "double_backward", "entropy", "expectations", "log_partition", "token_nll"]

Function = Callable[..., Tensor]


class _Recomputed(torch.autograd.Function):
    """function(*inputs), of which only the inputs are kept; differentiable as often as the function is."""

    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *pull_back(ctx.function, ctx.saved_tensors, grad)


def _recomputed(function: Function, *inputs: Tensor) -> Tensor:
    out: Tensor = _Recomputed.apply(function, *inputs)  # type: ignore[no-untyped-call]
    return out


def safe_lse(values: Tensor, dim: int) -> Tensor:
    """logsumexp; where every value is -inf its gradient is 0, not NaN; NaN and +inf give NaN."""
    top = values.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    total = (values - top).exp().sum(dim)
    dead = total == 0
    return total.masked_fill(dead, 1).log().masked_fill(dead, -math.inf) + top.squeeze(dim)


def _matmul(v: Tensor, matrix: Tensor) -> Tensor:
    """(B,K), (K,K) -> (B,K): out_j = log sum_i exp(v_i + matrix_ij)."""
    return safe_lse(v[:, :, None] + matrix, 1)


def alphas(packing: Packing, x: Tensor, transitions: Tensor, start: Tensor) -> list[Tensor]:
    """(N,K), (K,K), (K,) -> one (B_t,K) a step: the log of the sum over prefixes that end in each tag."""
    steps = packing.steps(x)
    out = [start + steps[0]]
    for emission in steps[1:]:
        out.append(_recomputed(_matmul, out[-1][: len(emission)], transitions) + emission)
    return out


def betas(packing: Packing, x: Tensor, transitions: Tensor, end: Tensor) -> list[Tensor]:
    """(N,K), (K,K), (K,) -> one (B_t,K) a step: the log of the sum over suffixes, with the end."""
    steps, transposed = packing.steps(x), transitions.t()
    out = [end.expand_as(steps[-1])]
    for t in range(len(steps) - 1, 0, -1):
        going_on = _recomputed(_matmul, steps[t] + out[-1], transposed)
        out.append(torch.cat([going_on, end.expand(len(steps[t - 1]) - len(going_on), -1)]))
    return out[::-1]


def log_partition(packing: Packing, x: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """(N,K), ... -> (B,) in the order of the batch: 0 for empty rows."""
    out = x.new_zeros(packing.shape[0])
    if not packing.sizes:
        return out
    last = torch.cat(alphas(packing, x, transitions, start)).index_select(0, packing.last)
    return out.index_copy(0, packing.order[: packing.sizes[0]], safe_lse(last + end, 1))


def expectations(
    packing: Packing, x: Tensor, transitions: Tensor, start: Tensor, end: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-partition (B,), and expected counts of tags (N,K) and transitions (K,K), times each row's weight.

    Every posterior is normalised by its own sum, so that no rounding grows with T.
    """
    with torch.no_grad():
        log_z = log_partition(packing, x, transitions, start, end)
        a, b = alphas(packing, x, transitions, start), betas(packing, x, transitions, end)
        row_weights = weights.index_select(0, packing.row)
        counts = torch.cat(a) + torch.cat(b)
        counts = (counts - safe_lse(counts, 1).clamp(min=-1e300)[:, None]).exp() * row_weights[:, None]
        pairs = torch.zeros_like(transitions)
        by_step = packing.steps(row_weights)
        for t, emission in enumerate(packing.steps(x)[1:], 1):
            joint = a[t - 1][: len(emission), :, None] + transitions + (emission + b[t])[:, None, :]
            norm = safe_lse(joint.flatten(1), 1).clamp(min=-1e300)
            pairs += (joint.sub_(norm[:, None, None]).exp_() * by_step[t][:, None, None]).sum(0)
        poisoned = log_z.isnan().index_select(0, packing.row)
        return log_z, counts.masked_fill(poisoned[:, None], math.nan), pairs


def _prepared(
    emissions: Tensor, tags: Tensor | None, mask: Tensor | None, *model: Tensor
) -> tuple[Packing, Tensor, tuple[Tensor, ...]]:
    """The packing, the packed emissions, and the parameters, in float64."""
    packing = pack(emissions.shape[:2], on_mask(tags, mask), emissions.device)
    return packing, packing.gather(emissions).double(), tuple(p.double() for p in model)


def _edge_scores(packing: Packing, tag: Tensor, transitions: Tensor, start: Tensor) -> Tensor:
    """(N,) the score of coming to each packed tag: from the one before, or from the start."""
    alive = packing.alive
    return torch.cat([start[tag[:alive]], transitions[tag[packing.previous], tag[alive:]]])


def token_nll(
    emissions: Tensor, tags: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """-log p(y_t | y_<t, x), (B,T); see `fastseq.ops.crf`, the reference for impossible paths."""
    packing, x, (a, s, e) = _prepared(emissions, tags, mask, transitions, start, end)
    if not packing.sizes:
        return packing.scatter(x.sum(1)).to(start.dtype)
    tag = gather_tags(packing, tags, len(start))
    beta = torch.cat(betas(packing, x, a, e))
    behind = beta.gather(1, tag[:, None])[:, 0]
    part = _edge_scores(packing, tag, a, s) + x.gather(1, tag[:, None])[:, 0] + behind
    log_z = safe_lse(s + x[: packing.alive] + beta[: packing.alive], 1)
    whole = torch.cat([log_z, behind[packing.previous]])

    stopped = packing.scatter((part == -math.inf).long()).cumsum(1)
    over = packing.gather(stopped > 0)  # the path became impossible here, or before
    value = whole.masked_fill(over, 0) - part.masked_fill(over, 0)
    ends = over & (part == -math.inf) & packing.gather(stopped == 1)
    nan = torch.zeros_like(packing.lengths, dtype=x.dtype)
    nan[packing.order[: packing.alive]] = torch.where(log_z.isnan(), math.nan, 0.0).to(x)
    value = value.masked_fill(ends, math.inf) + nan.index_select(0, packing.row)
    return packing.scatter(value).to(start.dtype)


def entropy(emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """-sum_y p(y) log p(y), (B,), by the chain rule; see `fastseq.ops.crf`."""
    packing, x, (a, s, e) = _prepared(emissions, None, mask, transitions, start, end)
    out = x.new_zeros(len(emissions))
    if not packing.sizes:
        return (out + x.sum()).to(start.dtype)
    steps = packing.steps(x)
    first = s + steps[0]
    states = [torch.stack([first, torch.zeros_like(first)])]
    for emission in steps[1:]:
        weight, inner = _recomputed(_mix, states[-1][:, : len(emission)], a)
        states.append(torch.stack([weight + emission, inner]))
    last = torch.cat(states, 1).index_select(1, packing.last)
    return out.index_copy(0, packing.order[: packing.alive], _mix(last, e[:, None])[1, :, 0]).to(start.dtype)


def _mix(state: Tensor, matrix: Tensor) -> Tensor:
    """(2,B,K), (K,J) -> (2,B,J): a step of (log weight, entropy): H(i, rest) = H(i) + E H(rest | i)."""
    values = state[0][:, :, None] + matrix
    norm = safe_lse(values, 1)
    log_p = values - norm.masked_fill(norm == -math.inf, 0)[:, None, :]
    inner = state[1][:, :, None] - log_p.masked_fill(log_p == -math.inf, 0)
    return torch.stack([norm, (log_p.exp() * inner).sum(1)])


def double_backward(
    inputs: Sequence[Tensor | None],
    scale: float,
    grad_total: Tensor | None,
    grad_grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of grad_total * total + sum <grad_grads, grads>, of nll_grad(*inputs, scale).

    One for each of the seven inputs (emissions, tags, mask, transitions, start, end, weights), None for tags
    and mask.
    """

    def objective(*leaves: Any) -> Tensor:
        total = _total(leaves, scale)
        value = total.new_zeros(()) if grad_total is None else grad_total * total
        if any(g is not None for g in grad_grads) and total.requires_grad:
            wanted = (leaves[0], *leaves[3:6])
            grads = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
            value = value + sum((g * d).sum() for g, d in zip(grad_grads, grads, strict=True) if g is not None)
        return value

    return pull_back(objective, inputs, None)


def _total(inputs: Sequence[Any], scale: float) -> Tensor:
    """() the weighted sum of nll in float64, differentiable any number of times."""
    emissions, tags, mask, *model, weights = inputs
    packing, x, (a, s, e) = _prepared(emissions, tags, mask, *model)
    rows = log_partition(packing, x, a, s, e)
    if tags is not None:
        tag = gather_tags(packing, tags, len(s))
        score = packing.sum(_edge_scores(packing, tag, a, s) + x.gather(1, tag[:, None])[:, 0])
        score = score.index_add(0, packing.order[: packing.alive], e[tag[packing.last]])
        dead = rows == -math.inf
        rows = (rows.masked_fill(dead, 0) - score.masked_fill(dead, 0)) + torch.where(dead, math.inf, 0.0)
    if weights is None:
        return rows.sum() * scale
    left_out = (weights == 0) & ~rows.isfinite()
    total: Tensor = (rows * weights).masked_fill(left_out, 0).sum() * scale
    return total
