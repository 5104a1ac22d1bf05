"""Rotary position embedding, as flash_attn's kv-cache applies it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.functional.checks import no_autocast

__all__ = ["rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """The first numbers of each head, taken as pairs, each turned by the angle of its position.

    Args:
        x: (B,S,H,D) floats.
        cos: (positions,R/2) cosines; R of a head's D numbers are turned.
        sin: (positions,R/2) sines.
        positions: (B,S) integers, where each x is.
        interleaved: Pairs are neighbours (0 and 1, 2 and 3, ...), or else halves (0 and R/2, 1 and R/2 + 1, ...).

    Returns:
        (B,S,H,D) of x's dtype, from products in float32 or better.

    Source: Su et al. 2021 (RoFormer), section 3.2.
    """
    half = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t[positions][:, :, None].to(wide) for t in (cos, sin))
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    with no_autocast(x):  # which cannot put float16 together on a CPU
        if interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        else:
            a, b = turned[..., :half], turned[..., half:]
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return torch.cat([turned.to(x.dtype), rest], -1)
