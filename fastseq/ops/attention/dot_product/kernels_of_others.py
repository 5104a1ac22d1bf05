"""What the adapters of flash_attn's kernels share: those that torch has inside (sdpa), and the package's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product.arguments import Arguments
from fastseq.ops.attention.dropout import threshold

__all__ = ["from_theirs", "grads_from_theirs", "inputs", "limits", "limits_of_grad", "right", "to_theirs"]

INF, NAN = math.inf, math.nan
HALVES = (torch.bfloat16, torch.float16)


def limits(args: Arguments, *, softcap: bool) -> str | None:
    """What these kernels lack; `softcap` is whether they have that."""
    size = args.q.shape[-1]
    if args.q.dtype not in HALVES:
        return f"needs one of bfloat16, float16, got {str(args.q.dtype).removeprefix('torch.')}"
    lacking = {
        "bias": args.bias is not None,
        "key_lengths": args.key_lengths is not None,
        "dropout by this op's hash": threshold(args.dropout) > 0,
        "softcap": args.softcap > 0 and not softcap,
        "slopes without a shift of the logsumexp": args.slopes is not None,
    }
    for name, asked in lacking.items():
        if asked:
            return f"has no {name}"
    if size % 8 or size > 256:
        return f"needs heads of a multiple of 8 numbers, at most 256, got {size}"
    sequences = args.q.shape[0] if args.cu_seqlens_q is None else len(args.cu_seqlens_q) - 1
    some = sequences and args.q.numel() and args.k.numel()
    return None if some else "needs at least one sequence, one query and one key"


def limits_of_grad(grad_out: Tensor | None, grad_lse: Tensor | None) -> str | None:
    """What their backward passes lack besides."""
    return None if grad_out is not None and grad_lse is None else "has no gradient of the logsumexp"


def inputs(args: Arguments) -> list[Tensor]:
    """q, k and v as theirs: packed ones are (tokens,H,D)."""
    return [_aligned(_theirs(x, args)) for x in args[:3]]


def right(args: Arguments) -> int:
    """The right window: causal is one of 0."""
    return 0 if args.causal else args.window_right


def from_theirs(out: Tensor, lse: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """What they return as ours: where nothing is visible, or a NaN is, their lse is +inf."""
    nowhere = _nowhere(args.cu_seqlens_q, args.q)
    if nowhere is not None:
        out = out.masked_fill_(nowhere[:, None, None], 0)[None]
        lse = lse.masked_fill_(nowhere, INF)[None]
    ours = torch.where(out[..., 0].isnan().transpose(1, 2), NAN, -INF)
    return out, torch.where(lse == INF, ours, lse)


def to_theirs(grad_out: Tensor, out: Tensor, lse: Tensor, args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """What their backward passes take, from ours."""
    grad_out, out = (_aligned(_theirs(x, args)) for x in (grad_out, out))
    return grad_out, out, _theirs(lse.masked_fill(lse == -INF, INF), args)


def grads_from_theirs(grads: Sequence[Tensor], args: Arguments) -> tuple[Tensor, ...]:
    """The gradients to q, k and v as ours, and that to a bias that is not there."""
    made = list(grads)
    if args.cu_seqlens_q is not None:
        masks = [_nowhere(args.cu_seqlens_q, args.q), *[_nowhere(args.cu_seqlens_k, args.k)] * 2]
        made = [
            g.masked_fill_(mask[:, None, None], 0)[None]
            for g, mask in zip(made, masks, strict=True)
            if mask is not None
        ]
    return *(g.contiguous() for g in made), args.number.new_empty(0)


def _theirs(x: Tensor, args: Arguments) -> Tensor:
    return x if args.cu_seqlens_q is None else x[0]


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied unless its rows begin at multiples of 16 bytes, as those kernels load them."""
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1])
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _nowhere(offsets: Tensor | None, x: Tensor) -> Any:
    """(tokens,) which are of no packed sequence, which those kernels leave as they were; None in a dense call."""
    if offsets is None:
        return None
    tokens = torch.arange(x.shape[1], device=x.device)
    return (tokens < offsets[0]) | (tokens >= offsets[-1])
