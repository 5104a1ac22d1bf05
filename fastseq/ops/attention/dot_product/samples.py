"""Argument tuples for the contract tests of attention: ordinary, awkward, hostile; small.

A generator is `(device, dtype, seed) -> iterator of argument tuples`; `dtype` is that of q. Scores are large only where
they are integers, so that R has them exactly: what is tested is the attention, and not the product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product import eager

__all__ = ["backward", "forward"]

INF, NAN = math.inf, math.nan


@dataclasses.dataclass
class Case:
    """The arguments of attention, to be edited."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    slopes: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    key_lengths: Tensor | None = None
    seed: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    scale: float = 1.0
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout: float = 0.0

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


class _Maker:
    """Random arguments of one device, dtype and seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.result = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.device, self.dtype if dtype is None else dtype)

    def integers(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def case(self, b: int, sq: int, sk: int, hq: int = 2, hk: int = 2, d: int = 8, **options: Any) -> Case:
        """A dense case. Options: `bias`, its shape; `dropout`, and any field of Case."""
        q, k, v = self.normal(b, sq, hq, d), self.normal(b, sk, hk, d), self.normal(b, sk, hk, d)
        return self._with(Case(q, k, v, max_q=sq, max_k=sk, scale=d**-0.5), **options)

    def packed(
        self, lengths_q: list[int], lengths_k: list[int], hq: int = 2, hk: int = 2, d: int = 8, **options: Any
    ) -> Case:
        """A packed case, with two tokens before the first sequence, and one after the last, that are NaN."""
        case = self.case(1, sum(lengths_q) + 3, sum(lengths_k) + 3, hq, hk, d)
        case.cu_seqlens_q, case.cu_seqlens_k = (
            self.integers(*(2 + sum(x[:n]) for n in range(len(x) + 1))) for x in (lengths_q, lengths_k)
        )
        for x in (case.q, case.k, case.v):
            x[0, :2], x[0, -1] = NAN, NAN
        case.max_q, case.max_k = max(lengths_q, default=0) + 1, max(lengths_k, default=0)
        return self._with(case, **options)

    def _with(self, case: Case, bias: Any = None, slopes: Any = None, **options: Any) -> Case:
        case.bias = None if bias is None else self.normal(*bias)
        case.slopes = None if slopes is None else self.normal(*slopes, dtype=torch.float32).abs()
        for name, value in options.items():
            setattr(case, name, self.integers(*value) if name == "key_lengths" else value)
        if case.dropout:
            case.seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=self.generator).to(self.device)
        return case


Build = Callable[[_Maker], Case]


def forward(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """The 17 arguments of attention."""
    make = _Maker(device, dtype, seed)
    for build in (*_ordinary(), *_layouts(), *_sizes(), *_options(), *_packed(), *_hazards(), *_poisoned()):
        yield build(make).arguments()


def backward(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """The 22 arguments of attention_grad."""
    make = _Maker(device, dtype, seed + 1)
    for number, arguments in enumerate(forward(device, dtype, seed)):
        here = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]  # on any device, the same numbers
        out, lse = (x.to(device) for x in eager.attention(*here))
        grad_out = make.normal(*out.shape)
        if number % 5 == 4:  # as that of a sum
            grad_out = make.normal(*out.shape[:2], 1, 1).expand(out.shape)
        grad_lse = make.normal(*lse.shape, dtype=make.result) if number % 3 else None
        bias_grad = number % 7 != 6
        if number < len(_ordinary()):
            grad_lse, bias_grad = make.normal(*lse.shape, dtype=make.result), True
        if number % 11 == 10 and bool(out.isfinite().all()):
            yield None, make.normal(*lse.shape, dtype=make.result), out, lse, *arguments, bias_grad
        yield grad_out, grad_lse, out, lse, *arguments, bias_grad
    for build in _poisoned_grads():
        case, grad_out = build(make)
        out, lse = (
            x.to(device) for x in eager.attention(*(a.cpu() if isinstance(a, Tensor) else a for a in case.arguments()))
        )
        yield grad_out, None, out, lse, *case.arguments(), True


def _every_other(x: Tensor) -> Tensor:
    """The same numbers, of which none are neighbours."""
    return torch.stack([x, x], -1)[..., 0]


def _ordinary() -> list[Build]:
    """One of each kind, for the tests that take a few: they are small, and nothing in them is dead."""

    def everything(make: _Maker) -> Case:
        options: dict[str, Any] = {"causal": True, "softcap": 2.0, "key_lengths": (4, 5)}
        return make.case(2, 3, 5, 2, 1, 4, bias=(2, 2, 3, 5), **options)

    def grouped(make: _Maker) -> Case:
        case = make.case(2, 3, 4, 2, 1, 3, window_left=2, window_right=1)
        case.q = _every_other(case.q)
        return case

    def plain(make: _Maker) -> Case:
        case = make.case(2, 4, 4, 2, 2, 3, bias=(2, 2, 1, 4))
        case.v = _every_other(case.v)
        return case

    return [everything, grouped, plain]


def _layouts() -> list[Build]:
    """Arguments that are not contiguous; larger than what those tests take."""

    def every_one(make: _Maker) -> Case:
        case = make.case(2, 7, 9, 4, 2, 8, bias=(2, 4, 7, 9))
        case.q, case.k, case.v = (_every_other(x) for x in (case.q, case.k, case.v))
        case.bias = _every_other(make.normal(2, 4, 7, 9))
        return case

    def heads_first(make: _Maker) -> Case:
        case = make.case(2, 7, 9, 4, 2, 8)
        case.q, case.k, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v))
        return case

    def one_projection(make: _Maker) -> Case:
        case, qkv = make.case(2, 9, 9, 2, 2, 8), make.normal(2, 9, 3, 2, 8)
        case.q, case.k, case.v = qkv.unbind(2)
        return case

    def repeated(make: _Maker) -> Case:
        case = make.case(3, 6, 9, 2, 2, 8, bias=(3, 1, 1, 9))
        case.k, case.v = case.k[:1].expand(3, 9, 2, 8), case.v[:, :1].expand(3, 9, 2, 8)
        case.bias = make.normal(3, 1, 1, 9).expand(3, 2, 6, 9)
        return case

    return [every_one, heads_first, one_projection, repeated]


def _sizes() -> list[Build]:
    """Around vector widths and tiles, and with nothing in one of them."""
    shapes = [(1, 1, 1, 1, 1, 1), (1, 17, 33, 2, 1, 17), (1, 3, 70, 1, 1, 3), (1, 33, 16, 1, 1, 8), (1, 5, 7, 2, 2, 80)]
    shapes += [(1, 65, 66, 1, 1, 64), (3, 2, 5, 6, 2, 1)]
    shapes += [(0, 3, 4, 2, 1, 8), (2, 0, 4, 2, 2, 8), (2, 3, 0, 2, 1, 8), (2, 0, 0, 2, 2, 8)]
    return [lambda make, shape=shape: make.case(*shape) for shape in shapes]  # type: ignore[misc]


def _options() -> list[Build]:
    """What flash_attn has, and bias of each shape."""
    options: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((2, 6, 6), {"causal": True}),
        ((2, 4, 9), {"causal": True}),
        ((2, 9, 4), {"causal": True}),  # five queries see nothing
        ((1, 9, 40), {"causal": True, "window_left": 20}),
        ((1, 12, 12), {"window_left": 3, "window_right": 0}),
        ((1, 12, 8), {"window_right": 2}),
        ((1, 8, 12, 2, 1), {"causal": True, "window_left": 5, "window_right": 4}),
        ((1, 9, 9), {"window_left": 0, "window_right": 0}),
        ((2, 5, 7), {"softcap": 1.5}),
        ((2, 7, 7), {"slopes": (2,), "causal": True}),
        ((2, 5, 9, 4, 2), {"slopes": (2, 4)}),
        ((2, 5, 9), {"slopes": (2,), "softcap": 3.0, "bias": (1, 2, 5, 9)}),
        ((3, 5, 6), {"key_lengths": (6, 0, 2)}),
        ((3, 5, 6, 2, 1), {"key_lengths": (1, 6, 3), "causal": True}),
        ((2, 5, 6), {"bias": (2, 2, 5, 6)}),
        ((2, 5, 6), {"bias": (1, 1, 5, 6)}),
        ((2, 5, 6, 4, 2), {"bias": (2, 1, 1, 6), "key_lengths": (6, 4)}),
        ((2, 5, 6), {"bias": (1, 2, 5, 1)}),
        ((2, 5, 6), {"bias": (1, 1, 1, 1), "window_left": 2}),
        ((2, 6, 40, 4, 2), {"dropout": 0.3}),
        ((1, 7, 70), {"dropout": 0.5, "causal": True, "bias": (1, 1, 7, 70)}),
        ((2, 5, 6), {"dropout": 1e-6}),
    ]
    builds: list[Build] = [lambda make, s=s, o=o: make.case(*s, **o) for s, o in options]  # type: ignore[misc]

    def bias_of_results(make: _Maker) -> Case:
        case = make.case(2, 5, 6)
        case.bias = make.normal(2, 1, 5, 6, dtype=make.result)
        return case

    return [*builds, bias_of_results]


def _packed() -> list[Build]:
    """Packed sequences; some are empty, some tokens belong to none."""
    options: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (([5, 1, 0, 7], [5, 1, 0, 7]), {}),
        (([4, 0, 3, 2], [2, 3, 9, 0]), {"causal": True}),
        (([4, 6], [9, 3], 4, 2, 17), {"key_lengths": (7, 3), "slopes": (2, 4)}),
        (([3, 20], [3, 20], 2, 1), {"bias": (2, 1, 21, 20), "causal": True, "window_left": 4}),
        (([4, 6], [9, 40]), {"bias": (1, 2, 1, 40), "dropout": 0.3}),
        (([], []), {}),
    ]
    builds: list[Build] = [lambda make, s=s, o=o: make.packed(*s, **o) for s, o in options]  # type: ignore[misc]

    def nothing_at_all(make: _Maker) -> Case:
        case = make.case(1, 0, 0)
        case.cu_seqlens_q = case.cu_seqlens_k = make.integers(0, 0, 0)
        return case

    return [*builds, nothing_at_all]


def _integers(make: _Maker, case: Case, most: int) -> Case:
    """The case with q and k of integers, and the scale 1: scores that every backend has exactly."""
    case.q, case.k = (
        torch.randint(-most, most + 1, x.shape, generator=make.generator).to(x.device, x.dtype)
        for x in (case.q, case.k)
    )
    case.scale = 1.0
    return case


def _hazards() -> list[Build]:
    """What breaks an implementation that is only right on ordinary numbers."""

    def huge(make: _Maker) -> Case:
        return _integers(make, make.case(2, 6, 9), 12)

    def forbidden(make: _Maker) -> Case:
        case = make.case(2, 5, 6, bias=(2, 1, 5, 6))
        assert case.bias is not None
        case.bias[0, :, 1], case.bias[0, :, 2, :3], case.bias[1, :, :, 4:] = -INF, -INF, -INF
        return case

    def nearly_forbidden(make: _Maker) -> Case:
        case = _integers(make, make.case(2, 5, 6, bias=(2, 1, 5, 6)), 2)
        assert case.bias is not None
        case.bias.fill_(0)
        case.bias[0, :, 1], case.bias[0, :, 2, :3], case.bias[1, :, :, 4:] = -1e4, -1e4, -1e4
        return case

    def saturated(make: _Maker) -> Case:
        case = _integers(make, make.case(2, 5, 6, softcap=4.0), 12)
        case.k[:, 0] = 0
        return case

    return [huge, forbidden, nearly_forbidden, saturated]


def _poisoned() -> list[Build]:
    """NaN where it counts, and where it must not; a bias where the kernels of others would multiply it by 0."""

    def query(make: _Maker) -> Case:
        case = make.case(2, 5, 6, 2, 1)
        case.q[0, 2, 1, 3] = NAN
        return case

    def infinite_query(make: _Maker) -> Case:
        case = make.case(2, 5, 6, 2, 1, bias=(1, 1, 5, 6))
        case.q[0, 2, 1, 3], case.k = INF, case.k.abs() + 1
        return case

    def hidden(place: str) -> Build:
        def build(make: _Maker) -> Case:
            case = make.case(2, 6, 7, 4, 2, bias=(1, 1, 6, 7), causal=True, window_left=3)
            getattr(case, place)[0, 4, 1] = NAN
            return case

        return build

    def beyond(make: _Maker) -> Case:
        case = make.case(2, 5, 6, key_lengths=(4, 6))
        case.k[0, 4:], case.v[0, 4:] = NAN, INF
        return case

    def value_in_full_view(make: _Maker) -> Case:
        case = make.case(2, 5, 6)
        case.v[1, 3, 0] = NAN
        return case

    return [query, infinite_query, hidden("q"), hidden("k"), hidden("v"), beyond, value_in_full_view]


def _poisoned_grads() -> list[Callable[[_Maker], tuple[Case, Tensor]]]:
    def causal(make: _Maker) -> tuple[Case, Tensor]:
        case = make.case(2, 5, 6, 2, 1, bias=(1, 1, 5, 6), causal=True)
        grad_out = make.normal(2, 5, 2, 8)
        grad_out[0, 2, 1] = NAN
        return case, grad_out

    return [causal]
