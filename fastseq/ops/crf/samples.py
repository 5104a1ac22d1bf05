"""Argument tuples for the contract tests of the CRF ops: ordinary, awkward, hostile; small enough for loops.

A generator is `(device, dtype, seed) -> iterator of argument tuples`; `dtype` is that of the emissions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["models", "models_and_n", "paths", "tagged_paths", "uniforms_and_models", "weighted_paths"]

Arguments = tuple[Any, ...]
INF = math.inf

# Sizes around the vector widths (K) and the lanes (B) of every instruction set.
SHAPES = [(b, 4, 5) for b in (1, 3, 8, 16, 17, 33)] + [(3, 5, k) for k in (1, 2, 7, 9, 16, 17, 25, 31, 32, 33)]
SHAPES += [(2, 3, k) for k in (40, 64, 65)] + [(2, 1, 4), (1, 1, 1), (4, 7, 1), (2, 30, 3)]


class _Maker:
    """Random tensors of one device, dtype and seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.result = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of the result's dtype."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.result)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) of the result's dtype."""
        return torch.rand(shape, generator=self.generator).to(self.device, self.result)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Numbers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def model(self, b: int, t: int, k: int) -> list[Any]:
        """Emissions, tags, no mask, transitions, start, end."""
        x, tags = self.normal(b, t, k).to(self.dtype), self.integers(k, b, t)
        return [x, tags, None, self.normal(k, k), self.normal(k), self.normal(k)]

    def lengths_mask(self, b: int, t: int, *, left: bool = False) -> Tensor:
        """(B,T) padding on the right or left of rows of 1 to T."""
        lengths = self.integers(t, b, 1) + 1
        mask = torch.arange(t, device=self.device) < lengths
        return mask.flip(1) if left else mask


def tagged_paths(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(emissions, tags, mask, transitions, start, end), with tags."""
    make = _Maker(device, dtype, seed)
    for number, shape in enumerate(SHAPES):
        case = make.model(*shape)
        case[2] = None if number % 3 == 0 else make.lengths_mask(*shape[:2], left=number % 3 == 2)
        yield tuple(case)
    for build in (*_masks(), *_layouts(), *_hazards()):
        yield tuple(build(make))


