"""How eager lays its arguments out: heads first, then sequences, padded to the longest, zeros where no position is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.disentangled.reference import sequences
from fastseq.ops.attention.dropout import keep_mask, kept_scale

__all__ = ["Layout", "Part", "result_dtype"]

INF = math.inf
CHUNK_BYTES = 1 << 23  # of one matrix of scores; about five exist at a time

Part = tuple[slice, slice]


class Layout:
    """How the arguments lie here: (H,N,L,D) in R, zeros where no position is; and the way back."""

    def __init__(self, *args: Any) -> None:
        q, _, _, _, _, self.slot_of, cu, lengths, self.seed, longest, self.scale, self.dropout = args
        self.shape, self.packed, device = q.shape, cu is not None, q.device
        if device.type == "cpu":
            longest = max([len(rows) for _, rows in sequences(q, cu, lengths, longest)], default=0)
        self.longest, self.heads_count, self.dtype = longest, q.shape[2], result_dtype(q)
        self.count = len(q) if cu is None else len(cu) - 1
        self.gone: Tensor | None = None
        places = torch.arange(longest, device=device)
        if cu is not None:
            self.gone = places >= (cu[1:] - cu[:-1])[:, None]
            self.index = (cu[:-1, None] + places).masked_fill(self.gone, 0)
        elif lengths is not None:
            self.gone = places >= lengths[:, None]

    def heads(self, x: Tensor) -> Tensor:
        """(H,N,L,D) from (B,S,H,D)."""
        x = x[0][self.index] if self.packed else x[:, : self.longest]
        x = x.permute(2, 0, 1, 3).to(self.dtype).contiguous()
        return x if self.gone is None else x.masked_fill(self.gone[..., None], 0)

    def columns(self, x: Tensor, absent: float) -> Tensor:
        """(H,N,L) from (B,H,S)."""
        x = x[0][:, self.index] if self.packed else x[:, :, : self.longest].transpose(0, 1)
        return x if self.gone is None else x.masked_fill(self.gone, absent)

    def positions(self, x: Tensor) -> Tensor:
        """(B,S,H,D) from (H,N,L,D)."""
        return self._back(x.permute(1, 2, 0, 3), 0.0)

    def rows(self, x: Tensor) -> Tensor:
        """(B,H,S) from (H,N,L)."""
        return self._back(x.permute(1, 2, 0), -INF).transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def _back(self, x: Tensor, absent: float) -> Tensor:
        """(B,S,...) from (N,L,...)."""
        result = x.new_full((*self.shape[:2], *x.shape[2:]), absent)
        if not self.packed:
            gone = None if self.gone is None else self.gone.view(*self.gone.shape, *(1,) * (x.dim() - 2))
            result[:, : self.longest] = x if gone is None else x.masked_fill(gone, absent)
        elif self.gone is not None:
            there = ~self.gone
            result[0, self.index[there]] = x[there]
        return result

    def chunks(self) -> Iterator[Part]:
        """(heads, sequences) whose scores take CHUNK_BYTES, or one head of one sequence."""
        room = max(CHUNK_BYTES // max(8 * self.longest * self.longest, 1), 1)
        heads = max(min(room, self.heads_count), 1)
        some = max(room // heads, 1)
        for n in range(0, self.count if self.longest else 0, some):
            for h in range(0, self.heads_count, heads):
                yield slice(h, h + heads), slice(n, n + some)

    def table(self, table: Tensor | None, *, falling: bool) -> Tensor | None:
        """(H,2L-1,D) the table's row of each distance, rising or falling from one end to the other."""
        if table is None or not self.longest:
            return None
        return table[self._slots(falling)].transpose(0, 1).to(self.dtype)

    def slots(self, table: Tensor | None, to_table: Tensor | None, *, falling: bool) -> Tensor:
        """(P,H,D) the gradient of a table from that of its rows by distance."""
        if table is None:
            return torch.zeros(0, dtype=self.dtype, device=self.slot_of.device)
        result = torch.zeros(table.shape, dtype=self.dtype, device=table.device)
        if to_table is not None:
            result.index_add_(0, self._slots(falling), to_table.transpose(0, 1))
        return result

    def _slots(self, falling: bool) -> Tensor:
        middle = len(self.slot_of) // 2
        slots: Tensor = self.slot_of[middle - self.longest + 1 : middle + self.longest].long()
        return slots.flip(0) if falling else slots

    def kept(self, part: Part) -> Tensor | None:
        """(h,n,L,L) 0, or the inverse of the share that is kept; None without dropout."""
        if not self.dropout:
            return None
        numbers = torch.arange(self.count * self.heads_count, device=self.slot_of.device)
        numbers = numbers.view(self.count, self.heads_count).t()[part]
        places = torch.arange(self.longest, device=self.slot_of.device)
        kept = keep_mask(self.seed, numbers, places, self.longest, self.dropout)
        return kept.to(self.dtype).mul_(kept_scale(self.dropout))


def result_dtype(x: Tensor) -> torch.dtype:
    """R of the contract."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
