"""The truth of the pointer-generator benchmarks: the definition, in float64 log space, by torch and autograd alone.

It shares no code with fastseq. The recurrence is a loop over the steps; the vocabulary is done for all steps at once.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LossInputs", "log_likelihood", "loss_and_gradients", "make_loss_inputs"]

HIDDEN = 256
OUT_OF_VOCABULARY = 50  # words of a batch
COPIED = 0.4  # of the targets: words of the source


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """One loss: hidden (B,T,H), weight (V,H), bias (V,), attention (B,T,S), gate (B,T), ids (B,S) and (B,T)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    attention: Tensor
    gate: Tensor
    source_ids: Tensor
    target_ids: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of what has a gradient, by name."""
        names = ("hidden", "weight", "bias", "attention", "gate")
        return {name: getattr(self, name).detach().to(dtype).clone().requires_grad_() for name in names}


def make_loss_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> LossInputs:
    """B, S, T, V: normal scores, ids by Zipf's law, sources of S/2 to S words; no target is padding."""
    B, S, T, V = shape
    g = torch.Generator().manual_seed(seed)
    source, target, lengths = make_ids(shape, g)
    scores = torch.randn(B, T, S, generator=g).masked_fill(torch.arange(S) >= lengths[:, None, None], -torch.inf)
    tensors = (
        torch.randn(B, T, HIDDEN, generator=g),
        torch.randn(V, HIDDEN, generator=g) / HIDDEN**0.5,
        torch.randn(V, generator=g) * 0.1,
        scores.softmax(-1),
        torch.randn(B, T, generator=g),
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    floats = [t.to(device, dtype if i == 0 else wide) for i, t in enumerate(tensors)]
    return LossInputs(*floats, source.to(device), target.to(device))


def make_ids(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids (B,S), target ids (B,T) and the sources' lengths (B,); padding of a source is -1."""
    B, S, T, V = shape
    lengths = torch.randint(max(S // 2, 1), S + 1, (B,), generator=g)
    lengths[0] = S
    source = (V ** torch.rand(B, S, generator=g)).long().clamp(1, V - 1)
    unknown = torch.rand(B, S, generator=g) < 0.05
    source = torch.where(unknown, V + torch.randint(OUT_OF_VOCABULARY, (B, S), generator=g), source)
    places = (torch.rand(B, T, generator=g) * lengths[:, None]).long()
    common = (V ** torch.rand(B, T, generator=g)).long().clamp(1, V - 1)
    target = torch.where(torch.rand(B, T, generator=g) < COPIED, source.gather(1, places), common)
    return source.masked_fill(torch.arange(S) >= lengths[:, None], -1), target, lengths


def log_likelihood(
    hidden: Tensor, weight: Tensor, bias: Tensor, attention: Tensor, gate: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    """The log-probability (B,T) of each target: log space, all steps at once, no epsilon."""
    known = target < weight.shape[0]
    logits = F.linear(hidden, weight, bias)
    generate = -F.cross_entropy(logits.flatten(0, 1), target.where(known, 0).flatten(), reduction="none").view_as(gate)
    generate = (F.logsigmoid(gate) + generate).masked_fill(~known, -torch.inf)
    mass = (attention * (source[:, None, :] == target[:, :, None])).sum(-1)
    there = mass > 0
    copy = (F.logsigmoid(-gate) + mass.where(there, 1).log()).masked_fill(~there, -torch.inf)
    return torch.logaddexp(generate, copy)


def loss_and_gradients(inputs: LossInputs) -> dict[str, Tensor]:
    """The mean negative log-likelihood, and its gradients, in float64."""
    leaves = inputs.leaves(torch.float64)
    loss = -log_likelihood(*leaves.values(), inputs.source_ids, inputs.target_ids).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
