# mypy: ignore-errors
# ruff: noqa: SIM102 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""The scaled sweeps in Triton: alpha and beta, and whether they are right; K <= 128.

The mathematics is in the package docstring; `scaled` has the rule that says for which rows it is right. Here alpha and
beta are swept at the same time, each by a program of its own, so a path may be lost in either, and both mark. A message
is scaled by powers of two, so that it sums to about ONE = 2^60 rather than 1: then a tag that is not tiny (2^-90 of the
sum), times an edge that is not pruned (2^-90), is still a normal float, and "reached" is "the sum of them is > 0".
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.crf.triton_rows import INF, as_float, gold_score, index_row, load_row, row_weight

LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for the maximum where all is -inf
ONE = tl.constexpr(2.0**60)
TINY = tl.constexpr(2.0**-30)  # ONE * 2^-90: what is below may belong to a path that is about to be lost
PRUNED = tl.constexpr(62.0)  # nats: factors below exp(-62) are left out, and answered for afterwards
MARGIN = tl.constexpr(30.0)  # nats by which all that is left out must be below log Z
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponentials(values):
    """exp(values - their maximum) without the pruned ones; the maximum; how far below it the nearest pruned one is."""
    top = tl.maximum(tl.max(values), LOWEST)
    below = values - top
    gap = tl.min(tl.where((below < -PRUNED) & (below > -INF), -below, INF))
    return tl.where(below < -PRUNED, 0.0, tl.exp(below)), top, gap


@triton.jit
def factors(raw, K, axis: tl.constexpr):
    """The same for emissions, along an axis of tags whose padding is -inf: factors, tops, and gaps one by one."""
    top = tl.maximum(tl.max(raw, axis), LOWEST)
    below = raw - tl.expand_dims(top, axis)
    gaps = tl.where((below < -PRUNED) & (below > -INF), -below, INF)
    return tl.where(below < -PRUNED, 0.0, tl.exp(below)), top, gaps


@triton.jit
def edge_table(transitions, stride_i, stride_j, K, BK: tl.constexpr):
    """exponentials() of the transitions, or of their transpose, padded with zeros."""
    i, j = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    return exponentials(tl.load(transitions + i * stride_i + j * stride_j, mask=(i < K) & (j < K), other=-INF))


@triton.jit
def power_of_two(total):
    """The scale 2^-e that brings a sum into [ONE, 2 ONE), exactly, and e."""
    e = (total.to(tl.int32, bitcast=True) >> 23) - (127 + 60)
    e = tl.minimum(tl.maximum(e, -120), 66)  # sums of 0 and NaN: such rows are marked
    return ((127 - e) << 23).to(tl.float32, bitcast=True), e


@triton.jit
def meet_emissions(message, raw, lost, gaps, peaks, K, BK: tl.constexpr):
    """A message times the factors of its position, and what is kept of each: lost tags, gaps, the sum of maxima."""
    raw = tl.where(tl.arange(0, BK) < K, as_float(raw), -INF)
    factor, top, gaps_here = factors(raw, K, 0)
    v = message * factor
    lost = lost | ((message > 0) & (factor > 0) & (v < TINY)).to(tl.int32)
    return v, lost, tl.minimum(gaps, gaps_here), peaks + top.to(tl.float64)


@triton.jit
def keep(messages, message, v, n, forward, K, BK: tl.constexpr):
    """Alpha is kept with the emissions of its position, beta without them, and so that it sums to about 1."""
    k = tl.arange(0, BK)
    tl.store(messages + n * K + k, tl.where(forward, v, message * (1.0 / ONE)), mask=k < K)


