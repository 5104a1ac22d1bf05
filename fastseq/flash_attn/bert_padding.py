"""From padded batches to packed ones and back, with the functions of flash_attn.bert_padding.

Letters: B rows, S positions, and whatever dimensions follow. All are differentiable as often as wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002
    """The chosen rows of (n,...), `input[indices]`.

    Args:
        input: (n,...).
        indices: (m,) int64.
    """
    _at_least("input", input, 2)
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros, (first_axis_dim,...), with `values` at `indices`, which are distinct.

    Args:
        values: (m,...).
        indices: (m,) int64.
        first_axis_dim: The size of the result's first dimension.
    """
    _at_least("values", values, 2)
    zeros: Tensor = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the tokens that a mask shows out of a padded batch.

    Args:
        hidden_states: (B,S,...).
        attention_mask: (B,S) bool or integers, 1 for a token.
        unused_mask: (B,S), 1 for a place that is taken, but unused: it is packed too, but not counted in seqused.

    Returns:
        hidden_states: (total,...) the tokens.
        indices: (total,) int64 where they were among the B*S.
        cu_seqlens: (B+1,) int32 the boundaries of the rows.
        max_seqlen_in_batch: The longest row.
        seqused: (B,) int32 the number of tokens of each row, without the unused.

    Raises:
        ValueError: A shape is not as above.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    taken = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        taken = attention_mask + unused_mask
    indices = taken.flatten().nonzero()[:, 0]
    lengths = taken.sum(1, dtype=torch.int32)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, *_bounds(lengths), attention_mask.sum(1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Take the tokens out of a padded batch whose rows are several sequences each.

    Args:
        hidden_states: (B,S,...).
        attention_mask_in_length: (B,S) integers: each row begins with the lengths of its sequences, which lie one after
            the other from its first position on, and the rest is 0.

    Returns:
        hidden_states: (total,...) the tokens.
        indices: (total,) int64 where they were among the B*S.
        cu_seqlens: (N+1,) int32 the boundaries of the N sequences.
        max_seqlen_in_batch: The longest sequence.

    Raises:
        ValueError: A shape is not as above.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    lengths = attention_mask_in_length.flatten()
    places = torch.arange(attention_mask_in_length.shape[1], device=lengths.device)
    indices = (places < attention_mask_in_length.sum(1, keepdim=True)).flatten().nonzero()[:, 0]
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, *_bounds(lengths[lengths != 0])


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put tokens back to where they were in a padded batch, with zeros elsewhere.

    Args:
        hidden_states: (total,...).
        indices: (total,) int64 from `unpad_input`.
        batch: B.
        seqlen: S.

    Returns:
        (B,S,...).
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def _bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """The boundaries of sequences, and the longest length, which waits for a GPU."""
    longest = int(lengths.max()) if len(lengths) else 0
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), longest


def _at_least(name: str, x: Tensor, dimensions: int) -> None:
    if x.dim() < dimensions:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted at least {dimensions} dimensions")


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    _at_least("hidden_states", hidden_states, 3)
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, wanted (B, S) = {tuple(hidden_states.shape[:2])}")
