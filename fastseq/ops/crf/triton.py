"""Fused kernels for CUDA devices where there is no compiler: nll, nll_grad and viterbi in Triton, K <= 128.

nll is two launches, sweep and exact; nll_grad four: sweep, posterior, exact, reduce; viterbi one. float64 goes through
exact alone. Nothing here waits for the device or asks it for a size: all can be captured in a CUDA graph. Scratch is
8 bytes an emission, 16 to 24 a position, and the partial sums, whose number depends on the sizes alone.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from fastseq.ops.crf import triton_log_domain, triton_posterior, triton_scaled, triton_search

__all__ = ["COMPILE", "nll", "nll_grad", "options", "viterbi"]

COMPILE: dict[str, Any] = {
    "enable_fp_fusion": True,  # said, as Triton 3.10 changes the default
    "maxnreg": 255,  # all there are, for 8 warps: or ptxas spills a little to fit more programs than we have
}


def options(kernel: str, K: int) -> dict[str, int]:
    """The compile-time sizes and the warps of a kernel: those with which none spills on any architecture."""
    block = max(16, triton.next_power_of_2(K))
    warps, sizes = {
        "sweep": ((1, 1, 4, 8), {"BT": 128}),
        "posterior": ((2, 4, 4, 8), {"BT": 16}),
        "exact": ((2, 4, 8, 4), {"BT": 128, "BC": 8 if block == 128 else 16}),
        "viterbi": ((1, 1, 4, 8), {"BT": 128}),
    }[kernel]
    return {"BK": block, **sizes, "num_warps": warps[(16, 32, 64, 128).index(block)]}


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch on the current stream of the current device."""
    kernel[grid](*args, **COMPILE, **constants)


def _bits(tensor: Tensor) -> Tensor:
    """What a kernel gets for it: bfloat16 goes by its bits, and bool as bytes."""
    return tensor.view({torch.bfloat16: torch.int16, torch.bool: torch.uint8}.get(tensor.dtype, tensor.dtype))


def _strided(tensor: Tensor | None, dimensions: int) -> tuple[Any, ...]:
    """A kernel's arguments for a tensor that may be strided, or missing: the tensor and its strides."""
    return (None, *[0] * dimensions) if tensor is None else (_bits(tensor), *tensor.stride())


def _scratch(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def nll(
    emissions: Tensor, tags: Tensor | None, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """The value alone, (B,); see `fastseq.ops.crf`."""
    B, T, K = emissions.shape
    values = start.new_empty(B)
    if not emissions.numel():
        return values.zero_()
    double = emissions.dtype == torch.float64
    rows = *_strided(emissions, 3), *_strided(tags, 2), *_strided(mask, 2)
    model = transitions.contiguous(), start.contiguous(), end.contiguous()
    positions, marks = _scratch(start, torch.int32, B, T), None
    with torch.cuda.device_of(emissions):
        if not double:
            marks = _scratch(start, torch.int32, B)
            _launch(
                triton_scaled.sweep, (B, 1), *rows, *model, None, 0, _as_int(1.0), None, None, positions, None, None,
                marks, values, B, T, K, **options("sweep", K)
            )  # fmt: skip
        programs = min(B, 1024)
        vectors = _scratch(start, torch.float64, programs, 2, K)
        _launch(
            triton_log_domain.exact, (programs,), *rows[:4], None, 0, 0, 0, *rows[4:], *model, None, 0, _as_int(1.0),
            None, vectors, positions, None, marks, values, None, None, B, T, K, **options("exact", K)
        )  # fmt: skip
    return values


def nll_grad(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    weights: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """The weighted sum and its gradient; see `fastseq.ops.crf`. A row of weight 0 is left out."""
    B, T, K = emissions.shape
    total, gradient = start.new_empty(()), torch.empty_like(emissions)
    parameters = [p.new_empty(p.shape) for p in (transitions, start, end)]
    if not emissions.numel():
        return tuple(o.zero_() for o in (total, gradient, *parameters))
    double = emissions.dtype == torch.float64
    x, t, m, g, w = (
        _strided(v, n) for v, n in ((emissions, 3), (tags, 2), (mask, 2), (gradient, 3), (weights, 1))
    )  # fmt: skip
    w = *w, _as_int(scale)
    model = transitions.contiguous(), start.contiguous(), end.contiguous()
    size = K * K + 2 * K
    values, marks, partials = _scratch(start, torch.float64, B), None, None
    positions, slots = (_scratch(start, torch.int32, 1 if double else 2, B, T) for _ in range(2))
    messages = _scratch(start, torch.float64, B * T * K)  # two floats each, or one log alpha
    parts = 0 if double else _part_count(B, T, K)
    exact_parts = min(B, 128)
    exact_partials, used = _scratch(start, torch.float64, exact_parts, size), _scratch(start, torch.int32, exact_parts)
    vectors = _scratch(start, torch.float64, exact_parts, 2, K)
    with torch.cuda.device_of(emissions):
        if not double:
            marks, partials = _scratch(start, torch.int32, 2, B), _scratch(start, torch.float32, parts, size)
            scales, lengths = _scratch(start, torch.float32, B, T), _scratch(start, torch.int32, 2, B)
            floats = messages.view(torch.float32)
            _launch(
                triton_scaled.sweep, (B, 2), *x, *t, *m, *model, *w, floats, scales, positions, slots, lengths, marks,
                values, B, T, K, **options("sweep", K)
            )  # fmt: skip
            _launch(
                triton_posterior.posterior, (parts,), *x, *g, *t, model[0], *w, floats, scales, positions, slots,
                lengths, marks, partials, B, T, K, **options("posterior", K)
            )  # fmt: skip
        _launch(
            triton_log_domain.exact, (exact_parts,), *x, *g, *t, *m, *model, *w, messages, vectors, positions, slots,
            marks, values, exact_partials, used, B, T, K, **options("exact", K)
        )  # fmt: skip
        _launch(
            triton_posterior.reduce, (triton.cdiv(size, 256),), partials, parts, exact_partials, used, exact_parts,
            values, *w, B, total, *parameters, K, BLOCK=256, num_warps=4
        )  # fmt: skip
    return total, gradient, *parameters


def _part_count(B: int, T: int, K: int) -> int:
    """How many programs share the blocks of positions, each with sums of its own: at most 8 MB of sums, or 128."""
    return min(B * -(-T // 16), max(128, min(1024, (1 << 21) // K**2)))


def _as_int(number: float) -> int:
    """The bits of a float64: Triton would round a float argument to float32."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def viterbi(
    emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The best path (B,T), -100 where off, and its score (B,); see `fastseq.ops.crf`."""
    B, T, K = emissions.shape
    paths, scores = _scratch(start, torch.int64, B, T), start.new_empty(B)
    if not emissions.numel():
        return paths, scores.zero_()
    positions, pointers = _scratch(start, torch.int32, B, T), _scratch(start, torch.uint8, B, T, K)
    model = transitions.contiguous(), start.contiguous(), end.contiguous()
    with torch.cuda.device_of(emissions):
        _launch(
            triton_search.viterbi, (B,), *_strided(emissions, 3), *_strided(mask, 2), *model, paths, scores, positions,
            pointers, T, K, **options("viterbi", K)
        )  # fmt: skip
    return paths, scores
