"""Disentangled attention, as in DeBERTa, and its map from distances to position slots.

Letters: B rows, S positions, H heads, D head size, P position slots. The mathematics, and what NaN and -inf mean, are
written once, in `fastseq.ops.attention.disentangled`. Nothing of size B*H*S*S is kept for the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from fastseq.functional.attention_arguments import check_dropout, draw_seed, under_autocast
from fastseq.functional.checks import (
    INTEGERS,
    WORKING,
    autocast_dtype,
    boundaries,
    check_generator,
    expect,
    integer,
    longest,
    number,
)
from fastseq.ops.attention import disentangled as ops

__all__ = ["disentangled_attention", "relative_slots"]

SHORTEST = 128  # maps are made for lengths of a power of two, from this on


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    *,
    slots: Tensor | None = None,
    position_buckets: int = -1,
    max_position: int | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Self-attention whose scores depend on relative positions by content-to-position and position-to-content terms.

    In torch, for one row and head, without dropout::

        slot = slots[torch.arange(S)[:, None] - torch.arange(S) + len(slots) // 2]
        scores = q @ k.T + (q @ pos_key.T).gather(1, slot) + (k @ pos_query.T).gather(1, slot.T).T
        (softmax_scale * scores).softmax(1) @ v

    Args:
        q: (B,S,H,D) queries, or (total,H,D) with cu_seqlens.
        k: Keys, of the same shape.
        v: Values, of the same shape.
        pos_key: (P,H,D) what a query meets at each slot (the c2p term), or None.
        pos_query: (P,H,D) what a key meets at each slot (the p2c term), or None.
        slots: (2M-1,) integers, M at least the longest sequence: slots[d + M - 1] is the slot of distance d = i - j.
            Slots are at least 0, less than P, and never fall as d grows.
        position_buckets: In place of `slots`, with max_position: see `relative_slots`.
        max_position: In place of `slots`: see `relative_slots`.
        lengths: (B,) integers: each row's first positions are real; those after them are not read, and have out 0.
        cu_seqlens: (N+1,) integers: the boundaries of N packed sequences.
        max_seqlen: The longest packed sequence, or more; by default it is found out, which waits for a GPU.
        softmax_scale: The scores' factor; by default (D times the number of terms) to the power of -1/2.
        dropout_p: The probability of an attention weight to be dropped, in steps of 2^-16.
        generator: Where the dropout's seed comes from; by default torch's.

    Returns:
        The attention's output, of the shape and dtype of q.

    Raises:
        ValueError: A shape, a device or a value is not as above.
        TypeError: A type or dtype is not as above.

    Source: He et al. 2021 (DeBERTa, arXiv 2006.03654), section 3.1.
    """
    _check(q, k, v, pos_key, pos_query)
    q, k, v, pos_key, pos_query = under_autocast(q, k, v, pos_key, pos_query)
    dense = cu_seqlens is None
    if q.dim() != (4 if dense else 3):
        wanted = "(B, S, H, D)" if dense else "(total, H, D), with cu_seqlens"
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted {wanted}")
    lengths, cu_seqlens = _check_lengths(q, lengths, cu_seqlens)
    most = q.shape[1] if cu_seqlens is None else longest("max_seqlen", cu_seqlens, max_seqlen)
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    if terms == 1:
        slots = torch.zeros(max(2 * most - 1, 1), dtype=torch.int32, device=q.device)
    else:
        slots = _check_slots(q, pos_key, pos_query, slots, most, position_buckets, max_position)
    check_generator(generator)
    dropout = check_dropout(dropout_p)
    seed = draw_seed(dropout, q, generator)
    scale = (q.shape[-1] * terms) ** -0.5 if softmax_scale is None else number("softmax_scale", softmax_scale)
    q, k, v = (x if dense else x[None] for x in (q, k, v))
    args = q, k, v, pos_key, pos_query, slots, cu_seqlens, lengths, seed, most, scale, dropout
    out = cast(Tensor, ops.attend(*args)[0])
    return out if dense else out[0]


def relative_slots(
    length: int, *, position_buckets: int, max_position: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, int]:
    """The slots of relative positions as DeBERTa-v2 and v3 have them: by logarithm far out, if they have buckets.

    With s = position_buckets, or max_position where there are none (position_buckets < 1)::

        d = torch.arange(1 - M, M)
        d = make_log_bucket_position(d, position_buckets, max_position)  # of transformers, if there are buckets
        slots = (d + s).clamp(0, 2 * s - 1)

    Computed on the CPU, in the same float32 arithmetic as transformers, and kept.

    Args:
        length: The longest sequence, or more.
        position_buckets: Distances below half of it have a slot each; the others share the other half.
        max_position: The distance that has the last slot; without buckets, the number of distances to each side.
        device: Where the slots are wanted.

    Returns:
        (2M-1,) int32 the slot of each distance from 1 - M to M - 1, for an M of at least `length`; and P = 2s, the
        number of slots.

    Raises:
        ValueError: A number is not as above.

    Source: He, Gao, Chen 2023 (DeBERTaV3, arXiv 2111.09543); the function is that of the authors' code.
    """
    length, position_buckets = integer("length", length, 0), integer("position_buckets", position_buckets)
    max_position, device = integer("max_position", max_position), _device(device)
    if position_buckets == 1:
        raise ValueError("position_buckets: got 1, wanted at least 2, or less than 1 for none")
    least = 1 if position_buckets < 1 else position_buckets // 2 + 2
    if max_position < least:
        raise ValueError(f"max_position: got {max_position}, wanted at least {least} with these buckets")
    reach = max(SHORTEST, 1 << max(length - 1, 0).bit_length())
    span = position_buckets if position_buckets > 0 else max_position
    return _kept_slots(reach, max(position_buckets, 0), max_position, str(device)), 2 * span


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device: got {device!r}, wanted a torch.device or its name") from None


