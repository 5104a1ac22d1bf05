"""Random calls of public functions, and the law that they are held to.

A call is drawn in two steps: one that is right, with sizes of 0 and 1, odd strides, all dtypes, -inf, NaN and numbers
of all sizes; then, half of the time, one or two of its arguments are spoiled. The law:

- a right call gives what is documented, shapes and dtypes, without NaN where all its numbers are finite, and its
  gradients have the shapes and dtypes of the arguments;
- a spoiled call does that too, or raises ValueError or TypeError with a message that begins with an argument's name;
- both backends of a CPU give the same results, or both raise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastseq
from fastseq.testing import describe

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Ten times those of the contract tests: sums of several outputs, and gradients of them, are compared here."""

Result = tuple[tuple[int, ...], torch.dtype]
Ways = tuple[Callable[[], AbstractContextManager[Any]], ...]


@dataclasses.dataclass
class Call:
    """One call, drawn.

    Attributes:
        function: what is called.
        arguments: all of them, by name.
        results: the documented shape and dtype of each tensor that comes back; None: not tensors.
        words: what messages may begin with besides the arguments' names.
        inplace: the function writes to its arguments.
        exact: integer results are unique, as those of a search without ties are.
        spoils: wrong arguments have documented errors too.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    results: list[Result] | None = None
    words: tuple[str, ...] = ()
    inplace: bool = False
    exact: bool = True
    spoils: bool = True
    ways: Ways = (contextlib.nullcontext, lambda: fastseq.use("eager"))


CALLS: dict[str, Callable[[Draw], Call]] = {}
"""Who draws a call of each public function, by the function's name."""


