# mypy: ignore-errors
# ruff: noqa: RET505 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""Floats of any type in Triton kernels, on a GPU and in the interpreter.

bfloat16 comes in as int16: to shift bits is right on every GPU and in Triton's interpreter, whose own conversions are
not.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["as_float", "from_float", "operand"]


@triton.jit
def as_float(values):
    """Any type of emissions as float32, bfloat16 being int16; float64 as it is."""
    if values.dtype == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@triton.jit
def from_float(values, dtype: tl.constexpr):
    """Floats as the type of the gradient, to nearest and ties to even."""
    if dtype == tl.int16:
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)
    else:
        return values.to(dtype)


@triton.jit
def operand(raw, PRODUCTS: tl.constexpr):
    """A tile as the type of the products; "emulated" is bfloat16 for the interpreter: rounded, but kept as float32."""
    if PRODUCTS == "bfloat16":
        if raw.dtype == tl.int16:
            return raw.to(tl.bfloat16, bitcast=True)
        else:
            return raw.to(tl.bfloat16)
    elif PRODUCTS == "emulated":
        if raw.dtype == tl.int16:
            return as_float(raw)
        else:
            return as_float(from_float(raw, tl.int16))
    elif PRODUCTS == "float16":
        return as_float(raw).to(tl.float16)
    else:
        return as_float(raw)
