"""Argument tuples for the contract tests of the decoder: ordinary, awkward, hostile; small enough for loops.

A generator is `(device, dtype, seed) -> iterator of argument tuples`; half types are for the callers to convert, so for
them the tensors are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.pointer.decoder import eager

__all__ = ["decoders", "gradients"]

Arguments = tuple[Any, ...]
(INPUTS, MEMORY, FEATURES, MASK, HIDDEN, CELL, CONTEXT, COVERAGE) = range(8)
W_COVERAGE, V = 14, 15


class Size(NamedTuple):
    """Rows, sources, steps, positions, hidden, embedding, memory and attention size."""

    b: int = 3
    sources: int = 3
    t: int = 3
    s: int = 4
    h: int = 3
    e: int = 2
    m: int = 4
    a: int = 4


class _Maker:
    """Random tensors of one device, dtype and seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def matrix(self, *shape: int) -> Tensor:
        """A matrix that keeps the size of what it is multiplied with, so that no step amplifies rounding."""
        return self.normal(*shape) / math.sqrt(shape[1])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def arguments(self, size: Size) -> list[Any]:
        """The arguments of pointer_decoder; no mask, coverage as it is after some steps."""
        b, sources, t, s, h, e, m, a = size
        state = self.normal(b, h), self.normal(b, h), self.normal(b, m), self.uniform(b, s)
        weights = self.matrix(e, m), self.matrix(4 * h, e), self.matrix(4 * h, h), self.normal(4 * h)
        attention = self.matrix(a, 2 * h), self.normal(a), self.normal(a), self.normal(a)
        source = self.normal(sources, s, m), self.normal(sources, s, a), None
        return [self.normal(b, t, e), *source, *state, *weights, *attention]

    def mask(self, *rows: list[int]) -> Tensor:
        """(Bm,S) from ones and zeros."""
        return torch.tensor(rows, dtype=torch.bool, device=self.device)


Build = Callable[[_Maker], list[Any]]
LARGE = Size(s=8)  # too large for the tests of derivatives, which would take long with a sample of each layout
HOLES = ([1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0])


def _sizes() -> list[Build]:
    """Sizes around the vector widths, and empty ones."""
    sizes: list[Size] = [Size(), Size(b=1, sources=1), Size(t=1), Size(s=1), Size(s=33, a=8, m=9)]
    sizes += [Size(b=5, sources=5, h=1, e=1, m=1, a=1), Size(b=0, sources=0), Size(t=0), Size(s=0)]
    # With other numbers of rows, products in MKL do depend on the number of threads.
    sizes += [Size(b=2, sources=2, t=5, s=19, h=4, e=9, m=17, a=16), Size(b=2, sources=2, t=2, h=17, e=33, m=32, a=31)]

    def build(size: Size) -> Build:
        return lambda make: make.arguments(size)

    return [build(size) for size in sizes]


def _beams() -> list[Build]:
    """Several rows a source."""
    beam, empty = Size(b=6, sources=2), Size(b=0, sources=2)

    def masked(make: _Maker) -> list[Any]:
        args = make.arguments(Size(b=4, sources=2))
        args[MASK] = make.mask([1, 1, 0, 1], [0, 0, 0, 0])
        return args

    return [lambda make: make.arguments(beam), masked, lambda make: make.arguments(empty)]


def _masks() -> list[Build]:
    """Every pattern of positions that are off, and what may be there."""

    def masked(*rows: list[int], coverage: bool = True, off: float | None = None) -> Build:
        def build(make: _Maker) -> list[Any]:
            args = make.arguments(Size())
            mask = args[MASK] = make.mask(*rows)
            if off is not None:
                for place in (MEMORY, FEATURES):
                    args[place] = args[place].masked_fill(~mask[..., None], off)
            args[W_COVERAGE] = args[W_COVERAGE] if coverage else None
            return args

        return build

    def without_coverage(make: _Maker) -> list[Any]:
        args = make.arguments(Size())
        args[W_COVERAGE] = None
        return args

    def small(make: _Maker) -> list[Any]:
        """The one for the tests of derivatives."""
        args = make.arguments(Size(b=2, sources=2, t=2, s=3, h=2, e=2, m=2, a=2))
        args[MASK] = make.mask([1, 0, 1], [1, 1, 1])
        return args

    return [
        small,
        without_coverage,
        masked([1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]),
        masked([0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]),  # on the left, and a row with none on
        masked(*HOLES, off=math.nan),
        masked(*HOLES, coverage=False),
        masked(*HOLES),
    ]


def _layouts() -> list[Build]:
    """Tensors that are not contiguous."""

    def strided(make: _Maker) -> list[Any]:
        args = make.arguments(LARGE)
        args[MASK] = make.mask(*(row * 2 for row in HOLES)).t().contiguous().t()
        return [a if a is None else torch.stack([a, a], -1)[..., 0] for a in args]

    def views(make: _Maker) -> list[Any]:
        args = make.arguments(LARGE)
        for place in (INPUTS, MEMORY, FEATURES):  # sequence first
            args[place] = args[place].transpose(0, 1).contiguous().transpose(0, 1)
        for place in (8, 9, 10, 12):  # slices of wider matrices
            args[place] = torch.cat((args[place], args[place]), 1)[:, : args[place].shape[1]]
        args[CONTEXT] = args[CONTEXT][:1].expand(3, -1)
        return args

    return [views, strided]


def _hazards() -> list[Build]:
    """Large numbers, NaN, and ties."""

    def edited(place: int, edit: Callable[[Tensor], Any]) -> Build:
        def build(make: _Maker) -> list[Any]:
            args = make.arguments(Size())
            edit(args[place])
            return args

        return build

    def put(*index: Any) -> Callable[[Tensor], Any]:
        def edit(x: Tensor) -> None:
            x[index] = math.nan

        return edit

    def confident(v: Tensor) -> None:
        v *= 60  # scores far beyond what exp can take

    def saturated(x: Tensor) -> None:
        x *= 40

    return [
        edited(V, confident),
        edited(INPUTS, saturated),
        edited(FEATURES, saturated),
        edited(COVERAGE, lambda coverage: coverage.zero_()),
        edited(INPUTS, put(1, 1)),
        edited(HIDDEN, put(0, 1)),
        edited(MEMORY, put(2)),
    ]


def decoders(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """The arguments of pointer_decoder."""
    make = _Maker(device, dtype, seed)
    for build in (*_masks(), *_sizes(), *_beams(), *_hazards(), *_layouts()):
        yield tuple(build(make))


def gradients(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    """The arguments of pointer_decoder_grad: every second time some gradients are absent."""
    make = _Maker(device, dtype, seed + 1)
    for number, args in enumerate(decoders(device, dtype, seed)):
        if len(args[MEMORY]) != len(args[INPUTS]):
            continue
        outputs = eager.decoder(*args)
        grads: list[Any] = [make.normal(*o.shape) for o in outputs]
        for absent in ((), (0, 2, 5), (1, 3, 4, 6), (0, 1, 2, 4, 5))[number % 4]:
            grads[absent] = None
        yield *grads, *args, *(o.detach() for o in outputs[:5])
