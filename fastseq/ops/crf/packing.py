"""The positions that are on, packed time-major: what the eager backend loops over, instead of masked steps.

Rows are sorted by length, longest first, and moved to the left; step t is then the first `sizes[t]` rows, and
all steps lie one after another in tensors of N = sum of lengths rows. Any mask, no `torch.where` in a loop,
no work on padding.

    row lengths 3, 2, 1:   step 0 | step 1 | step 2         sizes 3, 2, 1       N = 6
                    row    0 1 2  | 0 1    | 0

A *rank* is a row's number in that order; B' is the number of rows that are not empty.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["OFF", "Packing", "gather_tags", "left_align", "on_mask", "pack"]

OFF = -100


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each packed element comes from; see the module docstring.

    Attributes:
        shape: (B, T).
        order: (B,) the row of the batch at each rank, longest first.
        lengths: (B,) the lengths in that order.
        source: (T,B) the flat position b*T + t of step t of each rank, positions that are off last.
        valid: (T,B) whether that rank has a step t; None if every rank has them all.
        sizes: The number of rows of each step, without the steps that have none.
    """

    shape: tuple[int, int]
    order: Tensor
    lengths: Tensor
    source: Tensor
    valid: Tensor | None
    sizes: list[int]

    @property
    def alive(self) -> int:
        """B', the number of rows that are not empty."""
        return self.sizes[0] if self.sizes else 0

    @functools.cached_property
    def index(self) -> Tensor:
        """(N,) the flat position b*T + t of each element."""
        return self._packed(self.source)

    @functools.cached_property
    def row(self) -> Tensor:
        """(N,) the row of the batch of each element."""
        return self._packed(self.order.expand(self.source.shape))

    @functools.cached_property
    def slots(self) -> Tensor:
        """(T,B) the place in packed tensors of each valid (step, rank)."""
        if self.valid is None:
            return torch.arange(self.source.numel(), device=self.order.device).view_as(self.source)
        return (self.valid.flatten().cumsum(0) - 1).view_as(self.source)

    @functools.cached_property
    def previous(self) -> Tensor:
        """(N - B',) the place in packed tensors of the step before, for each element after step 0."""
        if self.valid is None:
            return self.slots[:-1].flatten()
        return self.slots[:-1][self.valid[1:]]

    @functools.cached_property
    def last(self) -> Tensor:
        """(B',) the place in packed tensors of the last step of each rank that is not empty."""
        steps = self.lengths[: self.alive] - 1
        return self.slots[: len(self.sizes), : self.alive].gather(0, steps[None])[0]

    @functools.cached_property
    def row_lengths(self) -> Tensor:
        """(B,) the lengths in the order of the batch."""
        return torch.empty_like(self.lengths).index_copy_(0, self.order, self.lengths)

    def _packed(self, values: Tensor) -> Tensor:
        """(T,B) -> (N,)."""
        return values.reshape(-1) if self.valid is None else values[self.valid]

    def gather(self, values: Tensor) -> Tensor:
        """(B,T,...) -> (N,...)."""
        return values.flatten(0, 1).index_select(0, self.index)

    def scatter(self, packed: Tensor) -> Tensor:
        """(N,...) -> (B,T,...), 0 where off."""
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return flat.index_copy(0, self.index, packed).view(*self.shape, *packed.shape[1:])

    def sum(self, packed: Tensor) -> Tensor:
        """(N,) -> (B,): the sum over each row of the batch."""
        return packed.new_zeros(self.shape[0]).index_add(0, self.row, packed)

    def steps(self, packed: Tensor) -> Sequence[Tensor]:
        """The steps of a packed tensor, as views."""
        views: Sequence[Tensor] = packed.split(self.sizes)
        return views


def pack(shape: torch.Size | tuple[int, ...], mask: Tensor | None, device: torch.device) -> Packing:
    """Plan the packing of a (B,T) mask; None is all on. Reads the lengths on the host."""
    batch, steps = shape
    if mask is None:
        order = torch.arange(batch, device=device)
        source = torch.arange(batch * steps, device=device).view(batch, steps).t()
        return Packing(
            (batch, steps), order, torch.full_like(order, steps), source, None, [batch] * steps * bool(batch)
        )
    places, row_lengths = left_align(mask)
    lengths, order = row_lengths.sort(descending=True, stable=True)
    source = places.add_(torch.arange(batch, device=device)[:, None] * steps).index_select(0, order).t()
    valid = torch.arange(steps, device=device)[:, None] < lengths
    return Packing((batch, steps), order, lengths, source, valid, [size for size in valid.sum(1).tolist() if size])


def left_align(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B,T) -> (B,T) the positions of each row, those on first, in order; (B,) how many those are."""
    return (~mask).sort(dim=1, stable=True).indices, mask.sum(1)


def on_mask(tags: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B,T) the positions that exist: on in `mask`, and not -100 in `tags`; None if that is all of them."""
    if tags is None:
        return mask
    on = tags != OFF
    if mask is not None:
        return on & mask
    return None if bool(on.all()) else on


def gather_tags(packing: Packing, tags: Tensor, tag_count: int) -> Tensor:
    """(B,T) -> (N,) int64.

    Raises:
        ValueError: One is not in [0, tag_count); looked for on a CPU only, elsewhere that would be a host
        sync.
    """
    packed = packing.gather(tags).long()
    if tags.device.type == "cpu" and len(packed):
        least, greatest = (int(v) for v in packed.aminmax())
        if least < 0 or greatest >= tag_count:
            wrong = least if least < 0 else greatest
            raise ValueError(f"tags: got the id {wrong}, wanted 0 to {tag_count - 1}, or {OFF} for no position")
    return packed
