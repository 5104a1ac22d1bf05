"""Argument checks of the models: shapes, dtypes and devices always, values only where nobody waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.functional.checks import WORKING, can_look

__all__ = ["check_floats", "check_ids", "check_mask"]

IDS = (torch.int64, torch.int32)


def check_ids(
    name: str,
    x: Tensor,
    letters: str,
    shape: tuple[int, ...],
    like: Tensor,
    low: int,
    high: int,
    off: int | None = None,
) -> None:
    """Raise the error that says what is wrong with ids or lengths, if anything is.

    Args:
        name: What the caller calls them.
        x: int64 or int32 in [low, high), or `off` where there is none.
        letters: The wanted shape in letters.
        shape: The wanted shape; -1 is any size.
        like: A tensor where x must be.
        low: The least id.
        high: One more than the greatest.
        off: What stands for none.

    Raises:
        ValueError: A shape, a device or (on a CPU) an id is not as above.
        TypeError: x is not a tensor of that dtype.
    """
    _check(name, x, letters, shape, like, IDS)
    if not can_look(x):
        return
    known = x if off is None else x.masked_fill(x == off, low)
    least, most = (int(value) for value in known.aminmax())
    if least < low or most >= high:
        raise ValueError(f"{name}: got {least if least < low else most}, wanted {low} to {high - 1}")


def check_mask(name: str, x: Tensor, letters: str, shape: tuple[int, ...], like: Tensor) -> None:
    """The same for a mask, of any real dtype; the errors are those of `check_ids`."""
    _check(name, x, letters, shape, like, None)


def check_floats(name: str, x: Tensor, letters: str, shape: tuple[int, ...], like: Tensor) -> None:
    """The same for floating-point numbers; the errors are those of `check_ids`."""
    _check(name, x, letters, shape, like, tuple(WORKING))


def _check(
    name: str, x: Tensor, letters: str, shape: tuple[int, ...], like: Tensor, dtypes: tuple[torch.dtype, ...] | None
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
    if x.dim() != len(shape) or any(n not in (-1, m) for n, m in zip(shape, x.shape, strict=True)):
        sizes = ", ".join("*" if n < 0 else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {letters} = ({sizes})")
    if x.dtype not in dtypes if dtypes is not None else x.is_complex():
        wanted = "a real dtype" if dtypes is None else " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got {str(x.dtype).removeprefix('torch.')}, wanted {wanted}")
    if x.device != like.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, wanted {like.device}")
