"""Linear-chain CRFs without a module.

Letters: B sequences, T positions, K tags; tensors are batch first. The mathematics, and what masks, tags of
-100 and scores of -inf and NaN mean, are written once, in `fastseq.ops.crf`. What these functions share:

- `mask` is bool, or uint8 as for pytorch-crf, or None for all on. A sequence is the positions that are on.
- Results are natural logarithms (nats), float64 if an argument is, else float32. Half emissions are read as
  they are; parameters of another dtype are converted.
- ValueError names an argument of a wrong shape, device or value, TypeError one of a wrong type or dtype, and
  both what came and what was wanted.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fastseq.functional.checks import (
    OFF,
    Model,
    at_least_one,
    check_generator,
    check_model,
    check_tags,
    expect,
    is_partial,
)
from fastseq.ops import crf as ops

REDUCTIONS = ("none", "sum", "mean", "token_mean")


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor | None = None,
    reduction: str = "sum",
    *,
    token_weights: Tensor | None = None,
    tag_weights: Tensor | None = None,
) -> Tensor:
    """The conditional log-likelihood log p(tags | emissions); its negative is the loss.

    In torch, for one row x (T,K) and y (T,)::

        score = start[y[0]] + x[range(T), y].sum() + transitions[y[:-1], y[1:]].sum() + end[y[-1]]
        score - crf_log_partition(x[None], transitions, start, end)

    Args:
        emissions: (B,T,K) scores of each tag.
        tags: (B,T) integers in [0,K), or -100 where the position does not exist. Or (B,T,K) bool, the tags
            allowed at each position (partial labels): the likelihood of the set of paths that they allow.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        mask: (B,T) bool or uint8, on where a position exists; None for all.
        reduction: "none" (one value a row), "sum", "mean" (the sum / B) or "token_mean" (the sum / the number
            of positions that are on, which neither the mask nor a tag of -100 turns off). A mean over nothing
            is 0.
        token_weights: (B,T) weights of the positions, or None. Not for partial labels.
        tag_weights: (K,) weights of the tags, or None. Not for partial labels. With either, a row's value is
            sum_t token_weights[t] * tag_weights[y_t] * log p(y_t | y_1..y_{t-1}, x); the means still count.

    Returns:
        () the reduced log-likelihood in nats, or (B,) for "none". -inf where the tags, or their sets, are
        impossible.

    Raises:
        ValueError: A shape, a device, the reduction, or (on a CPU) a tag id is not as above.
        TypeError: A type or dtype is not as above.

    Source: Lafferty et al. 2001. Partial labels: Tsuboi et al. 2008. Weights: de Lannoy et al. 2012.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")
    model = emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    partial = is_partial(emissions, tags)
    tags = tags if partial else check_tags(emissions, tags)
    if token_weights is not None or tag_weights is not None:
        if partial:
            raise ValueError("token_weights, tag_weights: got bool tags as well, wanted one tag a position")
        rows = _weighted(model, tags, token_weights, tag_weights)
    elif partial:
        rows = _partial(model, tags)
    elif reduction != "none" and _wants_gradient(emissions, transitions, start, end):
        # The value and its gradient in one pass, and the mean with them; except where B may be a symbol,
        # which a float argument of an op would turn into a constant.
        divided = reduction == "mean" and not torch.compiler.is_compiling()
        scale = 1.0 / max(tags.shape[0], 1) if divided else 1.0
        total = ops.log_likelihood(emissions, tags, mask, transitions, start, end, None, scale)
        done = divided or reduction == "sum"
        return total if done else total / _count(tags, mask, reduction, partial)
    else:
        rows = -ops.nll(emissions, tags, mask, transitions, start, end)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / _count(tags, mask, reduction, partial)


