"""Dropout behind the dense layers of patched encoders: on a CPU with fewer random bits than torch's draws.

torch draws 64 bits for each element on many CPUs, one after another, which costs as much as all else that is done to
the elements. Here an element has 16, as in fastseq's attention: the probability is rounded to a multiple of 2^-16, and
what is kept is scaled by the inverse of the rounded one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FeedForward", "Output", "dropout"]

STEPS = 1 << 16


def dropout(x: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """torch.nn.functional.dropout(x, p) + residual, in training; reproducible by torch.manual_seed.

    Args:
        x: Any shape.
        p: The probability of an element to become 0.
        residual: To add, of a shape that x broadcasts with; None: nothing.
    """
    threshold = int(p * STEPS + 0.5)
    if x.device.type != "cpu" or not 0 < threshold < STEPS:
        dropped = nn.functional.dropout(x, p) if p else x
        return dropped if residual is None else dropped + residual
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    gone = words.view(torch.int16)[: x.numel()].view(x.shape) < threshold - STEPS // 2
    kept, scale = x.masked_fill(gone, 0), STEPS / (STEPS - threshold)
    return kept * scale if residual is None else residual.add(kept, alpha=scale)


class Output(nn.Module):
    """Mixed into BertSelfOutput, BertOutput and DeBERTa's two of the same kind."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """As the class that it is mixed into."""
        layer: Any = self
        p = layer.dropout.p if self.training else 0.0
        return layer.LayerNorm(dropout(layer.dense(hidden_states), p, input_tensor))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Mixed into DistilBERT's FFN."""

    def ff_chunk(self, input: Tensor) -> Tensor:  # noqa: A002
        """As the class that it is mixed into."""
        layer: Any = self
        x: Tensor = layer.lin2(layer.activation(layer.lin1(input)))
        return dropout(x, layer.dropout.p) if self.training else x
