"""The published loop is the same network, and the command that compares it with fastseq's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastseq import cli
from fastseq.models import PointerGeneratorSummarizer
from fastseq.models.summarizer import ABSENT, IGNORE, PAD, START, STOP, UNK
from fastseq.recipes.checkpoint import save
from fastseq.recipes.summarizer.phases import PHASES, Clock
from fastseq.recipes.summarizer.plain import PlainSummarizer

V = 20


def model(**options: Any) -> PointerGeneratorSummarizer:
    torch.manual_seed(0)
    return PointerGeneratorSummarizer(V, embedding_dim=6, hidden_size=5, **options)


def batch() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([11, 4, 1, 7])
    off = torch.arange(11) >= lengths[:, None]
    extended = torch.randint(4, V + 3, (4, 11)).masked_fill(off, ABSENT)
    targets = torch.cat([extended[:, :1], torch.randint(4, V, (4, 3)), torch.full((4, 1), STOP)], 1)
    targets[1, 2:] = IGNORE
    inputs = torch.cat([torch.full((4, 1), START), targets[:, :-1]], 1)
    return {
        "source_ids": torch.where(extended >= V, UNK, extended).masked_fill(off, PAD),
        "source_extended": extended,
        "source_lengths": lengths,
        "target_inputs": torch.where(inputs >= V, UNK, inputs).masked_fill(inputs < 0, PAD),
        "targets": targets,
    }


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"coverage": False}, {"label_smoothing": 0.1}])
def test_the_published_loop_is_the_same_network(options: dict[str, Any]) -> None:
    ours, b = model(**options).double(), batch()
    plain = PlainSummarizer(ours)
    losses = [module(**b) for module in (ours, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in ("embedding", "reduce_cell", "output", "combine", "gate", "query", "memory_projection"):
        one = ours.get_submodule(name if name in ("embedding", "reduce_cell") else f"decoder.{name}")
        for p, q in zip(one.parameters(), plain.get_submodule(name).parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(ours.decoder.score.grad, plain.score.weight.grad.flatten())  # type: ignore[union-attr]
    assert sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for name, p in ours.named_parameters()
    ) + 2 * 2 * 0 + _second_bias(ours)


def _second_bias(ours: PointerGeneratorSummarizer) -> int:
    return 0