def crf_token_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """The log-likelihood split by the chain rule: log p(y_t | y_1..y_{t-1}, x) for each position t.

    Its sum over t is `crf_log_likelihood(..., reduction="none")`.

    Args:
        emissions: (B,T,K) scores of each tag.
        tags: (B,T) integers in [0,K), or -100 where the position does not exist.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        mask: (B,T) bool or uint8, or None.

    Returns:
        (B,T) in nats; 0 where a position is off.

    Raises:
        ValueError: A shape, a device, or (on a CPU) a tag id is not as above.
        TypeError: A type or dtype is not as above.

    Source: the split of the likelihood is that of de Lannoy et al. 2012.
    """
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    return cast(Tensor, -ops.token_nll(emissions, check_tags(emissions, tags), mask, transitions, start, end))


def crf_log_partition(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The log-partition log Z, the logarithm of the sum of exp(score) over all paths.

    In torch, with all positions on::

        a = start + x[:, 0]
        for t in range(1, T):
            a = (a.unsqueeze(2) + transitions).logsumexp(1) + x[:, t]
        (a + end).logsumexp(1)

    Args:
        emissions: (B,T,K) scores of each tag.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        mask: (B,T) bool or uint8, or None.

    Returns:
        (B,) in nats; -inf where no path is possible.

    Raises:
        ValueError: A shape or a device is not as above.
        TypeError: A type or dtype is not as above.

    Source: Sutton & McCallum 2012, section 4.1.
    """
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    return cast(Tensor, ops.nll(emissions, None, mask, transitions, start, end))


def crf_marginals(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The probability p(y_t = k | x) of each tag at each position; differentiable.

    In torch: `torch.autograd.grad(crf_log_partition(x, transitions, start, end).sum(), x)[0]`.

    Args:
        emissions: (B,T,K) scores of each tag.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        mask: (B,T) bool or uint8, or None.

    Returns:
        (B,T,K) probabilities; 0 where a position is off, and in a row in which no path is possible.

    Raises:
        ValueError: A shape or a device is not as above.
        TypeError: A type or dtype is not as above.

    Source: Sutton & McCallum 2012, section 4.1.
    """
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    emissions = emissions.to(transitions.dtype)  # the op's gradient has its input's dtype, and half is too coarse
    return cast(Tensor, ops.nll_grad(emissions, None, mask, transitions, start, end, None, 1.0)[1])


def crf_entropy(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The entropy of a row's paths, -sum_y p(y | x) log p(y | x); differentiable.

    In torch: log Z minus the expected score, which is the sum of each score times the gradient of log Z to
    it.

    Args:
        emissions: (B,T,K) scores of each tag.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        mask: (B,T) bool or uint8, or None.

    Returns:
        (B,) in nats.

    Raises:
        ValueError: A shape or a device is not as above.
        TypeError: A type or dtype is not as above.

    Source: Mann & McCallum 2007.
    """
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    return cast(Tensor, ops.entropy(emissions, mask, transitions, start, end))


def crf_viterbi(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best path of each row, and its score. Tensors only: nothing waits for the device.

    In torch: the loop of `crf_log_partition` with `max` for `logsumexp`, then a walk back through its
    indices.

    Args:
        emissions: (B,T,K) scores of each tag.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        mask: (B,T) bool or uint8, or None.

    Returns:
        (B,T) int64 tags, -100 where a position is off; and (B,) scores in nats, -inf where no path is
        possible.

    Raises:
        ValueError: A shape or a device is not as above.
        TypeError: A type or dtype is not as above.

    Source: Viterbi 1967; Sutton & McCallum 2012, section 4.1.
    """
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    return cast(tuple[Tensor, Tensor], ops.viterbi(emissions, mask, transitions, start, end))


def crf_nbest(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, n: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The n best paths of each row, best first.

    In torch: `crf_viterbi` with `topk(n)` over previous tags and their n best for `max`.

    Args:
        emissions: (B,T,K) scores of each tag.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        n: How many paths, at least 1.
        mask: (B,T) bool or uint8, or None.

    Returns:
        (B,n,T) int64 tags, -100 where a position is off; and (B,n) scores in nats, -inf beyond the paths that
        exist.

    Raises:
        ValueError: n is below 1, or a shape or a device is not as above.
        TypeError: A type or dtype is not as above.

    Source: Seshadri & Sundberg 1994, the parallel list Viterbi algorithm.
    """
    at_least_one("n", n)
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    return cast(tuple[Tensor, Tensor], ops.nbest(emissions, mask, transitions, start, end, n))


def crf_sample(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    num_samples: int,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Exact, independent samples of whole paths from p(y | x).

    In torch: the last tag from `softmax(a_T + end)` with the `a` of `crf_log_partition`, then each one before
    it from `softmax(a_t + transitions[:, next])`.

    Args:
        emissions: (B,T,K) scores of each tag.
        transitions: (K,K) scores from x to.
        start: (K,) scores of the first tag.
        end: (K,) scores of the last tag.
        num_samples: How many paths a row, at least 1.
        mask: (B,T) bool or uint8, or None.
        generator: Source of the randomness, on the emissions' device; None for torch's own.

    Returns:
        (num_samples,B,T) int64 tags, -100 where a position is off.

    Raises:
        ValueError: num_samples is below 1, or a shape or a device is not as above.
        TypeError: A type or dtype is not as above.

    Source: forward filtering, backward sampling; Scott 2002.
    """
    at_least_one("num_samples", num_samples)
    check_generator(generator)
    emissions, mask, transitions, start, end = check_model(emissions, transitions, start, end, mask)
    shape = (num_samples, *emissions.shape[:2])
    uniforms = torch.rand(shape, generator=generator, device=emissions.device, dtype=transitions.dtype)
    return cast(Tensor, ops.sample(uniforms, emissions, mask, transitions, start, end))


def _partial(model: Model, allowed: Tensor) -> Tensor:
    """(B,) log-likelihood of the set of paths through `allowed` (B,T,K): log Z inside the set - log Z."""
    emissions, *others = model
    inside = ops.nll(emissions.masked_fill(~allowed, -math.inf), None, *others)
    # Where the set is empty, log Z may be -inf as well, and -inf - -inf is no answer.
    rows = (inside - ops.nll(emissions, None, *others)).masked_fill(inside == -math.inf, -math.inf)
    return cast(Tensor, rows)


def _weighted(model: Model, tags: Tensor, token_weights: Tensor | None, tag_weights: Tensor | None) -> Tensor:
    """(B,) log-likelihood with weights of positions and tags, through the chain rule."""
    emissions, mask, *parameters = model
    weights: Any = 1.0
    if token_weights is not None:
        expect("token_weights", token_weights, "(B, T)", tags.shape, emissions)
        weights = token_weights.to(parameters[0].dtype)
    nll = ops.token_nll(emissions, tags, mask, *parameters)  # looks at the tag ids before they become indices
    if tag_weights is not None:
        expect("tag_weights", tag_weights, "(K,)", emissions.shape[2:], emissions)
        weights = weights * tag_weights.to(parameters[0].dtype)[tags.clamp(min=0)]
    nll = nll.masked_fill((weights == 0) & nll.isinf(), 0.0)  # an impossible tag of no weight costs nothing
    return cast(Tensor, -(nll * weights).sum(1))


def _wants_gradient(x: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> bool:
    required = x.requires_grad or transitions.requires_grad or start.requires_grad or end.requires_grad
    return required and torch.is_grad_enabled()


def _count(tags: Tensor, mask: Tensor | None, reduction: str, partial: bool) -> Tensor | int:
    """What a mean divides by: the rows, or the positions that are on; at least 1. No device is waited for."""
    if reduction == "mean":
        return max(tags.shape[0], 1)
    if partial:
        return max(tags.shape[0] * tags.shape[1], 1) if mask is None else mask.sum().clamp(min=1)
    on = tags != OFF
    return (on if mask is None else on & mask).sum().clamp(min=1)
