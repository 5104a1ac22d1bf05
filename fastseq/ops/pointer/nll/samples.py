"""Argument tuples for the contract tests of the pointer-generator's loss: ordinary, awkward, hostile; small.

A generator is `(device, dtype, seed) -> iterator of argument tuples`; `dtype` is that of the hidden states. Logits are
large through the bias, which is not rounded to half types: what is tested is the loss, and not the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["targets", "weighted_targets"]

Arguments = tuple[Any, ...]
INF, NAN = math.inf, math.nan
HIDDEN, WEIGHT, BIAS, COPY, GATE, SOURCE, TARGET, IGNORE, SMOOTHING, Z_LOSS = range(10)

# B, T, S, H, V: around the vector widths of every instruction set, and with nothing in one of them.
SHAPES = [(2, 3, 4, 3, v) for v in (1, 2, 7, 8, 9, 15, 17, 31, 33, 64, 65)] + [(1, 1, 1, 1, 1), (3, 1, 2, 16, 5)]
SHAPES += [(2, 2, 3, h, 6) for h in (1, 8, 17, 33)] + [(2, 5, s, 4, 6) for s in (1, 8, 9, 17, 33)] + [(5, 7, 6, 4, 40)]
SHAPES += [(0, 3, 4, 3, 5), (2, 0, 4, 3, 5), (2, 3, 0, 3, 5)]


class _Maker:
    """Random arguments of one device, dtype and seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.result = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of the result's dtype."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.result)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Numbers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def case(self, b: int, t: int, s: int, h: int, v: int) -> list[Any]:
        """Arguments for a target that can always be generated or copied; every other one is in the source."""
        source, target = self.integers(0, v + 2, b, s), self.integers(0, v, b, t)
        if s:
            places = self.integers(0, s, b, t)
            target[:, ::2] = source.gather(1, places)[:, ::2]
        hidden, weight = self.normal(b, t, h).to(self.dtype), (self.normal(v, h) / h**0.5).to(self.dtype)
        attention = self.normal(b, t, s).softmax(2)
        return [hidden, weight, self.normal(v), attention, self.normal(b, t), source, target, -100, 0.0, 0.0]

    def copynet(self, b: int, t: int, s: int, h: int, v: int) -> list[Any]:
        """The same for CopyNet: scores, and no gate."""
        case = self.case(b, t, s, h, v)
        case[COPY], case[GATE] = self.normal(b, t, s), None
        return case


