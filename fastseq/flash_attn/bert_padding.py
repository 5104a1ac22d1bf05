"""From padded batches to packed ones and back, with the functions of flash_attn.bert_padding.

Letters: B rows, S positions, and whatever dimensions follow. All are differentiable as often as wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.functional.checks import INTEGERS, WORKING, can_look, expect, integer, no_autocast

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

MASKS = (torch.bool, *INTEGERS, *WORKING)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002
    """The chosen rows of (n,...), `input[indices]`.

    Args:
        input: (n,...).
        indices: (m,) integers in [0, n).

    Raises:
        ValueError: A shape, a device or (on a CPU) an index is not as above.
        TypeError: A type or dtype is not as above.
    """
    _at_least("input", input, 2)
    _check_indices(indices, input, len(input))
    return input[indices.long()]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros, (first_axis_dim,...), with `values` at `indices`, which are distinct.

    Args:
        values: (m,...).
        indices: (m,) integers in [0, first_axis_dim).
        first_axis_dim: The size of the result's first dimension.

    Raises:
        ValueError: A shape, a device or (on a CPU) an index is not as above.
        TypeError: A type or dtype is not as above.
    """
    _at_least("values", values, 2)
    size = integer("first_axis_dim", first_axis_dim, 0)
    _check_indices(indices, values, size, len(values))
    zeros: Tensor = values.new_zeros(size, *values.shape[1:])
    with no_autocast(values):  # which cannot put float16 together on a CPU
        return zeros.index_copy(0, indices.long(), values)


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
        ValueError: A shape or a device is not as above.
        TypeError: A type or dtype is not as above.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    taken = attention_mask = attention_mask.detach()
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        taken = attention_mask + unused_mask.detach()
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
    attention_mask_in_length = attention_mask_in_length.detach()
    lengths, room = attention_mask_in_length.flatten(), attention_mask_in_length.shape[1]
    if can_look(lengths) and (int(lengths.min()) < 0 or int(attention_mask_in_length.sum(1).max()) > room):
        raise ValueError(
            f"attention_mask_in_length: wanted lengths of at least 0 that add up to {room} at most in a row"
        )
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

    Raises:
        ValueError: A shape, a device or (on a CPU) an index is not as above.
        TypeError: A type or dtype is not as above.
    """
    _at_least("hidden_states", hidden_states, 2)
    batch, seqlen = integer("batch", batch, 0), integer("seqlen", seqlen, 0)
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def _bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """The boundaries of sequences, and the longest length, which waits for a GPU."""
    longest = int(lengths.max()) if len(lengths) else 0
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), longest


def _at_least(name: str, x: Tensor, dimensions: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
    if x.dim() < dimensions:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted at least {dimensions} dimensions")


def _check_indices(indices: Tensor, x: Tensor, most: int, count: int | None = None) -> None:
    size = indices.shape[0] if isinstance(indices, Tensor) and indices.dim() else -1
    expect("indices", indices, "(m,)", (size if count is None else count,), x, INTEGERS, lead="the tokens")
    if can_look(indices) and (int(indices.min()) < 0 or int(indices.max()) >= most):
        raise ValueError(f"indices: got {int(indices.min())} to {int(indices.max())}, wanted 0 to {most - 1}")


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    _at_least("hidden_states", hidden_states, 3)
    expect(name, mask, "(B, S)", tuple(hidden_states.shape[:2]), hidden_states, MASKS, lead="hidden_states")
    if mask.is_meta:
        raise ValueError(f"{name}: got one on the meta device, wanted one with values")
