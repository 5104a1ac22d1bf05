"""Sample inputs, and the check of a backend against the reference; public, for outside backends to use.

from fastseq.testing import assert_matches_reference
assert_matches_reference("crf_nll", "cpu")
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.registry import OPS, Backend, BackendError, Op

__all__ = [
    "TOLERANCES",
    "assert_matches_reference",
    "backend_of",
    "compare",
    "describe",
    "sample_inputs",
    "to_device",
]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Absolute, and relative to the reference, by the dtype of an output."""


def sample_inputs(
    op: Op | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Iterator[tuple[Any, ...]]:
    """The op's own samples: ordinary, awkward (empty, strided, masked) and hostile (-inf, NaN, lost paths).

    Args:
        op: An op, or its name.
        device: Where the tensors are.
        dtype: Of the op's first floating-point tensor.
        seed: Another seed gives other numbers in the same situations.
    """
    return _op(op).samples(device, dtype, seed)


def assert_matches_reference(
    op: Op | str,
    backend: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tolerance: float | None = None,
) -> int:
    """Hold a backend to the reference on all sample inputs of an op, and return how many it ran.

    Args:
        op: An op, or its name.
        backend: Its name; None is whichever would be chosen. Inputs that it refuses are passed over.
        device: Where the op runs; the reference runs on the CPU.
        dtype: Of the op's first floating-point tensor.
        seed: Of the sample inputs.
        tolerance: Absolute and relative; by default that of each output's dtype in `TOLERANCES`, or of the least exact
            argument's where the op's matrix products have that.

    Raises:
        AssertionError: An output differs; the message has the sample's number and arguments in words.
        BackendError: The backend could run no sample at all.
    """
    op = _op(op)
    count = 0
    for number, args in enumerate(sample_inputs(op, device=device, dtype=dtype, seed=seed)):
        chosen = op.choose(*args) if backend is None else backend_of(op, backend)
        if chosen.refusal(*args) is not None:
            continue
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        got = chosen.run(*args)
        wanted = _references(op, dtype, seed)[number]
        try:
            floats = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            by_default = max(TOLERANCES[d] for d in floats) if op.half_products else None
            compare(to_device(got, "cpu"), wanted, by_default if tolerance is None else tolerance)
            compare(list(args), before, 0.0)
        except AssertionError as error:
            where = f"{op.name} on {chosen.name}, sample {number} of seed {seed}: {describe(args)}"
            raise AssertionError(f"{where}\n{error}") from None
        count += 1
    if not count:
        raise BackendError(f"{backend!r} ran no sample of {op.name}:\n{op.explain(*args)}")
    return count


@functools.cache
def _references(op: Op, dtype: torch.dtype, seed: int) -> list[Any]:
    """What the reference makes of each sample: plain loops, so that it is not run again for every backend."""
    reference = backend_of(op, "reference")
    return [reference.run(*args) for args in sample_inputs(op, dtype=dtype, seed=seed)]


def compare(got: Any, wanted: Any, tolerance: float | None = None) -> None:
    """Hold outputs to the reference's: dtype, shape, NaN for NaN, infinity for infinity, numbers nearly.

    Integer outputs beside a NaN score (the path of a row with NaN in it) may be anything; all others must be
    equal.
    """
    if not isinstance(got, Sequence):
        got, wanted = (got,), (wanted,)
    assert len(got) == len(wanted), f"{len(got)} outputs, wanted {len(wanted)}"
    scores = [w for w in wanted if isinstance(w, Tensor) and w.is_floating_point()]
    for g, w in zip(got, wanted, strict=True):
        if not isinstance(w, Tensor):
            assert g == w
            continue
        if not w.is_floating_point() and w.dtype != torch.bool and len(scores) == 1 and scores[0].dim() < w.dim():
            unsure = scores[0].isnan()[(...,) + (None,) * (w.dim() - scores[0].dim())]
            g, w = g.masked_fill(unsure, 0), w.masked_fill(unsure, 0)
        limit = TOLERANCES.get(w.dtype, 0.0) if tolerance is None else tolerance
        torch.testing.assert_close(g, w, rtol=limit, atol=limit, equal_nan=True)


def backend_of(op: Op, name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: The op has none.
    """
    for backend in op.backends:
        if backend.name == name:
            return backend
    raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(b.name for b in op.backends)}")


def to_device(values: Any, device: torch.device | str) -> Any:
    """Tensors, alone or in a sequence, on a device; strides are kept where it is the same device."""
    if isinstance(values, Tensor):
        return values.to(device)
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


def describe(args: Sequence[Any]) -> str:
    """Arguments in words: the dtype, shape and (if not contiguous) strides of tensors."""

    def word(a: Any) -> str:
        if not isinstance(a, Tensor):
            return repr(a)
        strides = "" if a.is_contiguous() else f" strides {a.stride()}"
        return f"{str(a.dtype).removeprefix('torch.')}{tuple(a.shape)}{strides}"

    return ", ".join(word(a) for a in args)


def _op(op: Op | str) -> Op:
    return OPS[op] if isinstance(op, str) else op
