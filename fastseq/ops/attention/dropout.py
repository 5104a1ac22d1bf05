r"""The dropout mask of attention as a function of (seed, sequence, head, query, key): the same bits in every backend.

A counter hash, so that the backward pass makes the mask again, and no backend, tile or number of threads can change it.
All arithmetic is modulo 2^32; lo and hi are the low and high half of the int64 seed, nh = n*H + h:

    fmix(x):  x ^= x>>16;  x *= 0x7feb352d;  x ^= x>>15;  x *= 0x846ca68b;  x ^= x>>16
    k1 = fmix(fmix(lo) + nh)      a = fmix(k1 + i)          the row of query i
    k2 = fmix(fmix(hi ^ 0x9E3779B9) + nh)     b = fmix(k2 ^ i)
    word w:   x = a + w*0x9E3779B9;  x ^= x>>16;  x *= 0x7feb352d;  x ^= x>>15;  x += b;  x *= 0x846ca68b;  x ^= x>>16

A word is two keys: of 32 keys, the low halves of 16 words are the first 16, and the high halves the other 16,

    w = (j>>5)*16 + (j&15)        keep (n,h,i,j)  iff  ((x >> 16*((j>>4)&1)) & 0xffff) >= threshold

so that a vector of words becomes two vectors of keys without a shuffle. fmix is the finalizer lowbias32 (Wellons 2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["keep_mask", "kept_scale", "threshold"]

LEVELS = 65536
# As int32, whose arithmetic wraps as that of uint32 does, and whose tensors are half the size of int64's.
GOLDEN, FIRST, SECOND = 0x9E3779B9 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def threshold(dropout: float) -> int:
    """The number of 65536 levels that are dropped; the dropout actually done is that over 65536."""
    return min(max(math.floor(dropout * LEVELS + 0.5), 0), LEVELS - 1)


def kept_scale(dropout: float) -> float:
    """What kept entries are multiplied by."""
    return LEVELS / (LEVELS - threshold(dropout))


def keep_mask(seed: Tensor, heads: Tensor, rows: Tensor, keys: int, dropout: float) -> Tensor:
    """Which entries are kept.

    Args:
        seed: (1,) int64.
        heads: (*any,) integers, n*H + h.
        rows: (R,) integers, the queries i.
        keys: The number of keys, j = 0, 1, ... keys - 1.
        dropout: The probability.

    Returns:
        (*any, R, keys) bool.
    """
    heads, rows = heads.to(torch.int32)[..., None], rows.to(torch.int32)
    low, high = ((seed << 32) >> 32).to(torch.int32), (seed >> 32).to(torch.int32)
    a = _fmix(_fmix(_fmix(low) + heads) + rows)[..., None]
    b = _fmix(_fmix(_fmix(high ^ GOLDEN) + heads) ^ rows)[..., None]
    blocks = -(-keys // 32)
    x = a + torch.arange(blocks * 16, device=seed.device, dtype=torch.int32) * GOLDEN
    x = _shifted_xor(x, 16).mul_(FIRST)
    x = _shifted_xor(x, 15).add_(b).mul_(SECOND)
    x = _shifted_xor(x, 16).unflatten(-1, (blocks, 16))
    level = threshold(dropout)
    halves = torch.stack([(x & 0xFFFF) >= level, ((x >> 16) & 0xFFFF) >= level], -2)
    return halves.flatten(-3)[..., :keys]


def _fmix(x: Tensor) -> Tensor:
    x = _shifted_xor(x.clone(), 16).mul_(FIRST)
    return _shifted_xor(_shifted_xor(x, 15).mul_(SECOND), 16)


def _shifted_xor(x: Tensor, by: int) -> Tensor:
    """`x ^= x >> by` in place; int32 shifts its sign in, which the mask takes away."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))
