"""Argument checks: a few attribute reads when all is well, else an error that says what is wrong.

They are on the way of every call, so they look at shapes, dtypes and devices only, never at values, and only
once.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

OFF = -100
"""The tag of a position that does not exist."""

WORKING = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""Emissions' dtype: the dtype of the parameters and the results."""

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Model = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""emissions, mask, transitions, start, end: a CRF's arguments, in the order and the dtypes of the ops."""


def check_model(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None) -> Model:
    """Check a CRF's arguments; convert what has another dtype.

    Args:
        emissions: (B,T,K) floating point.
        transitions: (K,K) floating point.
        start: (K,) floating point.
        end: (K,) floating point.
        mask: (B,T) bool or uint8, or None.
    """
    try:
        shape, device, working = emissions.shape, emissions.device, WORKING[emissions.dtype]
        tags = shape[2:]
        ready = (
            len(shape) == 3
            and transitions.shape == tags + tags
            and start.shape == tags == end.shape
            and transitions.dtype == start.dtype == end.dtype == working
            and transitions.device == start.device == end.device == device
            and (mask is None or (mask.shape == shape[:2] and mask.dtype == torch.bool and mask.device == device))
        )
    except (AttributeError, KeyError):  # not a tensor, or of a dtype that is not in WORKING
        ready = False
    if ready:
        return emissions, mask, transitions, start, end
    _complain(emissions, transitions, start, end, mask)
    emissions, transitions, start, end = _same_precision(emissions, transitions, start, end)
    return emissions, None if mask is None else mask.bool(), transitions, start, end


def check_tags(emissions: Tensor, tags: Tensor) -> Tensor:
    """Check tag ids; convert them to int64.

    Args:
        emissions: (B,T,K) checked.
        tags: (B,T) integers.
    """
    expect("tags", tags, "(B, T), batch first,", emissions.shape[:2], emissions, INTEGERS)
    return tags if tags.dtype == torch.int64 else tags.long()


def is_partial(emissions: Tensor, tags: Tensor) -> bool:
    """Whether `tags` is a set of tags for each position; checks it if so.

    Args:
        emissions: (B,T,K) checked.
        tags: (B,T,K) bool, or else (B,T).
    """
    if not isinstance(tags, Tensor) or tags.dtype != torch.bool:
        return False
    expect("tags", tags, "(B, T, K) for bool tags, batch first,", emissions.shape, emissions, (torch.bool,))
    return True


def at_least_one(name: str, value: int) -> None:
    """Check a count."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, wanted at least 1")


def can_look(x: Tensor) -> bool:
    """Whether there are values to look at, without waiting for a device or a tracer."""
    return x.device.type == "cpu" and x.numel() > 0 and type(x) is Tensor and not torch.compiler.is_compiling()


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Check a whole number; a tensor of one is one."""
    if isinstance(value, Tensor):
        fits = value.numel() == 1 and value.dtype in INTEGERS and not value.is_meta
    else:
        fits = not isinstance(value, bool) and hasattr(type(value), "__index__")
    if not fits:
        raise TypeError(f"{name}: got {_what(value)}, wanted an int")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name}: got {number}, wanted at least {least}")
    return number


def number(name: str, value: Any) -> float:
    """Check a finite number; a tensor of one is one."""
    if isinstance(value, Tensor):
        fits = value.numel() == 1 and value.dtype in (*WORKING, *INTEGERS) and not value.is_meta
    else:
        fits = not isinstance(value, bool) and (hasattr(type(value), "__float__") or hasattr(type(value), "__index__"))
    if not fits:
        raise TypeError(f"{name}: got {_what(value)}, wanted a number")
    result = float(value)
    if not -math.inf < result < math.inf:  # math.isfinite cannot be traced with a number that varies
        raise ValueError(f"{name}: got {result}, wanted a finite number")
    return result


def flag(name: str, value: Any) -> bool:
    """Check a switch: anything that is true or false."""
    try:
        return bool(value)
    except (RuntimeError, ValueError):  # a tensor or an array of several
        raise TypeError(f"{name}: got {_what(value)}, wanted True or False") from None


def boundaries(name: str, offsets: Any, x: Tensor) -> Tensor:
    """Check the (N+1,) boundaries of packed sequences where q is, as int32."""
    size = offsets.shape[0] if isinstance(offsets, Tensor) and offsets.dim() and offsets.numel() else 1
    expect(name, offsets, "(N + 1,)", (size,), x, INTEGERS, lead="q")
    return cast(Tensor, offsets.int())


def longest(name: str, offsets: Tensor, given: Any) -> int:
    """The longest packed sequence: what was given, or else what checked boundaries say, for which a GPU is waited."""
    if given is not None:
        return integer(name, given, 0)
    if offsets.is_meta:
        raise ValueError(f"{name}: got None, wanted a number: boundaries on the meta device have no values")
    return max(int((offsets[1:] - offsets[:-1]).max()), 0) if len(offsets) > 1 else 0


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {_short(value.dtype)} tensor of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def check_generator(generator: torch.Generator | None) -> None:
    """Check where random numbers come from."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, wanted a torch.Generator or None")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where x is; None where it is off, or not known, as for meta tensors."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves alone what is on x's device."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def expect(
    name: str,
    x: Tensor,
    letters: str,
    shape: tuple[int, ...],
    emissions: Tensor,
    dtypes: tuple[torch.dtype, ...] = tuple(WORKING),
    lead: str = "emissions",
) -> None:
    """Raise the error that says what is wrong with the argument `name`, if anything is.

    Args:
        name: What the caller calls it.
        x: (*shape) the argument.
        letters: The wanted shape in letters.
        shape: The wanted shape.
        emissions: (B,T,K) whose device is wanted.
        dtypes: The wanted dtypes.
        lead: What the caller calls `emissions`.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {letters} = {tuple(shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got {_short(x.dtype)}, wanted {' or '.join(map(_short, dtypes))}")
    if x.device != emissions.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, wanted {emissions.device}, where {lead} is")


def _complain(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None) -> None:
    """Raise the error that says what is wrong with a CRF's arguments, beyond dtypes to convert."""
    if isinstance(emissions, Tensor) and emissions.dim() != 3:
        got = tuple(emissions.shape)
        raise ValueError(f"emissions: got shape {got}, wanted (B, T, K), batch first")
    expect("emissions", emissions, "(B, T, K)", getattr(emissions, "shape", ()), emissions)
    k = emissions.shape[2]
    expect("transitions", transitions, "(K, K)", (k, k), emissions)
    expect("start", start, "(K,)", (k,), emissions)
    expect("end", end, "(K,)", (k,), emissions)
    if mask is not None:
        expect("mask", mask, "(B, T), batch first,", emissions.shape[:2], emissions, (torch.bool, torch.uint8))


def _same_precision(emissions: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Emissions and parameters in dtypes that the ops take together: float64 if any is."""
    if all(x.dtype != torch.float64 for x in (emissions, *parameters)):
        return emissions, *(p.float() for p in parameters)
    return emissions.double(), *(p.double() for p in parameters)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
