"""The output distribution of a pointer-generator, and its best words.

Letters: B batch, T target steps, S source positions, V vocabulary, H hidden. The mathematics, and what negative source
ids, logits of -inf and NaN mean, are written once, in `fastseq.ops.pointer.distribution`. Results are float64 if an
argument is, else float32. ValueError names an argument of a wrong shape, device or value, TypeError one of a wrong type
or dtype, and both what came and what was wanted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastseq.functional.checks import INTEGERS, WORKING, at_least_one, expect
from fastseq.ops.pointer import distribution as ops

__all__ = ["pointer_generator_distribution", "pointer_generator_topk"]


def pointer_generator_distribution(
    logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, num_oov: int
) -> Tensor:
    """The mixture of generating and copying over the extended vocabulary; differentiable, and the same in every run.

    In torch::

        p = torch.sigmoid(gate)[..., None]
        final = torch.cat([p * logits.softmax(-1), p.new_zeros(B, T, num_oov)], -1)
        final.scatter_add(-1, source_ids[:, None].expand(attention.shape), (1 - p) * attention)

    Args:
        logits: (B,T,V) scores of the vocabulary's words.
        attention: (B,T,S) probabilities of copying from each source position.
        gate: (B,T) the logit of the probability to generate.
        source_ids: (B,S) integers, the source's words in the extended vocabulary [0,V+num_oov), whose ids from V on are
            the words of this batch that the vocabulary lacks. A negative id is a position that does not exist.
        num_oov: How many of those words there are.

    Returns:
        (B,T,V+num_oov) probabilities.

    Raises:
        ValueError: A shape, a device, num_oov, or (on a CPU) a source id is not as above.
        TypeError: A type or dtype is not as above.

    Source: See, Liu, Manning 2017, equation 9.
    """
    logits, attention, gate, source_ids = _check("logits", "V", logits, attention, gate, source_ids)
    if isinstance(num_oov, bool) or not isinstance(num_oov, int):
        raise TypeError(f"num_oov: got {type(num_oov).__name__}, wanted an int")
    if num_oov < 0:
        raise ValueError(f"num_oov: got {num_oov}, wanted at least 0")
    return cast(Tensor, ops.distribution(logits, attention, gate, source_ids, num_oov))


def pointer_generator_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, attention: Tensor, gate: Tensor, source_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k most probable words of each row, and their log-probabilities: what a beam search asks for.

    Nothing of size B*T*V is kept, nor the distribution written. In torch::

        final = pointer_generator_distribution(F.linear(hidden, weight, bias), attention, gate, source_ids, num_oov)
        log_probs, ids = final.log().topk(k)

    but exact where probabilities underflow. Autocast changes nothing. It has no derivative.

    Args:
        hidden: (B,T,H) input of the output layer.
        weight: (V,H) of the output layer. A float32 weight is taken as it is, also with hidden of a half type.
        bias: (V,) of the output layer, or None.
        attention: (B,T,S) probabilities of copying from each source position.
        gate: (B,T) the logit of the probability to generate.
        source_ids: (B,S) integers, the source's words in the extended vocabulary; negative where there is none.
        k: How many words, 1 to V.

    Returns:
        (B,T,k) log-probabilities in nats, falling, and (B,T,k) int64 ids in the extended vocabulary. Of equally
        probable words the one with the smaller id is first.

    Raises:
        ValueError: A shape, a device or k is not as above.
        TypeError: A type or dtype is not as above.

    Source: See, Liu, Manning 2017, section 2.2.
    """
    at_least_one("k", k)
    hidden, attention, gate, source_ids = _check("hidden", "H", hidden, attention, gate, source_ids, weight, bias)
    size = len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else -1
    expect("weight", weight, "(V, H)", (size, hidden.shape[2]), hidden, lead="hidden")
    if weight.dtype not in (hidden.dtype, gate.dtype):
        weight = weight.to(gate.dtype)
    if bias is not None:
        expect("bias", bias, "(V,)", (size,), hidden, lead="hidden")
        bias = bias.to(gate.dtype)
    return cast(tuple[Tensor, Tensor], ops.topk(hidden, weight, bias, attention, gate, source_ids, k))


def _check(
    name: str, letter: str, lead: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check what both functions take; convert what has another dtype.

    Args:
        name: What the caller calls `lead`.
        letter: Of its last dimension.
        lead: (B,T,V) or (B,T,H).
        attention: (B,T,S) floating point.
        gate: (B,T) floating point.
        source_ids: (B,S) integers.
        others: Arguments that make the results float64 if they are.
    """
    if isinstance(lead, Tensor) and (lead.dim() != 3 or lead.shape[2] == 0):
        got = tuple(lead.shape)
        raise ValueError(f"{name}: got shape {got}, wanted (B, T, {letter}), batch first, with {letter} > 0")
    expect(name, lead, f"(B, T, {letter})", getattr(lead, "shape", ()), lead, lead=name)
    b, t, _ = lead.shape
    s = attention.shape[-1] if isinstance(attention, Tensor) and attention.dim() else -1
    expect("attention", attention, "(B, T, S), batch first,", (b, t, s), lead, lead=name)
    expect("gate", gate, "(B, T), batch first,", (b, t), lead, lead=name)
    expect("source_ids", source_ids, "(B, S), batch first,", (b, s), lead, INTEGERS, lead=name)
    double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in (lead, attention, gate, *others))
    lead = lead.double() if double else lead
    result = WORKING[lead.dtype]
    return lead, attention.to(result), gate.to(result), source_ids.long()
