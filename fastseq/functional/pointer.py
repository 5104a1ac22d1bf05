"""The loss of models that copy: pointer-generators, and CopyNet.

Letters: B batch, T target steps, S source positions, V vocabulary, H hidden. Ids are those of the extended vocabulary:
a word of the batch that the vocabulary lacks has an id from V on. The mathematics, and what -inf, NaN and negative
source ids mean, are written once, in `fastseq.ops.pointer.nll`. What the two functions share:

- Results are natural logarithms (nats), float64 if an argument is, else float32; exact in log space, with no epsilon.
- The output layer is inside. Its logits are made and used up in pieces, and nothing of size B*T*V is kept. In a
  training step the gradients come out of the same pass, the forward one.
- hidden's dtype is that of the matrix products; under autocast, hidden is cast to autocast's. A float32 weight may stay
  float32: it is rounded inside, and its gradient is float32. Other arguments of another dtype are converted.
- ValueError names an argument of a wrong shape, device or value, TypeError one of a wrong type or dtype, and both what
  came and what was wanted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastseq.functional.checks import INTEGERS, WORKING, autocast_dtype, expect, integer, number
from fastseq.ops.pointer import nll as ops

__all__ = ["copynet_nll", "pointer_generator_nll"]

REDUCTIONS = ("none", "sum", "mean")


def pointer_generator_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention: Tensor,
    gate: Tensor,
    source_ids: Tensor,
    target_ids: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss of a pointer-generator, -log p(target), where a word is generated or copied from the source.

    In torch, with `n` words out of the vocabulary and without smoothing::

        p = torch.sigmoid(gate)[..., None]
        final = torch.cat([p * F.linear(hidden, weight, bias).softmax(-1), p.new_zeros(B, T, n)], -1)
        final = final.scatter_add(-1, source_ids[:, None].expand(attention.shape), (1 - p) * attention)
        F.nll_loss(final.log().flatten(0, 1), target_ids.flatten(), ignore_index=ignore_index)

    Args:
        hidden: (B,T,H) input of the output layer.
        weight: (V,H) of the output layer.
        bias: (V,) of the output layer, or None.
        attention: (B,T,S) probabilities of copying from each source position.
        gate: (B,T) the logit of the probability to generate.
        source_ids: (B,S) integers, the source's words; negative where there is none.
        target_ids: (B,T) integers, the words wanted, 0 or more.
        ignore_index: The id of targets that do not count.
        label_smoothing: s in [0,1): the loss is (1 - s) of that above, and s of the mean of -log p(v) over the words v
            of the vocabulary.
        z_loss: Adds z_loss * lse^2 to each target's loss, with lse the logsumexp of its logits; at least 0.
        reduction: "none" (a value a target, 0 where it does not count), "sum", or "mean" over the targets that count;
            the mean over none is 0.

    Returns:
        () the reduced loss in nats, or (B,T) for "none"; +inf where a target can be neither generated nor copied, which
        has no gradient.

    Raises:
        ValueError: A shape, a device, the reduction, label_smoothing, z_loss or (on a CPU) a target id is not as above.
        TypeError: A type or dtype is not as above.

    Source: See, Liu, Manning 2017, section 2.2. z-loss: de Brebisson & Vincent 2016; Chowdhery et al. 2022, section 5.
    """
    label_smoothing, z_loss = number("label_smoothing", label_smoothing), number("z_loss", z_loss)
    for name, value, below in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, float("inf"))):
        if not 0 <= value < below:
            raise ValueError(f"{name}: got {value}, wanted at least 0 and less than {below:g}")
    args = _check(hidden, weight, bias, ("attention", attention), gate, source_ids, target_ids)
    return _reduced(reduction, *args, integer("ignore_index", ignore_index), label_smoothing, z_loss)


