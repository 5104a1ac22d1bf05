# mypy: ignore-errors
"""Viterbi in Triton: one kernel, in the type of the results; K <= 128."""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.crf.triton_rows import INF, OFF, as_float, index_row, load_row


@triton.jit
def usable(values):
    """The values, with -inf for NaN and +inf, from which nothing may be computed; and 1 where those were."""
    good = values < INF
    return tl.where(good, values, -INF), 1 - good.to(tl.int32)


@triton.jit
def trace_back(paths, positions, pointers, tag, L, K):
    """Write the path that ends in `tag`: one byte read a step, and it says where the next one is."""
    tl.store(paths + tl.load(positions + L - 1), tag)
    for back in range(1, L):
        n = L - back
        tag = tl.load(pointers + n * K + tag).to(tl.int32)
        tl.store(paths + tl.load(positions + n - 1), tag)


@triton.jit(do_not_specialize=["x_b", "mask_b", "mask_t", "T"])
def viterbi(
    x, x_b, x_t, x_k, mask, mask_b, mask_t, transitions, start, end, paths, scores, positions, pointers, T, K,
    BK: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """One row a program: its best path and score. BK^2 additions, twice, and maxima a step; writes K bytes a step.

    The arithmetic and the tie rule are the reference's: (score_i + A_ij) + x_j, and the first maximum wins.
    """
    b = tl.program_id(0).to(tl.int64)
    x += b * x_b
    positions += b * T
    pointers += b * T * K
    paths += b * T
    if mask is not None:
        mask += b * mask_b
    L = index_row(None, 0, mask, mask_t, positions, None, T, BT)
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        tl.store(paths + t, tl.full([BT], OFF, tl.int64), mask=t < T)
    tl.debug_barrier()
    if L == 0:
        tl.store(scores + b, 0.0)
        return

    k = tl.arange(0, BK)
    square = (k < K)[:, None] & (k < K)[None, :]
    edges = tl.load(transitions + k[:, None] * K + k[None, :], mask=square, other=-INF)
    last = tl.load(end + k, mask=k < K, other=-INF)
    score = tl.load(start + k, mask=k < K, other=-INF)
    edges, bad_edges = usable(edges)
    last, bad = usable(last)
    score, worse = usable(score)
    bad = bad | worse | tl.where(L > 1, tl.max(bad_edges), 0)
    raw = load_row(x + tl.load(positions).to(tl.int64) * x_t, x_k, K, BK)
    t = tl.load(positions + 1, mask=L > 1, other=0).to(tl.int64)
    now, worse = usable(as_float(raw))
    score, bad = score + now, bad | worse
    raw = load_row(x + t * x_t, x_k, tl.where(L > 1, K, 0), BK)
    t = tl.load(positions + 2, mask=L > 2, other=0).to(tl.int64)
    for n in range(1, L):
        ahead = load_row(x + t * x_t, x_k, tl.where(n + 1 < L, K, 0), BK)
        t = tl.load(positions + n + 2, mask=n + 2 < L, other=0).to(tl.int64)
        now, worse = usable(as_float(raw))
        bad = bad | worse
        score, came_from = tl.max((score[:, None] + edges) + now[None, :], 0, return_indices=True)
        tl.store(pointers + n * K + k, came_from.to(tl.uint8), mask=k < K)
        raw = ahead
    tl.debug_barrier()
    best, tag = tl.max(score + last, 0, return_indices=True)
    tl.store(scores + b, tl.where(tl.max(bad) != 0, float("nan"), best))
    trace_back(paths, positions, pointers, tag, L, K)