@triton.jit
def sweep_row(
    x, x_t, x_k, transitions, start, end, messages, scales, positions, L, K, direction, BK: tl.constexpr
):  # fmt: skip
    """The recursion of `sweep` over L > 0 positions: log Z in float64, and 1 where that is not proved right.

    The first position is outside the loop: with an `if` around the product, its table would be computed in each step.
    """
    k = tl.arange(0, BK)
    forward = direction == 0
    begin, step = tl.where(forward, 0, L - 1), tl.where(forward, 1, -1)
    if forward:
        edges, top_a, gap_a = edge_table(transitions, K, 1, K, BK)
    else:  # `direction` is the stride of 1: known to be 1, it would have Triton sum over the lanes of a warp
        edges, top_a, gap_a = edge_table(transitions, direction, K, K, BK)
    first, top_s, gap_s = exponentials(tl.load(start + k, mask=k < K, other=-INF))
    last, top_e, gap_e = exponentials(tl.load(end + k, mask=k < K, other=-INF))
    peaks = (L - 1) * top_a.to(tl.float64) + (top_s.to(tl.float64) + top_e.to(tl.float64))

    raw = load_row(x + tl.load(positions + begin).to(tl.int64) * x_t, x_k, K, BK)
    t = tl.load(positions + begin + step, mask=L > 1, other=0).to(tl.int64)
    ahead = load_row(x + t * x_t, x_k, tl.where(L > 1, K, 0), BK)
    t = tl.load(positions + begin + 2 * step, mask=L > 2, other=0).to(tl.int64)
    lost, gaps, power = tl.zeros([BK], tl.int32), tl.full([BK], INF, tl.float32), 0
    message = tl.where(forward, first, last) * ONE  # what comes from before, without the emissions of the position
    v, lost, gaps, peaks = meet_emissions(message, raw, lost, gaps, peaks, K, BK)
    if messages is not None:
        keep(messages, message, v, begin, forward, K, BK)
    for n in range(1, L):
        raw = ahead
        ahead = load_row(x + t * x_t, x_k, tl.where(n + 1 < L, K, 0), BK)
        t = tl.load(positions + begin + (n + 2) * step, mask=n + 2 < L, other=0).to(tl.int64)
        scale, e = power_of_two(tl.sum(v))
        power += e
        message = tl.sum(v[:, None] * edges, 0) * scale
        v, lost, gaps, peaks = meet_emissions(message, raw, lost, gaps, peaks, K, BK)
        if messages is not None:
            tl.store(scales + n - 1, scale, mask=forward)
            keep(messages, message, v, begin + n * step, forward, K, BK)

    scale, e = power_of_two(tl.sum(v))
    z = tl.sum(v * scale * tl.where(forward, last, first))
    log_z = tl.log(z.to(tl.float64)) + (power + e - 60).to(tl.float64) * LOG_2 + peaks
    regret = peaks + L * tl.log(tl.zeros([], tl.float64) + K) - log_z  # no set of paths sums to more than the bound
    gap = tl.minimum(tl.min(gaps), tl.minimum(gap_a, tl.minimum(gap_s, gap_e)))
    right = (regret + MARGIN < gap.to(tl.float64)) & (tl.max(lost) == 0)  # not where log Z is -inf or NaN
    return log_z, tl.where(right, 0, 1)


@triton.jit(do_not_specialize=["x_b", "tags_b", "tags_t", "mask_b", "mask_t", "weights_b", "scale", "B", "T"])
def sweep(
    x, x_b, x_t, x_k, tags, tags_b, tags_t, mask, mask_b, mask_t, transitions, start, end, weights, weights_b, scale,
    messages, scales, positions, slots, lengths, marks, values, B, T, K, BK: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """One direction of one row: program (b, 0) owns alpha and the value; (b, 1) owns beta.

    Beta's recursion is alpha's on the row reversed, with the transposed edges. A step is a product of the message with
    the edges, BK^2 FMA out of registers, and two changes of layout through shared memory. It reads K emissions (those
    of the next step, ahead of their use) and, with gradients, writes K floats: alpha_n with the emissions, beta_n
    without. With gradients, a row of weight 0 is left alone.
    """
    b, direction = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = direction.to(tl.int64) * B + b
    forward = direction == 0
    if weights is not None:
        if row_weight(weights, weights_b, scale, b) == 0:
            tl.store(marks + at, 0)
            tl.store(values + b, 0.0, mask=forward)
            return
    if mask is not None:
        mask += b * mask_b
    if tags is not None:
        tags += b * tags_b
    if messages is not None:
        slots += at * T
        messages += (b * 2 + direction) * T * K
        scales += b * T
    x += b * x_b
    positions += at * T
    L = index_row(tags, tags_t, mask, mask_t, positions, slots, T, BT)
    value, wrong = tl.full([], 0.0, tl.float64), 0
    if L > 0:
        value, wrong = sweep_row(
            x, x_t, x_k, transitions, start, end, messages, scales, positions, L, K, direction, BK
        )  # fmt: skip
        if tags is not None:
            if forward:
                score, invalid = gold_score(x, x_t, x_k, tags, tags_t, transitions, start, end, positions, L, K, BT)
                value, wrong = value - score, wrong | invalid
    if messages is not None:
        tl.store(lengths + at, L)
    tl.store(marks + at, wrong)
    tl.store(values + b, value, mask=forward)
