"""The best words on a CPU: torch's matrix product, some rows at a time, and a compiled kernel for each such piece."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.ops.pointer.distribution.eager import products
from fastseq.registry import value_errors

__all__ = ["topk"]


@torch.no_grad()
def topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, attention: Tensor, gate: Tensor, source_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best words of each row; see `fastseq.ops.pointer.distribution`."""
    rows = value_errors(torch.ops.fastseq_cpu.pointer_topk_rows.default)
    begin, found = 0, []
    for (logits,) in products(hidden, weight, k):
        found.append(rows(logits, bias, attention, gate, source_ids, begin, k))
        begin += len(logits)
    values, ids = (torch.cat(parts).view(*gate.shape, k) for parts in zip(*found, strict=True))
    return values, ids