def draws(*names: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Enters a function that draws calls; one of several names gets the name as well."""

    def enter(build: Callable[..., Call]) -> Callable[..., Call]:
        for name in names:
            CALLS[name] = build if len(names) == 1 else lambda draw, name=name: build(draw, name.rpartition(".")[2])
        return build

    return enter


class Draw:
    """What calls are made of.

    Attributes:
        random: hypothesis's, so that what fails is made smaller.
        ordinary: the numbers drawn so far are such that backends can be compared on them.
        finite: they are finite, and of such a size that nothing overflows.
    """

    def __init__(self, random: Random) -> None:
        self.random, self.ordinary, self.finite = random, True, True
        self.generator = torch.Generator().manual_seed(random.randrange(2**31))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choice(self, *values: Any) -> Any:
        return self.random.choice(values)

    def size(self, least: int = 0) -> int:
        """Small, often 1, sometimes 0, and now and then beyond a vector or two."""
        return max(least, self.choice(2, 1, 3, 2, 1, 0, 4, 5, 7, 9, 17))

    def sizes(self, *least: int) -> tuple[int, ...]:
        return tuple(self.size(n) for n in least)

    def dtype(self) -> torch.dtype:
        return self.choice(torch.float32, torch.float32, *FLOATS)

    def other(self, dtype: torch.dtype) -> torch.dtype:
        """The same, or now and then another."""
        return self.choice(*FLOATS) if self.chance(0.15) else dtype

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal numbers, most of the time."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.random.random()
        if kind > 0.92:
            x *= 0
        elif kind > 0.87:
            x *= 1e4
            self.ordinary = False
            self.finite = self.finite and dtype != torch.float16  # products of them may have that type, and overflow
        elif kind > 0.84:
            x *= 1e30
            self.ordinary = self.finite = False
        elif kind > 0.80:
            what = self.choice(-torch.inf, torch.nan, torch.inf, -1e4)
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.3, what, x)
            self.ordinary = False
            self.finite = self.finite and what == -1e4
        return self.layout(x.to(dtype))

    def probabilities(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self.layout(x.softmax(-1).to(dtype))

    def integers(self, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype | None = None) -> Tensor:
        """In [low, high), or `low` where there is none."""
        x = torch.randint(low, max(high, low + 1), shape, generator=self.generator)
        return self.layout(x.to(self.choice(torch.int64, *INTEGERS) if dtype is None else dtype))

    def off(self, x: Tensor, value: int) -> Tensor:
        """Ids, some of them `value`, which stands for none."""
        share = self.choice(0.0, 0.3, 1.0)
        off = torch.rand(x.shape, generator=self.generator) < share
        return self.layout(torch.where(off, value, x).to(x.dtype))

    def mask(self, shape: tuple[int, ...], *, bytes_too: bool = True) -> Tensor | None:
        """Holes, padding, whole rows off, all on or off, or none."""
        if self.chance(0.25):
            return None
        lengths = torch.randint(0, shape[-1] + 1, shape[:-1], generator=self.generator)
        padding = torch.arange(shape[-1]) < lengths[..., None]
        holes = torch.rand(shape, generator=self.generator) < self.choice(0.0, 0.5, 1.0)
        mask = self.choice(padding, padding.flip(-1), holes)
        return self.layout(mask.to(torch.uint8) if bytes_too and self.chance(0.2) else mask)

    def lengths(self, shape: tuple[int, ...], most: int) -> Tensor:
        return self.integers(shape, 0, most + 1)

    def bounds(self, count: int, longest: int) -> Tensor:
        """(count+1,) offsets of sequences, empty ones among them."""
        lengths = torch.randint(0, longest + 1, (count,), generator=self.generator)
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(self.choice(torch.int32, torch.int64))

    def layout(self, x: Tensor) -> Tensor:
        """The same numbers with other strides."""
        kind = self.random.random()
        if kind < 0.75 or not x.dim():
            return x
        if kind < 0.85:
            return torch.stack([x, x], -1)[..., 0]
        if kind < 0.95:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x[:1].expand(x.shape) if x.shape[0] else x

    def spoil(self, arguments: dict[str, Any]) -> None:
        """Puts something else in the place of one or two arguments."""
        for _ in range(self.choice(1, 1, 2)):
            name = self.choice(*arguments)
            arguments[name] = self.something_else(arguments[name])

    def something_else(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.chance(0.85):
            return self.other_tensor(value)
        if isinstance(value, bool):
            return self.choice(None, "yes", 2, 0.5, not value)
        if isinstance(value, int):
            return self.choice(-1, 0, 1, 2, 50, 1.5, "a", None, True, torch.tensor(2), float("nan"))
        if isinstance(value, float):
            return self.choice(-1.0, 0.0, 0.5, 1.0, 2.0, float("nan"), float("inf"), "a", None, True, torch.tensor(0.5))
        if isinstance(value, (tuple, list)) and value and self.chance(0.5):
            return self.choice(value[:-1], (*value, value[-1]), [self.something_else(v) for v in value])
        return self.choice(None, "text", 3, 2.5, (), [1, 2], (-5, 2), ("a", "b"), (1.5, 2), {}, torch.ones(2), b"x")

    def other_tensor(self, x: Tensor) -> Any:
        """A tensor of another shape, dtype, device or with other values."""
        kinds: list[Callable[[], Any]] = [
            lambda: x[None],
            lambda: x[0] if x.dim() and len(x) else x.flatten(),
            lambda: x.flatten(),
            lambda: x.new_zeros(()),
            lambda: x.new_zeros(0),
            lambda: x.to("meta"),
            lambda: x.to(self.choice(*FLOATS, *INTEGERS, torch.bool, torch.complex64)),
        ]
        if x.dim():
            d = self.random.randrange(x.dim())
            kinds += [lambda: x.narrow(d, 0, max(x.shape[d] - 1, 0)), lambda: torch.cat([x, x], d)]
            kinds += [
                lambda: x.transpose(0, d),
                lambda: x.new_zeros([0 if i == d else n for i, n in enumerate(x.shape)]),
            ]
        if x.dtype in FLOATS:
            kinds.append(lambda: torch.full_like(x, self.choice(float("nan"), float("inf"), -float("inf"), 1e4, 0)))
        elif x.dtype != torch.bool and not x.dtype.is_complex:
            kinds += [lambda: x + self.choice(1, 3, 100), lambda: x - self.choice(1, 2, 101), lambda: x.flip(0)]
        return self.choice(*kinds)()


@dataclasses.dataclass
class Outcome:
    """What a call gave: results and gradients by name, or the error."""

    results: Any = None
    gradients: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    error: Exception | None = None


def check(build: Callable[[Draw], Call], random: Random, log: Callable[[str], object]) -> None:
    """Draws a call and holds it to the law."""
    draw = Draw(random)
    call = build(draw)
    right = not call.spoils or draw.chance(0.5)
    if not right:
        draw.spoil(call.arguments)
    elif call.spoils and draw.chance(0.05):
        call.arguments = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in call.arguments.items()}
        right = False  # results without values, and checks that cannot look at any
    mode = draw.choice("plain", "plain", "gradients", "gradients", "inference", "autocast")
    words = f"{getattr(call.function, '__qualname__', call.function)}({in_words(call.arguments)}) {mode}"
    log(words)
    outcomes = [run(call, way, mode) for way in call.ways]
    try:
        for outcome in outcomes:
            check_outcome(call, outcome, right, draw, mode)
        check_alike(call, outcomes, right and draw.ordinary, mode)
    except AssertionError as error:
        raise AssertionError(f"{error}\nin {words}") from None


def run(call: Call, way: Callable[[], AbstractContextManager[Any]], mode: str) -> Outcome:
    arguments = dict(call.arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            arguments[name] = x.detach().clone() if call.inplace else x.detach()
            if mode == "gradients" and x.is_floating_point() and not call.inplace:
                arguments[name].requires_grad_()
    torch.manual_seed(1)
    try:
        with way(), mode_of(mode):
            results = call.function(**arguments)
    except (ValueError, TypeError) as error:
        return Outcome(error=error)
    outcome = Outcome(results)
    outputs = [x for x in tensors(results) if x.requires_grad]
    if mode == "gradients" and outputs and outputs[0].device.type != "meta":
        sum((x.sum(dtype=torch.float64) for x in outputs), torch.zeros(())).backward()
        outcome.gradients = {name: x.grad for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
        for name, gradient in outcome.gradients.items():
            if gradient is not None:
                assert (gradient.shape, gradient.dtype) == (arguments[name].shape, arguments[name].dtype), name
    if call.inplace:
        outcome.gradients = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    return outcome


@contextlib.contextmanager
def mode_of(mode: str) -> Iterator[None]:
    with (
        torch.inference_mode() if mode == "inference" else contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        yield


def check_outcome(call: Call, outcome: Outcome, right: bool, draw: Draw, mode: str) -> None:
    if outcome.error is not None:
        known = {*call.arguments, *inspect.signature(call.function).parameters, *call.words}
        names = "|".join(map(re.escape, known))
        documented = re.match(rf"({names})(\b|\W)", str(outcome.error))
        assert documented, f"{type(outcome.error).__name__} names no argument: {outcome.error}"
        assert not right, f"{type(outcome.error).__name__} from a right call: {outcome.error}"
        return
    if not right:
        return
    outputs = tensors(outcome.results)
    if call.results is not None and mode != "autocast":
        found = [(tuple(x.shape), x.dtype) for x in outputs]
        assert found == [(tuple(s), d) for s, d in call.results], f"results {found}, documented {call.results}"
    if draw.finite:
        for name, x in [*enumerate(outputs), *outcome.gradients.items()]:
            assert x is None or not x.isnan().any(), f"NaN in {name}, from finite arguments"


def check_alike(call: Call, outcomes: list[Outcome], ordinary: bool, mode: str) -> None:
    first = outcomes[0]
    for other in outcomes[1:]:
        assert (first.error is None) == (other.error is None), f"one raises only: {first.error!r}, {other.error!r}"
        if ordinary and first.error is None:
            involved = [*call.arguments.values(), *tensors(first.results)]  # a module has a precision of its own
            dtypes = [x.dtype for x in involved if isinstance(x, Tensor) and x.dtype in TOLERANCES]
            least = max((TOLERANCES[d] for d in dtypes), default=0.0)
            least = max(least, TOLERANCES[torch.bfloat16] * (mode == "autocast"))
            alike(first.results, other.results, call.exact, least, "results")
            alike(first.gradients, other.gradients, call.exact, 4 * least, "gradients")


def alike(a: Any, b: Any, exact: bool, tolerance: float, where: str) -> None:
    if isinstance(a, Tensor):
        if a.is_floating_point():
            limit = max(tolerance, TOLERANCES[a.dtype])
            torch.testing.assert_close(
                a, b, rtol=limit, atol=limit, equal_nan=True, msg=lambda text: f"{where}: {text}"
            )
        else:
            assert a.shape == b.shape, where
            assert not exact or torch.equal(a, b), f"{where}: {a} and {b}"
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            alike(a[key], b[key], exact, tolerance, f"{where}: {key}")
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            alike(x, y, exact, tolerance, f"{where}[{i}]")
    elif isinstance(a, float):
        assert abs(a - b) <= max(tolerance, 1e-6) * max(1.0, abs(a)) or a == b, f"{where}: {a} and {b}"
    elif isinstance(a, (int, str, bool, type(None))):
        assert not exact or a == b, f"{where}: {a} and {b}"


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [x for v in value for x in tensors(v)] if isinstance(value, (tuple, list)) else []


def in_words(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={describe([value])}" for name, value in arguments.items())
