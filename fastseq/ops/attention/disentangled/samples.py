"""Argument tuples for the contract tests of disentangled attention: ordinary, awkward, hostile; small.

A generator is `(device, dtype, seed) -> iterator of argument tuples`; `dtype` is that of q, k, v and the tables. Where
a number is NaN there is one slot or no table: what a NaN does to the slots that its row does not have is not promised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.disentangled import eager

__all__ = ["batches", "batches_with_gradients"]

Arguments = tuple[Any, ...]
INF, NAN = math.inf, math.nan
Q, K, V, POS_KEY, POS_QUERY, SLOTS, CU, LENGTHS, SEED, LONGEST, SCALE, DROPOUT = range(12)

# B, S, H, D, P: around the vector widths of every instruction set, and with nothing in one of them.
SHAPES = [(2, 5, 2, d, 6) for d in (1, 2, 7, 8, 9, 15, 16, 17, 33, 64)]
SHAPES += [(1, s, 2, 4, 8) for s in (1, 2, 7, 8, 9, 15, 16, 17, 33)]
SHAPES += [(2, 6, 2, 5, p) for p in (1, 2, 17, 40)] + [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5)]


class _Maker:
    """Random arguments of one device, dtype and seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def integers(self, *values: int) -> Tensor:
        """These."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def monotone(self, reach: int, p: int) -> Tensor:
        """(2M-1,) slots that rise by any number or not at all."""
        slots = torch.randint(0, p, (2 * reach - 1,), generator=self.generator, dtype=torch.int32)
        return slots.sort().values.to(self.device)

    def clamped(self, reach: int, p: int) -> Tensor:
        """(2M-1,) slots that rise by 1 around distance 0, and are the first and the last far out."""
        return (torch.arange(1 - reach, reach) + p // 2).clamp(0, p - 1).to(self.device, torch.int32)

    def logarithmic(self, reach: int, p: int) -> Tensor:
        """(2M-1,) slots that rise by 1 a doubling of the distance."""
        d = torch.arange(1 - reach, reach)
        return (d.sign() * (d.abs() + 1.0).log2().floor().long() + p // 2).clamp(0, p - 1).to(self.device, torch.int32)

    def case(self, b: int, s: int, h: int, d: int, p: int) -> list[Any]:
        """Dense, with all terms."""
        q, k, v = (self.normal(b, s, h, d) for _ in range(3))
        tables = self.normal(p, h, d), self.normal(p, h, d)
        return [q, k, v, *tables, self.clamped(max(s, 1), p), None, None, None, s, (3 * d) ** -0.5, 0.0]

    def packed(self, bounds: list[int], s: int, longest: int) -> list[Any]:
        """S positions, sequences with these boundaries."""
        case = self.case(1, s, 2, 4, 6)
        case[CU], case[LONGEST] = self.integers(*bounds), longest
        case[SLOTS] = self.logarithmic(longest + 2, 6)
        return case


Build = Callable[[_Maker], list[Any]]


def batches(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """The twelve arguments of disentangled_attention."""
    make = _Maker(device, dtype, seed)
    for build in _ordinary():
        yield tuple(build(make))
    for number, (b, s, h, d, p) in enumerate(SHAPES):
        case, reach = make.case(b, s, h, d, p), s + number % 3 + (s == 0)
        slots = (make.clamped, make.logarithmic, make.monotone)[number % 3]
        case[SLOTS] = slots(reach, p)
        case[POS_KEY if number % 4 == 1 else POS_QUERY] = None if number % 4 in (1, 2) else case[POS_QUERY]
        if number % 5 == 3:
            case[SEED], case[DROPOUT] = _seed(make, number), 0.3
        yield tuple(case)
    for build in (*_ragged(), *_dropped(), *_hazards()):
        yield tuple(build(make))


def batches_with_gradients(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """The sixteen arguments of disentangled_attention_grad."""
    make = _Maker(device, dtype, seed + 1)
    for number, args in enumerate(batches(device, dtype, seed)):
        out, lse = eager.attend(*args)
        grad_out, grad_lse = make.normal(*out.shape), make.normal(*lse.shape).to(lse.dtype)
        absent = lse == -INF
        grad_lse.masked_fill_(absent, NAN)
        grad_out.masked_fill_(absent.transpose(1, 2)[..., None], NAN)
        if not args[Q].is_contiguous():
            grad_out, out = (torch.stack([x, x], -1)[..., 0] for x in (grad_out, out))
        yield grad_out, None if number % 7 == 4 else grad_lse, out, lse, *args
        if number % 7 == 5 and bool(out.isfinite().all()):  # nobody promises that 0 times NaN is in it, or is not
            yield None, grad_lse, out, lse, *args


def _ordinary() -> list[Build]:
    """One of each layout, for the tests that take a few; the last has all that is not dropout."""

    def every_one(make: _Maker) -> list[Any]:
        case = make.case(2, 3, 2, 3, 4)
        return [torch.stack([a, a], -1)[..., 0] if isinstance(a, Tensor) else a for a in case]

    def transposed(make: _Maker) -> list[Any]:
        case = make.case(2, 3, 2, 3, 4)
        case[Q] = case[Q].transpose(1, 2).contiguous().transpose(1, 2)
        case[K] = case[K].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        case[POS_KEY], case[SLOTS] = None, make.monotone(5, 4)
        return case

    def with_everything(make: _Maker) -> list[Any]:
        case = make.case(2, 4, 2, 3, 5)
        case[LENGTHS], case[SLOTS] = make.integers(4, 4), make.logarithmic(6, 5)
        return case

    return [every_one, transposed, with_everything]


def _ragged() -> list[Build]:
    """Sequences of every length, with NaN wherever no position is."""

    def lengths(make: _Maker) -> list[Any]:
        case = make.case(5, 6, 2, 4, 6)
        case[LENGTHS] = make.integers(6, 0, 1, 3, 5)
        for row, end in enumerate((6, 0, 1, 3, 5)):
            for x in case[:3]:
                x[row, end:] = NAN
        return case

    def packed(make: _Maker) -> list[Any]:
        return make.packed([0, 5, 5, 6, 13], 13, 7)

    def with_room(make: _Maker) -> list[Any]:
        return make.packed([0, 2, 6], 6, 9)

    def outside(make: _Maker) -> list[Any]:
        case = make.packed([2, 5, 9], 12, 4)
        for x in case[:3]:
            x[0, :2], x[0, 9:] = NAN, NAN
        return case

    def none(make: _Maker) -> list[Any]:
        return make.packed([0], 0, 1)

    def content_alone(make: _Maker) -> list[Any]:
        case = make.packed([0, 4, 9], 9, 5)
        case[POS_KEY] = case[POS_QUERY] = None
        return case

    def fused(make: _Maker) -> list[Any]:
        case = make.packed([0, 4, 9], 9, 5)
        case[Q], case[K], case[V] = make.normal(1, 9, 2, 12).chunk(3, 3)
        return case

    return [lengths, packed, with_room, outside, none, content_alone, fused]


def _seed(make: _Maker, number: int) -> Tensor:
    seeds = 0, 1, 0x123456789ABCDEF, 2**63 - 1
    return torch.tensor([seeds[number % 4]], dtype=torch.int64, device=make.device)


def _dropped() -> list[Build]:
    """Dropout, from almost nothing to most of it, over several words of the hash."""

    def build(number: int, share: float) -> Build:
        def dense(make: _Maker) -> list[Any]:
            case = make.case(1, 37, 1, 2, 4) if number == 0 else make.case(2, 5, 2, 4, 6)
            case[SEED], case[DROPOUT] = _seed(make, number), share
            return case

        return dense

    def ragged(make: _Maker) -> list[Any]:
        case = make.packed([0, 3, 3, 10], 10, 7)
        case[SEED], case[DROPOUT] = _seed(make, 2), 0.25
        return case

    return [*(build(number, share) for number, share in enumerate((0.1, 0.5, 1e-6, 0.75))), ragged]


def _hazards() -> list[Build]:
    """What breaks an implementation that is only right on ordinary numbers."""

    def large(make: _Maker) -> list[Any]:  # whole numbers, so that scores are exact in every type
        case = make.case(2, 5, 2, 4, 6)
        case[Q], case[K] = (case[Q] * 16).round(), (case[K] * 4).round()
        case[POS_KEY], case[POS_QUERY], case[SCALE] = case[POS_KEY].round(), case[POS_QUERY].round(), 0.25
        return case

    def poisoned(place: int, index: Any, value: float, tables: bool = False) -> Build:
        def build(make: _Maker) -> list[Any]:
            case = make.case(2, 4, 2, 3, 1)
            if not tables:
                case[POS_KEY] = case[POS_QUERY] = None
            case[K][1, 0, 1], case[K][1, 1, 1] = 1, -1  # against +inf: one of them is +inf
            case[place][index] = value
            return case

        return build

    def slots_of_no_distance(make: _Maker) -> list[Any]:
        case = make.case(2, 4, 2, 3, 9)
        case[SLOTS] = make.integers(*range(9)).repeat_interleave(3)[8:-8]
        used = case[SLOTS][len(case[SLOTS]) // 2 - 3 : len(case[SLOTS]) // 2 + 4]
        for x in (case[POS_KEY], case[POS_QUERY]):
            x[: int(used.min())], x[int(used.max()) + 1 :] = NAN, NAN
        return case

    row = (1, 2, 1)
    found: list[Build] = [large, slots_of_no_distance]
    found += [poisoned(place, row, NAN, tables) for place in (Q, K, V) for tables in (False, True)]
    return [*found, poisoned(Q, (1, 2, 1, 0), INF)]
