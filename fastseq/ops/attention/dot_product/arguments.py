"""The arguments of attention, and its sequences as a padded batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Arguments", "Batch", "batches", "geometry", "lengths_of", "one_batch", "pad"]


class Arguments(NamedTuple):
    """The arguments of the op, by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    slopes: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_lengths: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    dropout: float

    @property
    def result(self) -> torch.dtype:
        """R: float64 for float64, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def number(self) -> Tensor:
        """A tensor (), of R, to make others from."""
        return self.q.new_empty((), dtype=self.result)


class Batch(NamedTuple):
    """Some of the sequences, padded to the same lengths; in a dense call, the rows of the batch as they are."""

    q: Tensor  # (n,Lq,Hq,D)
    k: Tensor  # (n,Lk,Hk,D)
    v: Tensor
    ids: Tensor  # (n,) which sequences they are
    lengths_q: Tensor | None  # (n,) None where all are Lq
    lengths_k: Tensor | None
    bias: Tensor | None  # (n|1,Hq|1,Lq|1,Lk|1)
    slopes: Tensor | None  # (n|1,Hq)
    to_q: Tensor | None  # (n*Lq,) the token of each position, that after the last for padding; None in a dense call
    to_k: Tensor | None


def lengths_of(args: Arguments) -> tuple[list[int], list[int], list[int], list[int]]:
    """Where each sequence begins, in q and in k, and its lengths; on a CPU.

    Raises:
        ValueError: The offsets or the key lengths do not fit.
    """
    starts_q, ends_q = _offsets("cu_seqlens_q", args.cu_seqlens_q, args.q, args.max_q)
    starts_k, ends_k = _offsets("cu_seqlens_k", args.cu_seqlens_k, args.k, args.max_k)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_k: got {len(starts_k)} sequences, wanted {len(starts_q)}, as in cu_seqlens_q")
    lengths_q = [end - start for start, end in zip(starts_q, ends_q, strict=True)]
    lengths_k = [end - start for start, end in zip(starts_k, ends_k, strict=True)]
    if args.key_lengths is not None:
        shorter = args.key_lengths.tolist()
        if len(shorter) != len(lengths_k):
            raise ValueError(f"key_lengths: got {len(shorter)} lengths, wanted {len(lengths_k)}")
        for n, (length, whole) in enumerate(zip(shorter, lengths_k, strict=True)):
            if not 0 <= length <= whole:
                raise ValueError(f"key_lengths: got {length} for sequence {n}, wanted 0 to {whole}")
        lengths_k = shorter
    return starts_q, lengths_q, starts_k, lengths_k


def _offsets(name: str, cu_seqlens: Tensor | None, x: Tensor, most: int) -> tuple[list[int], list[int]]:
    """The first token of each sequence and the one after its last; of a dense call, counted in its row."""
    if cu_seqlens is None:
        return [0] * x.shape[0], [x.shape[1]] * x.shape[0]
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] < 0 or offsets[-1] > x.shape[1] or offsets != sorted(offsets):
        raise ValueError(f"{name}: got {_short(offsets)}, wanted offsets from 0 to {x.shape[1]} that never fall")
    longest = max((b - a for a, b in itertools.pairwise(offsets)), default=0)
    if longest > most:
        letter = name[-1]
        raise ValueError(f"{name}: got a sequence of {longest} tokens, wanted max_{letter} = {most} at most")
    return offsets[:-1], offsets[1:]


def _short(offsets: list[int]) -> str:
    return f"{offsets}" if len(offsets) <= 8 else f"[{', '.join(map(str, offsets[:7]))}, ... {offsets[-1]}]"


def batches(args: Arguments) -> Iterator[Batch]:
    """All sequences; packed ones on a CPU in groups of nearly the same lengths, so that padding costs little."""
    if args.q.device.type != "cpu":
        yield one_batch(args)
        return
    _, lengths_q, _, lengths_k = lengths_of(args)
    if args.cu_seqlens_q is None:
        yield one_batch(args)
        return
    order = sorted(range(len(lengths_q)), key=lambda n: (lengths_k[n], lengths_q[n]), reverse=True)
    group: list[int] = []
    for n in order:
        if group and not _alike(group, n, lengths_q, lengths_k):
            yield _packed(args, group, lengths_q, lengths_k)
            group = []
        group.append(n)
    if group:
        yield _packed(args, group, lengths_q, lengths_k)


def _alike(group: list[int], n: int, lengths_q: list[int], lengths_k: list[int]) -> bool:
    """Whether sequence n is within a quarter of the group's first, or as short as makes no difference."""
    first = group[0]
    return all(abs(x[first] - x[n]) <= max(x[first] // 4, 8) for x in (lengths_q, lengths_k))


def one_batch(args: Arguments) -> Batch:
    """All sequences, padded to the longest; on a GPU to max_q and max_k, since nobody waits for its lengths."""
    if args.cu_seqlens_q is None:
        ids = torch.arange(args.q.shape[0], device=args.q.device)
        if args.q.device.type == "cpu":
            lengths_of(args)
        return Batch(
            *args[:3],
            ids,
            None,
            None if args.key_lengths is None else args.key_lengths.long(),
            args.bias,
            _by_sequence(args.slopes, ids),
            None,
            None,
        )
    if args.q.device.type == "cpu":
        _, lengths_q, _, lengths_k = lengths_of(args)
        return _packed(args, list(range(len(lengths_q))), lengths_q, lengths_k)
    return _packed(args, None, [args.max_q], [args.max_k])


def _packed(args: Arguments, group: list[int] | None, lengths_q: list[int], lengths_k: list[int]) -> Batch:
    """The sequences of `group` (None for all) as a padded batch."""
    assert args.cu_seqlens_q is not None
    assert args.cu_seqlens_k is not None
    device = args.q.device
    if group is None:
        ids = torch.arange(args.cu_seqlens_q.shape[0] - 1, device=device)
        most_q, most_k = min(lengths_q[0], args.q.shape[1]), min(lengths_k[0], args.k.shape[1])
    else:
        ids = torch.tensor(group, dtype=torch.int64, device=device)
        most_q, most_k = (max((x[n] for n in group), default=0) for x in (lengths_q, lengths_k))
    q_lengths, to_q = _tokens(args.cu_seqlens_q.long(), ids, most_q, args.q.shape[1], None)
    k_lengths, to_k = _tokens(args.cu_seqlens_k.long(), ids, most_k, args.k.shape[1], args.key_lengths)
    places = (to_q, most_q), (to_k, most_k), (to_k, most_k)
    q, k, v = (pad(x, to, (len(ids), most)) for x, (to, most) in zip(args[:3], places, strict=True))
    bias = args.bias
    if bias is not None:
        bias = (bias if bias.shape[0] == 1 else bias[ids])[:, :, :most_q, :most_k]
    return Batch(q, k, v, ids, q_lengths, k_lengths, bias, _by_sequence(args.slopes, ids), to_q, to_k)


def _tokens(cu_seqlens: Tensor, ids: Tensor, most: int, total: int, shorter: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lengths of some sequences, and the token of each position of their padded batch; `total` where none is."""
    starts = cu_seqlens[ids]
    lengths = cu_seqlens[ids + 1] - starts if shorter is None else shorter[ids].long()
    steps = torch.arange(most, device=cu_seqlens.device)
    tokens = (starts[:, None] + steps).masked_fill(steps >= lengths[:, None], total).clamp_(0, total)
    return lengths, tokens.flatten()


def pad(x: Tensor, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """(1,total,...) as (n,L,...), with L = 0 where there is no token; padding is some token, and never looked at."""
    return x[0].index_select(0, tokens.clamp(max=max(x.shape[1] - 1, 0))).view(*shape, *x.shape[2:])


def _by_sequence(slopes: Tensor | None, ids: Tensor) -> Tensor | None:
    """(n|1,Hq)."""
    if slopes is None:
        return None
    return slopes[None] if slopes.dim() == 1 else slopes[ids]


def geometry(batch: Batch, args: Arguments, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What some queries see, (n|1,r,Lk) bool or None for all; and j - i - offset, where slopes ask for it.

    Args:
        batch: The sequences.
        args: The arguments of the op.
        rows: (r,) the queries.
    """
    most_q, most_k = batch.q.shape[1], batch.k.shape[1]
    keys = torch.arange(most_k, device=rows.device)
    visible: list[Tensor] = []
    if batch.lengths_k is not None:
        visible.append(keys < batch.lengths_k[:, None, None])
    if batch.lengths_q is not None:
        visible.append(rows[:, None] < batch.lengths_q[:, None, None])
    distance: Tensor | None = None
    if args.causal or args.window_left >= 0 or args.window_right >= 0 or batch.slopes is not None:
        lengths_k: Any = most_k if batch.lengths_k is None else batch.lengths_k[:, None, None]
        lengths_q: Any = most_q if batch.lengths_q is None else batch.lengths_q[:, None, None]
        distance = (keys - rows[:, None])[None] - (lengths_k - lengths_q)
        if args.causal:
            visible.append(distance <= 0)
        if args.window_left >= 0:
            visible.append(distance >= -args.window_left)
        if args.window_right >= 0:
            visible.append(distance <= args.window_right)
    if not visible:
        return None, distance
    together = visible[0]
    for each in visible[1:]:
        together = together & each
    return together, distance