def copynet_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy_scores: Tensor,
    source_ids: Tensor,
    target_ids: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The loss of CopyNet, -log p(target), with one softmax over the words and the source positions together.

    In torch, with `n` words out of the vocabulary::

        joint = torch.cat([F.linear(hidden, weight, bias), copy_scores], -1).softmax(-1)
        final = torch.cat([joint[..., :V], joint.new_zeros(B, T, n)], -1)
        final = final.scatter_add(-1, source_ids[:, None].expand(copy_scores.shape), joint[..., V:])
        F.nll_loss(final.log().flatten(0, 1), target_ids.flatten(), ignore_index=ignore_index)

    Args:
        hidden: (B,T,H) input of the output layer.
        weight: (V,H) of the output layer.
        bias: (V,) of the output layer, or None.
        copy_scores: (B,T,S) the logits of copying from each source position; -inf for one that is padding.
        source_ids: (B,S) integers, the source's words; negative where there is none.
        target_ids: (B,T) integers, the words wanted, 0 or more.
        ignore_index: The id of targets that do not count.
        reduction: "none" (a value a target, 0 where it does not count), "sum", or "mean" over the targets that count;
            the mean over none is 0.

    Returns:
        () the reduced loss in nats, or (B,T) for "none"; +inf where a target can be neither generated nor copied, which
        has no gradient.

    Raises:
        ValueError: A shape, a device, the reduction or (on a CPU) a target id is not as above.
        TypeError: A type or dtype is not as above.

    Source: Gu et al. 2016, section 3.2.
    """
    args = _check(hidden, weight, bias, ("copy_scores", copy_scores), None, source_ids, target_ids)
    return _reduced(reduction, *args, integer("ignore_index", ignore_index), 0.0, 0.0)


def _reduced(reduction: str, *args: Any) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")
    if reduction == "none":
        return cast(Tensor, ops.nll(*args))
    weights = None
    if reduction == "mean":  # as weights, so that no gradient is multiplied afterwards; no device is waited for
        counts = args[6] != args[7]
        weights = counts.to(args[3].dtype) / counts.sum().clamp(min=1)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:5]):
        return ops.loss(*args, weights)
    values = ops.nll(*args)
    return cast(Tensor, values.sum() if weights is None else (values * weights).sum())


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: tuple[str, Tensor],
    gate: Tensor | None,
    source_ids: Tensor,
    target_ids: Tensor,
) -> tuple[Tensor | None, ...]:
    """Check what both functions take, and convert what has another dtype: the first seven arguments of the op."""
    if isinstance(hidden, Tensor) and hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, wanted (B, T, H), batch first")
    expect("hidden", hidden, "(B, T, H)", getattr(hidden, "shape", ()), hidden)
    b, t, h = hidden.shape
    name, scores = copy
    s = scores.shape[-1] if isinstance(scores, Tensor) and scores.dim() else -1
    v = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else -1
    if v == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted (V, H) with V at least 1")
    floats = [("weight", weight, "(V, H)", (v, h)), (name, scores, "(B, T, S), batch first,", (b, t, s))]
    floats += [("bias", bias, "(V,)", (v,))] if bias is not None else []
    floats += [("gate", gate, "(B, T), batch first,", (b, t))] if name == "attention" else []  # type: ignore[list-item]
    for each in floats:
        expect(*each, hidden, lead="hidden")
    expect("source_ids", source_ids, "(B, S), batch first,", (b, s), hidden, INTEGERS, lead="hidden")
    expect("target_ids", target_ids, "(B, T), batch first,", (b, t), hidden, INTEGERS, lead="hidden")
    if any(x.dtype == torch.float64 for x in (hidden, *(f[1] for f in floats))):
        hidden = hidden.double()
    elif (dtype := autocast_dtype(hidden)) is not None:
        hidden = hidden.to(dtype)
    result = WORKING[hidden.dtype]
    weight = weight if weight.dtype == hidden.dtype else weight.to(result)
    bias, gate = (None if x is None else x.to(result) for x in (bias, gate))
    return hidden, weight, bias, scores.to(result), gate, source_ids.long(), target_ids.long()
