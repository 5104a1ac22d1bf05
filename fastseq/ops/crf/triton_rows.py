# mypy: ignore-errors
"""What the Triton kernels share: which positions of a row are on, and the score of its tags.

`n` counts the positions of a row that are on, 0 to L-1; `t` is where they lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.triton_types import as_float, from_float

__all__ = ["INF", "OFF", "as_float", "from_float", "gold_score", "index_row", "load_row", "row_weight"]

INF = tl.constexpr(float("inf"))
OFF = tl.constexpr(-100)


@triton.jit
def load_row(x, x_k, K, BK: tl.constexpr):
    """The emissions of one position as they are, the first K of them."""
    k = tl.arange(0, BK)
    return tl.load(x + k.to(tl.int64) * x_k, mask=k < K, other=0)


@triton.jit
def row_weight(weights, weights_b, scale: tl.int64, b):
    """Weight times scale, in float64. The scale comes as its bits: a float argument would be rounded to float32."""
    weight = scale.to(tl.int64).to(tl.float64, bitcast=True)
    if weights is not None:
        weight = weight * tl.load(weights + b * weights_b).to(tl.float64)
    return weight


@triton.jit
def index_row(tags, tags_t, mask, mask_t, positions, slots, T, BT: tl.constexpr):
    """Number what is on in a row: positions[n] = t, and slots[t] = n, or -1 where off; returns how many there are.

    A program owns the row. 10 bytes read and 8 written a position.
    """
    count = 0
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        on = t < T
        if mask is not None:
            on = on & (tl.load(mask + t.to(tl.int64) * mask_t, mask=t < T, other=0) != 0)
        if tags is not None:
            on = on & (tl.load(tags + t.to(tl.int64) * tags_t, mask=t < T, other=OFF) != OFF)
        rank = count + tl.cumsum(on.to(tl.int32), 0) - 1
        tl.store(positions + rank, t, mask=on)
        if slots is not None:
            tl.store(slots + t, tl.where(on, rank, -1), mask=t < T)
        count += tl.sum(on.to(tl.int32))
    tl.debug_barrier()  # other threads of the program read what was written
    return count


@triton.jit
def gold_score(x, x_t, x_k, tags, tags_t, transitions, start, end, positions, L, K, BT: tl.constexpr):
    """The score of a row's tags in float64, and whether one of them is out of range: such a tag is not looked up."""
    score = tl.zeros([BT], tl.float64)
    invalid = tl.zeros([BT], tl.int32)
    for first in range(0, L, BT):
        n = first + tl.arange(0, BT)
        on, later = n < L, (n < L) & (n > 0)
        t = tl.load(positions + n, mask=on, other=0).to(tl.int64)
        t_before = tl.load(positions + n - 1, mask=later, other=0).to(tl.int64)
        y = tl.load(tags + t * tags_t, mask=on, other=0)
        before = tl.load(tags + t_before * tags_t, mask=later, other=0)
        valid = (y >= 0) & (y < K)
        invalid = invalid | (on & ~valid).to(tl.int32)
        edge = later & valid & (before >= 0) & (before < K)
        score += as_float(tl.load(x + t * x_t + y * x_k, mask=on & valid, other=0)).to(tl.float64)
        score += tl.load(transitions + before * K + y, mask=edge, other=0.0).to(tl.float64)
        score += tl.load(start + y, mask=valid & (n == 0), other=0.0).to(tl.float64)
        score += tl.load(end + y, mask=valid & (n == L - 1), other=0.0).to(tl.float64)
    return tl.sum(score), tl.max(invalid)
