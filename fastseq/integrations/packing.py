"""Which positions of a padded batch are real, found out once a forward pass, and the way there and back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

__all__ = ["Plan"]


class Plan:
    """How an encoder runs one batch: on its real tokens in one row (1,total,...), or on all positions (B,S,...).

    Packed, the first position of each row is always kept, because heads read it: where the mask is off there, it
    looks at the row's tokens, as it does in the padded model, and none looks at it.

    Attributes:
        shape: (B,S) of the batch.
        indices: (total,) int64, the kept positions among B*S, rising; None where the batch runs on all positions.
        cu_seqlens: (B+1,) int32, where each row begins among the kept; None likewise.
        key_lengths: (B,) int32, how many positions from the left can be looked at; None: all.
        longest: No row is longer.
        right_padded: Each row is its tokens and then padding, or has no token.
        mask: (B,S) bool, the positions that are on; None: all.
        context: Hidden states that a layer's keys and values come from, where it runs on first positions only.
    """

    def __init__(self, shape: tuple[int, int], mask: Tensor | None, packed: bool) -> None:
        """Waits for the device once, for four numbers.

        Args:
            shape: (B,S) of the batch.
            mask: (B,S), not 0 at the tokens; or None.
            packed: Leave padding out.
        """
        self.shape, self.longest = shape, shape[1]
        self.indices: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        self.key_lengths: Tensor | None = None
        self.right_padded, self.mask = True, None
        self.context: Tensor | None = None
        self._hidden_keys: Tensor | None = None
        if mask is None or mask.numel() == 0:
            return
        on = mask != 0
        kept = on.clone()
        kept[:, 0] = True
        counts = kept.sum(1)
        rising = (on[:, 1:] & ~on[:, :-1]).any()
        total, longest, blank, holes = torch.stack((counts.sum(), counts.max(), (~on[:, 0]).any(), rising)).tolist()
        self.right_padded = not holes
        if total == on.numel() and not blank:
            return
        self.mask = on
        if packed:
            self.indices = torch.nonzero_static(kept.flatten(), size=total).flatten()
            self.cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            self.longest = longest
            if blank:
                self._hidden_keys = torch.zeros(shape[0], 1, 1, longest, dtype=torch.bool, device=on.device)
                self._hidden_keys[:, 0, 0, 0] = ~on[:, 0]
        elif self.right_padded:
            self.key_lengths = on.sum(1, dtype=torch.int32)
        else:
            self._hidden_keys = ~on[:, None, None]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(B,1,1,keys) to add to scores, -inf for keys that lengths cannot rule out; None where there are none."""
        if self._hidden_keys is None:
            return None
        zeros = torch.zeros(self._hidden_keys.shape, dtype=dtype, device=self._hidden_keys.device)
        return zeros.masked_fill_(self._hidden_keys, float("-inf"))

    def reading(self, context: Tensor) -> Plan:
        """This plan for a layer that runs on the first positions of `context` only, and looks at all of it."""
        plan = copy.copy(self)
        plan.context = context
        return plan

    def first(self, x: Tensor) -> Tensor:
        """The first position of each row: (1,B,...) from (1,total,...), or (B,1,...) from (B,S,...)."""
        return x[:, :1] if self.cu_seqlens is None else x.index_select(1, self.cu_seqlens[:-1])

    def pack(self, x: Tensor) -> Tensor:
        """(1,total,...) from (B,S,...), or `x` itself where the batch runs on all positions."""
        return x if self.indices is None else x.flatten(0, 1).index_select(0, self.indices)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(B,S,...) from (1,total,...), zeros at what was not kept."""
        if self.indices is None:
            return x
        b, s = self.shape
        return x.new_zeros(b * s, *x.shape[2:]).index_copy(0, self.indices, x[0]).view(b, s, *x.shape[2:])
