"""What attention, disentangled attention and the functions of `fastseq.flash_attn` check and convert alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.functional.checks import WORKING, autocast_dtype, expect, integer

__all__ = ["check_dropout", "check_slopes", "check_window", "draw_seed", "under_autocast"]


def under_autocast(q: Tensor, *others: Any) -> list[Any]:
    """All in autocast's dtype, if that is on, or in float64 if q is: as torch's scaled_dot_product_attention has it.

    Args:
        q: The queries.
        others: Tensors, or None.
    """
    dtype = autocast_dtype(q)
    if dtype is None:
        return [q, *others]
    dtype = torch.float64 if q.dtype == torch.float64 else dtype
    return [None if x is None else x.to(dtype) for x in (q, *others)]


def check_dropout(dropout_p: Any) -> float:
    """Check a dropout probability."""
    if isinstance(dropout_p, Tensor):
        raise TypeError(
            "dropout_p: got a Tensor; flash_attn's 4th positional argument is dropout_p, a mask belongs in "
            "attn_bias / key_lengths"
        )
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, wanted a number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, wanted at least 0 and less than 1")
    return float(dropout_p)


def draw_seed(dropout: float, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
    """The seed of a call's dropout where x is, (1,) int64; None where nothing is dropped."""
    if not dropout:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)


def check_window(window_size: Any, *, any_negative: bool = False) -> tuple[int, int]:
    """Check how many keys are seen to the left and to the right; -1, or `any_negative` number, is no limit."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: got {window_size!r}, wanted two ints, (left, right)")
    left, right = (integer("window_size", x) for x in window_size)
    if any_negative:
        return max(left, -1), max(right, -1)
    if min(left, right) < -1:
        raise ValueError(f"window_size: got {(left, right)}, wanted 0 or more each, or -1 for no limit")
    return left, right


def check_slopes(slopes: Tensor | None, q: Tensor, sequences: int) -> Tensor | None:
    """Check ALiBi's slopes, (Hq,) or (sequences,Hq); they have no gradient."""
    if slopes is None:
        return None
    heads = q.shape[-2]
    rows = isinstance(slopes, Tensor) and slopes.dim() == 2
    shape, letters = ((sequences, heads), "(B, Hq)") if rows else ((heads,), "(Hq,) or (B, Hq), here (Hq,)")
    expect("alibi_slopes", slopes, letters, shape, q, lead="q")
    return slopes.detach().to(WORKING[q.dtype])