def paths(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(emissions, tags or None, mask, transitions, start, end)."""
    for number, (x, tags, *rest) in enumerate(tagged_paths(device, dtype, seed)):
        yield x, tags, *rest
        if number % 3 == 0:
            yield x, None, *rest


def weighted_paths(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(emissions, tags or None, mask, transitions, start, end, weights or None, scale)."""
    make = _Maker(device, dtype, seed + 1)
    for number, arguments in enumerate(paths(device, dtype, seed)):
        yield *arguments, None, 1.0 if number % 2 else 0.25
        if number % 2:
            weights = make.normal(len(arguments[0]))
            weights[1::3] = 0
            yield *arguments, weights, -0.5


def models(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(emissions, mask, transitions, start, end)."""
    for x, tags, mask, *parameters in tagged_paths(device, dtype, seed):
        off = tags == -100
        if bool(off.any()):
            mask = ~off if mask is None else mask & ~off
        yield x, mask, *parameters


def models_and_n(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(emissions, mask, transitions, start, end, n)."""
    for number, arguments in enumerate(models(device, dtype, seed)):
        yield *arguments, (1, 3, 7)[number % 3]


def uniforms_and_models(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """(uniforms, emissions, mask, transitions, start, end)."""
    make = _Maker(device, dtype, seed + 2)
    for arguments in models(device, dtype, seed):
        yield make.uniform(3, *arguments[0].shape[:2]), *arguments


Build = Callable[[_Maker], list[Any]]


def _masks() -> list[Build]:
    """Every pattern of positions that are off."""

    def masked(b: int, t: int, k: int, pattern: Callable[[_Maker], Tensor]) -> Build:
        def build(make: _Maker) -> list[Any]:
            case = make.model(b, t, k)
            case[2] = pattern(make).to(make.device)
            return case

        return build

    def without_tags(make: _Maker) -> list[Any]:
        case = make.model(5, 6, 4)
        case[1][make.uniform(5, 6) < 0.4] = -100
        case[1][2] = -100
        return case

    def without_tags_and_masked(make: _Maker) -> list[Any]:
        case = without_tags(make)
        case[2] = make.lengths_mask(5, 6)
        return case

    return [
        masked(6, 5, 4, lambda make: make.uniform(6, 5) < 0.5),  # holes
        masked(4, 5, 4, lambda make: torch.tensor([[1, 0, 1, 0, 1], [0] * 5, [1] * 5, [0, 0, 1, 0, 0]]).bool()),
        masked(3, 4, 3, lambda make: torch.zeros(3, 4).bool()),  # all off
        masked(3, 4, 3, lambda make: torch.ones(3, 4).bool()),
        masked(0, 4, 3, lambda make: torch.ones(0, 4).bool()),
        masked(2, 0, 3, lambda make: torch.ones(2, 0).bool()),
        lambda make: make.model(0, 4, 3),
        lambda make: make.model(2, 0, 3),
        without_tags,
        without_tags_and_masked,
    ]


def _layouts() -> list[Build]:
    """Emissions and parameters that are not contiguous."""

    def with_emissions(layout: Callable[[_Maker], Tensor]) -> Build:
        def build(make: _Maker) -> list[Any]:
            x = layout(make).to(make.dtype) if layout(make).is_contiguous() else layout(make)
            case = make.model(3, 5, 4)
            case[0], case[2] = x, make.lengths_mask(3, 5)
            return case

        return build

    def parameters(make: _Maker) -> list[Any]:
        case = make.model(3, 5, 4)
        case[1] = make.integers(4, 5, 3).t()
        case[2] = (
            make.lengths_mask(5, 3).t().logical_or(torch.tensor([True, False, False, False, False]).to(make.device))
        )
        case[3:] = [make.normal(4, 4).t(), make.normal(8)[::2], make.normal(4, 3)[:, 1]]
        return case

    return [
        with_emissions(lambda make: make.normal(5, 3, 4).to(make.dtype).transpose(0, 1)),
        with_emissions(lambda make: make.normal(3, 7, 9).to(make.dtype)[:, 1:6, 2:6]),
        with_emissions(lambda make: make.normal(3, 5, 8).to(make.dtype)[:, :, ::2]),
        with_emissions(lambda make: make.normal(3, 1, 4).to(make.dtype).expand(3, 5, 4)),
        parameters,
    ]


def _hazards() -> list[Build]:
    """What breaks an implementation that is only right on ordinary numbers."""

    def edited(edit: Callable[[list[Any], _Maker], None], *, t: int = 6) -> Build:
        def build(make: _Maker) -> list[Any]:
            case = make.model(4, t, 4)
            case[2] = make.lengths_mask(4, t)
            case[2][:2] = True
            edit(case, make)
            return case

        return build

    def forbid(value: float) -> Callable[[list[Any], _Maker], None]:
        def edit(case: list[Any], make: _Maker) -> None:
            case[3][0, 1:3], case[3][2, 2], case[4][1], case[5][2] = value, value, value, value
            case[1][0] = torch.tensor([0, 0, 0, 3, 3, 3])  # possible; the others as they come

        return edit

    def dead_rows(case: list[Any], make: _Maker) -> None:
        case[0][1, 2] = -INF  # nothing possible in row 1; row 2 is empty
        case[2][2] = False

    def no_edges(case: list[Any], make: _Maker) -> None:
        case[3][:] = -INF
        case[2][2, 1:] = False  # only rows of one position are possible

    def lost_path(nats: float) -> Callable[[list[Any], _Maker], None]:
        """Tag 1 falls behind tag 0 by `nats`, and is then the only one that can end."""

        def edit(case: list[Any], make: _Maker) -> None:
            case[0][:, :, 0] += nats / 5
            case[3][0, 1:], case[3][1:, 0], case[5][0] = -INF, -INF, -INF

        return edit

    def disconnected(case: list[Any], make: _Maker) -> None:
        """Tags 2 and 3 score best by far and can never be reached."""
        case[0][:, :, 2:] += 60
        case[3][:2, 2:], case[4][2:] = -INF, -INF

    def scale_emissions(size: float) -> Callable[[list[Any], _Maker], None]:
        def edit(case: list[Any], make: _Maker) -> None:
            case[0][:] = (make.integers(2, *case[0].shape) * 2 - 1) * size

        return edit

    def put(row: int, value: float, *, whole: bool = False) -> Callable[[list[Any], _Maker], None]:
        def edit(case: list[Any], make: _Maker) -> None:
            case[0][row, 1, slice(None) if whole else 2] = value

        return edit

    edits = [
        forbid(-INF),
        forbid(-1e4),
        forbid(-100.0),
        dead_rows,
        no_edges,
        lost_path(100.0),
        lost_path(1000.0),
    ]
    edits += [
        disconnected,
        scale_emissions(1e4),
        scale_emissions(90.0),
        put(0, -INF),
        put(0, -1e4),
        put(1, math.nan),
    ]
    edits += [put(1, math.nan, whole=True), put(0, INF), lambda case, make: case[0].mul_(20)]
    return [edited(edit) for edit in edits] + [edited(lost_path(100.0), t=40), edited(disconnected, t=40)]