def _kept_slots(reach: int, buckets: int, max_position: int, device: str) -> Tensor:
    # Under a compiler, or made fake by a mode, nobody else may get it.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _slots(reach, buckets, max_position, device)
    with torch.inference_mode(False):  # or else it could not be saved for a backward pass, ever
        return _once(reach, buckets, max_position, device)


@functools.lru_cache(maxsize=64)
def _once(*arguments: Any) -> Tensor:
    return _slots(*arguments)


def _slots(reach: int, buckets: int, max_position: int, device: str) -> Tensor:
    distances = torch.arange(1 - reach, reach, device="cpu")
    if buckets:
        middle = buckets // 2
        near = (distances < middle) & (distances > -middle)
        far = torch.where(near, middle - 1, distances.abs())
        most = torch.log(torch.tensor((max_position - 1) / middle, dtype=torch.float32))
        steps = torch.ceil(torch.log(far.float() / middle) / most * (middle - 1)) + middle
        distances = torch.where(far <= middle, distances.float(), steps * distances.sign()).long()
    span = buckets or max_position
    return (distances + span).clamp(0, 2 * span - 1).to(device, torch.int32)


def _check(q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None, pos_query: Tensor | None) -> None:
    expect("q", q, "(B, S, H, D)", getattr(q, "shape", ()), q)
    if q.dim() not in (3, 4):
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted (B, S, H, D) or (total, H, D)")
    dtypes = tuple(WORKING) if autocast_dtype(q) is not None else (q.dtype,)
    for name, x in (("k", k), ("v", v)):
        expect(name, x, "that of q", q.shape, q, dtypes, lead="q")
    for name, table in (("pos_key", pos_key), ("pos_query", pos_query)):
        if table is not None:
            slots = table.shape[0] if isinstance(table, Tensor) and table.dim() else -1
            expect(name, table, "(P, H, D)", (slots, *q.shape[-2:]), q, dtypes, lead="q")
    if pos_key is not None and pos_query is not None and len(pos_key) != len(pos_query):
        raise ValueError(f"pos_query: got {len(pos_query)} slots, wanted {len(pos_key)}, as pos_key has")


def _check_lengths(q: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The two as int32."""
    if cu_seqlens is None:
        if lengths is not None:
            expect("lengths", lengths, "(B,)", q.shape[:1], q, INTEGERS, lead="q")
        return None if lengths is None else lengths.int(), None
    if lengths is not None:
        raise ValueError("lengths: got both lengths and cu_seqlens, wanted one: packed sequences are whole")
    return None, boundaries("cu_seqlens", cu_seqlens, q)


def _check_slots(
    q: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    slots: Tensor | None,
    most: int,
    position_buckets: int,
    max_position: int | None,
) -> Tensor:
    (name, table), *_ = [(n, t) for n, t in (("pos_key", pos_key), ("pos_query", pos_query)) if t is not None]
    if slots is None:
        if max_position is None:
            raise ValueError("slots: got neither slots nor max_position, wanted one, to say which slot a distance has")
        slots, count = relative_slots(
            most, position_buckets=position_buckets, max_position=max_position, device=q.device
        )
        if len(table) < count:
            raise ValueError(f"{name}: got {len(table)} slots, wanted {count}, of which the distances have theirs")
        return slots
    count = slots.shape[0] if isinstance(slots, Tensor) and slots.dim() else -1
    expect("slots", slots, "(2M - 1,)", (count,), q, INTEGERS, lead="q")
    if count % 2 == 0 or count < 2 * most - 1:
        least = max(2 * most - 1, 1)
        raise ValueError(f"slots: got {count} slots, wanted an odd number, at least {least}, for {most} positions")
    if slots.device.type == "cpu" and not torch.compiler.is_compiling() and type(slots) is Tensor:
        lowest, highest, falls = int(slots.min()), int(slots.max()), bool((slots[1:] < slots[:-1]).any())
        if lowest < 0 or highest >= len(table) or falls:
            got = f"slots from {lowest} to {highest}" + (" that fall somewhere" if falls else "")
            raise ValueError(f"slots: got {got}, wanted them in [0, {len(table)}), and never falling")
    return slots.int()