def targets(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """The ten arguments of pointer_nll."""
    make = _Maker(device, dtype, seed)
    for build in (*_layouts(), *_ordinary()):
        yield tuple(build(make))
    for number, shape in enumerate(SHAPES):
        case = make.copynet(*shape) if number % 4 == 3 else make.case(*shape)
        case[BIAS] = None if number % 3 == 1 else case[BIAS]
        case[WEIGHT] = case[WEIGHT].to(make.result) if number % 5 == 2 else case[WEIGHT]
        if case[GATE] is not None and number % 2:
            case[SMOOTHING], case[Z_LOSS] = 0.1, 0.01
        yield tuple(case)
    for build in (*_ids(), *_hazards(), *_hazards_of_smoothing(), *_hazards_of_copynet()):
        yield tuple(build(make))


def weighted_targets(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """The eleven arguments of pointer_nll_grad: the last is weights, or None."""
    make = _Maker(device, dtype, seed + 1)
    kinds = len(_layouts()) + len(_ordinary())
    for number, arguments in enumerate(targets(device, dtype, seed)):
        if number % 3 == 1:
            yield *arguments, None
        weights = make.normal(*arguments[TARGET].shape)
        if number >= kinds:
            weights.view(-1)[1::3] = 0
        yield *arguments, weights


Build = Callable[[_Maker], list[Any]]


def _layouts() -> list[Build]:
    """Arguments that are not contiguous."""

    def every_one(make: _Maker) -> list[Any]:
        case = make.case(3, 4, 5, 3, 6)
        return [torch.stack([a, a], -1)[..., 0] if isinstance(a, Tensor) else a for a in case]

    def transposed(make: _Maker) -> list[Any]:
        case = make.case(3, 4, 5, 3, 6)
        case[HIDDEN] = case[HIDDEN].transpose(0, 1).contiguous().transpose(0, 1)
        case[WEIGHT] = case[WEIGHT].t().contiguous().t()
        case[COPY] = case[COPY].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        case[TARGET] = case[TARGET].t().contiguous().t()
        return case

    def repeated(make: _Maker) -> list[Any]:
        case = make.case(3, 4, 5, 3, 6)
        case[HIDDEN], case[GATE] = case[HIDDEN][:1].expand(3, 4, 3), case[GATE][:, :1].expand(3, 4)
        return case

    return [every_one, transposed, repeated]


def _ordinary() -> list[Build]:
    """One of each kind, for the tests that take a few: the loss, CopyNet, and the loss with all that it can have."""

    def copynet(make: _Maker) -> list[Any]:
        case = make.copynet(2, 3, 4, 3, 6)
        case[BIAS], case[HIDDEN] = None, torch.stack([case[HIDDEN], case[HIDDEN]], -1)[..., 0]
        return case

    def with_everything(make: _Maker) -> list[Any]:
        case = make.case(2, 3, 4, 3, 6)
        case[COPY] = torch.stack([case[COPY], case[COPY]], -1)[..., 0]
        case[TARGET][0] = make.integers(0, 6, 3)
        case[TARGET][1, 1], case[IGNORE], case[SOURCE][0, 1] = -9, -9, -1
        case[SMOOTHING], case[Z_LOSS] = 0.1, 0.05
        return case

    return [lambda make: make.case(2, 3, 4, 3, 6), copynet, with_everything]


def _edited(edit: Callable[[list[Any], _Maker], None], *, copynet: bool = False) -> Build:
    def build(make: _Maker) -> list[Any]:
        case = (make.copynet if copynet else make.case)(3, 4, 6, 4, 7)
        edit(case, make)
        return case

    return build


def _set(place: int, index: Any, value: Any) -> Callable[[list[Any], _Maker], None]:
    def edit(case: list[Any], make: _Maker) -> None:
        case[place][index] = torch.as_tensor(value, dtype=case[place].dtype, device=make.device)

    return edit


def _both(*edits: Callable[[list[Any], _Maker], None]) -> Callable[[list[Any], _Maker], None]:
    def edit(case: list[Any], make: _Maker) -> None:
        for each in edits:
            each(case, make)

    return edit


def _ids() -> list[Build]:
    """Every kind of target and source."""

    def ignored_zero(case: list[Any], make: _Maker) -> None:
        case[TARGET][0, 1:], case[TARGET][1, 0], case[IGNORE] = 0, 0, 0

    def absent(case: list[Any], make: _Maker) -> None:
        case[SOURCE][0, 4:], case[SOURCE][1, ::2], case[SOURCE][2] = -1, -100, -1
        case[COPY] = case[COPY].masked_fill((case[SOURCE] < 0)[:, None], NAN)
        case[TARGET] = make.integers(0, 7, 3, 4)

    everywhere = slice(None)
    return [
        _edited(_set(TARGET, (0, slice(1, None)), -100)),
        _edited(_set(TARGET, everywhere, -100)),
        _edited(ignored_zero),
        _edited(absent),
        _edited(_both(_set(SOURCE, everywhere, 8), _set(TARGET, everywhere, 8))),  # all out of vocabulary
        _edited(_both(_set(SOURCE, everywhere, 3), _set(TARGET, (0,), 3))),  # one word again and again
        _edited(_both(_set(SOURCE, (slice(None), 1), 7), _set(TARGET, (slice(None), 1), 7))),
        _edited(_set(TARGET, (0, 0), 10**12)),
    ]


def _confident(nats: int) -> Callable[[list[Any], _Maker], None]:
    """One word is `nats` before the next, which is as much before the next, and so on."""

    def edit(case: list[Any], make: _Maker) -> None:
        order = torch.randperm(7, generator=make.generator)
        case[BIAS] = (-nats * order).to(make.device, make.result)

    return edit


def _hazards() -> list[Build]:
    """What breaks an implementation that is only right on ordinary numbers."""

    def copied_of_nothing(case: list[Any], make: _Maker) -> None:
        case[SOURCE][:, 2], case[TARGET][:, 1], case[COPY][:, 1] = 5, 5, 0  # the word is there, but p(copied) is 0
        case[COPY][:, 1, 0], case[SOURCE][:, 0] = 1, 2
        case[TARGET][0, 2], case[SOURCE][0, 4] = 7, 7
        case[COPY][0, 2, case[SOURCE][0] == 7] = 0  # out of vocabulary, and p(y) = 0

    def forbidden(case: list[Any], make: _Maker) -> None:
        case[BIAS][2:4] = -INF
        case[SOURCE][:, 0], case[SOURCE][:, 1:] = 2, 1
        case[TARGET] = torch.tensor([[2, 3, 0, 1]] * 3, device=make.device)  # copied only, impossible, and ordinary

    def not_read(case: list[Any], make: _Maker) -> None:
        case[SOURCE][:, 0], case[TARGET][0], case[TARGET][1, 1] = 7, 7, -100
        case[HIDDEN][0], case[HIDDEN][1, 1], case[GATE][1, 1], case[COPY][1, 1] = NAN, NAN, NAN, INF

    def poisoned_attention(case: list[Any], make: _Maker) -> None:
        case[SOURCE][1, 3], case[TARGET][1, 2], case[COPY][1, 2, 3] = 4, 4, NAN

    whole = slice(None)
    edits = [_confident(50), _confident(200)]
    edits += [_set(GATE, whole, value) for value in (60, -60, 200, -200)]
    edits += [_both(_confident(200), _set(GATE, whole, value)) for value in (60, -60)]
    edits += [_set(TARGET, (1, 1), 8888), copied_of_nothing, forbidden, not_read, poisoned_attention]
    edits += [_both(_set(TARGET, (1, 2), 3), _set(place, (1, 2), NAN)) for place in (HIDDEN, GATE)]
    edits += [_both(_set(TARGET, (1, 2), 3), _set(HIDDEN, (1, 2), INF))]
    return [_edited(edit) for edit in edits]


def _hazards_of_smoothing() -> list[Build]:
    def smoothed(case: list[Any], make: _Maker) -> None:
        case[SMOOTHING], case[Z_LOSS] = 0.2, 0.001

    def forbidden(case: list[Any], make: _Maker) -> None:
        case[BIAS][2] = -INF
        case[SOURCE][:2, 3] = 2  # it can be copied in two sources; in the third, nothing is possible
        case[SOURCE][2] = 1

    def nothing_but_absent(case: list[Any], make: _Maker) -> None:
        case[SOURCE][0], case[SOURCE][1, 1:] = -1, 9
        case[TARGET] = make.integers(0, 7, 3, 4)

    edits = [_confident(50), forbidden, nothing_but_absent, _set(SOURCE, slice(None), 0), _set(GATE, (0,), 40)]
    edits += [_set(GATE, (0,), -40), _set(TARGET, (1, 1), 8888), _set(HIDDEN, (1, 2), NAN)]
    edits += [_both(_set(TARGET, (0, 1), -100), _set(HIDDEN, (0, 1), NAN))]
    return [_edited(_both(smoothed, edit)) for edit in edits]


def _hazards_of_copynet() -> list[Build]:
    def padded(case: list[Any], make: _Maker) -> None:
        case[COPY][0, :, 3:], case[COPY][1], case[SOURCE][2, 3:] = -INF, -INF, -1
        case[COPY][2, :, 3:] = NAN
        case[TARGET] = make.integers(0, 7, 3, 4)

    whole = slice(None)
    edits = [padded, _confident(50), _set(COPY, (0,), 60), _set(COPY, (0,), -60), _set(COPY, (0, 0, 2), 100)]
    edits += [_set(TARGET, (1, 1), 8888), _set(SOURCE, whole, 2), _set(COPY, (1, 2, 0), NAN)]
    edits += [_both(_set(TARGET, (1, 2), 3), _set(HIDDEN, (1, 2), NAN)), _set(COPY, (1, 2, 0), INF)]
    edits += [_both(_set(TARGET, (1, 2), -100), _set(HIDDEN, (1, 2), NAN), _set(COPY, (1, 2), NAN))]
    edits += [_both(_set(SOURCE, whole, 8), _set(TARGET, whole, 8))]
    return [_edited(edit, copynet=True) for edit in edits]
