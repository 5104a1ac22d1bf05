# mypy: ignore-errors
"""The scaled kernels in Triton: sweeps, posteriors, and the sum of their parts; K <= 128.

The mathematics is in the package docstring; `scaled` has the rule that says for which rows it is right. Here alpha and
beta are swept at the same time, each by a program of its own, so a path may be lost in either, and both mark. A message
is scaled by powers of two, so that it sums to about ONE = 2^60 rather than 1: then a tag that is not tiny (2^-90 of the
sum), times an edge that is not pruned (2^-90), is still a normal float, and "reached" is "the sum of them is > 0".
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.crf.triton_rows import INF, as_float, from_float, gold_score, index_row, load_row, row_weight

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
def sweep_row(
    x, x_t, x_k, transitions, start, end, messages, scales, positions, L, K, forward, BK: tl.constexpr
):  # fmt: skip
    """The recursion of `sweep` over L > 0 positions: log Z in float64, and 1 where that is not proved right."""
    k = tl.arange(0, BK)
    begin, step = tl.where(forward, 0, L - 1), tl.where(forward, 1, -1)
    if forward:
        edges, top_a, gap_a = edge_table(transitions, K, 1, K, BK)
    else:
        edges, top_a, gap_a = edge_table(transitions, 1, K, K, BK)
    first, top_s, gap_s = exponentials(tl.load(start + k, mask=k < K, other=-INF))
    last, top_e, gap_e = exponentials(tl.load(end + k, mask=k < K, other=-INF))
    peaks = (L - 1) * top_a.to(tl.float64) + (top_s.to(tl.float64) + top_e.to(tl.float64))

    t = tl.load(positions + begin).to(tl.int64)
    raw = load_row(x + t * x_t, x_k, K, BK)
    t = tl.load(positions + begin + step, mask=L > 1, other=0).to(tl.int64)
    message = tl.where(forward, first, last) * ONE  # what comes from before, without the emissions of the position
    v, power = message, 0
    lost, gaps = tl.zeros([BK], tl.int32), tl.full([BK], INF, tl.float32)
    for n in range(0, L):
        ahead = load_row(x + t * x_t, x_k, tl.where(n + 1 < L, K, 0), BK)
        t = tl.load(positions + begin + (n + 2) * step, mask=n + 2 < L, other=0).to(tl.int64)
        factor, top, gaps_n = factors(tl.where(k < K, as_float(raw), -INF), K, 0)
        if n > 0:
            scale, e = power_of_two(tl.sum(v))
            message = tl.sum(v[:, None] * edges, 0) * scale
            power += e
            if messages is not None:
                tl.store(scales + n - 1, scale, mask=forward)
        v = message * factor
        lost = lost | ((message > 0) & (factor > 0) & (v < TINY)).to(tl.int32)
        gaps = tl.minimum(gaps, gaps_n)
        peaks += top.to(tl.float64)
        if messages is not None:
            slot = begin + n * step
            tl.store(messages + slot * K + k, tl.where(forward, v, message * (1.0 / ONE)), mask=k < K)
        raw = ahead

    scale, e = power_of_two(tl.sum(v))
    z = tl.sum(v * scale * tl.where(forward, last, first))
    log_z = tl.log(z.to(tl.float64)) + (power + e - 60) * LOG_2 + peaks
    regret = peaks + L * tl.log(tl.zeros([], tl.float64) + K) - log_z  # no set of paths sums to more than the bound
    gap = tl.minimum(tl.min(gaps), tl.minimum(gap_a, tl.minimum(gap_s, gap_e)))
    right = (z >= TINY) & (regret + MARGIN < gap.to(tl.float64)) & (tl.max(lost) == 0)
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
            x, x_t, x_k, transitions, start, end, messages, scales, positions, L, K, forward, BK
        )  # fmt: skip
        if tags is not None:
            if forward:
                score, invalid = gold_score(x, x_t, x_k, tags, tags_t, transitions, start, end, positions, L, K, BT)
                value, wrong = value - score, wrong | invalid
    if messages is not None:
        tl.store(lengths + at, L)
    tl.store(marks + at, wrong)
    tl.store(values + b, value, mask=forward)


@triton.jit
def posterior_block(
    x, x_t, x_k, alpha, beta, scales, t, n, L, K, weight, BK: tl.constexpr
):  # fmt: skip
    """The weighted posteriors of BT positions, and the two sides of their pairs: sum_n left_n(i) E_ij right_n(j)."""
    k = tl.arange(0, BK)[None, :]
    on, at = (n >= 0)[:, None] & (k < K), n[:, None] * K + k
    raw = tl.load(x + t.to(tl.int64)[:, None] * x_t + k.to(tl.int64) * x_k, mask=on, other=0)
    factor, _, _ = factors(tl.where(on, as_float(raw), -INF), K, 1)
    a = tl.load(alpha + at, mask=on, other=0.0)
    b = tl.load(beta + at, mask=on, other=0.0)
    total = tl.sum(a * b, 1)  # rounding lets alpha . beta drift with T: each posterior is divided by its own sum
    b = tl.where(a > 0, b / tl.where(total > 0, total, 1.0)[:, None], 0.0)  # where nothing leads to, beta has no bound
    later = (n > 0)[:, None] & (k < K)
    before = tl.load(alpha + at - K, mask=later, other=0.0)
    scale = tl.load(scales + n - 1, mask=n > 0, other=0.0)
    return a * b * weight, before * scale[:, None], tl.where(later, factor * b, 0.0) * weight


@triton.jit
def multiply_by_edges(pairs, transitions, K, BK: tl.constexpr):
    """The table `pairs` in memory times exp(transitions - their maximum), 16 rows at a time: registers are dear."""
    row, k = tl.arange(0, 16)[:, None], tl.arange(0, BK)[None, :]
    tops = tl.full([16, BK], LOWEST, tl.float32)
    for first in range(0, K, 16):
        square = (first + row < K) & (k < K)
        tops = tl.maximum(tops, tl.load(transitions + (first + row) * K + k, mask=square, other=-INF))
    top = tl.max(tops)
    for first in range(0, K, 16):
        at, square = (first + row) * K + k, (first + row < K) & (k < K)
        below = tl.load(transitions + at, mask=square, other=-INF) - top
        edges = tl.where(below < -PRUNED, 0.0, tl.exp(below))
        tl.store(pairs + at, tl.load(pairs + at, mask=square, other=0.0) * edges, mask=square)
    tl.debug_barrier()


@triton.jit
def take_off_observed(
    tags, tags_b, tags_t, weights, weights_b, scale, positions, slots, marks, partials, B, T, K,
    BK: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Take the weighted counts of pairs of tags off the table `partials`, in the blocks that `posterior` owns."""
    k = tl.arange(0, BK)[None, :]
    i = tl.arange(0, BK)[:, None]
    pairs = tl.load(partials + i * K + k, mask=(i < K) & (k < K), other=0.0)
    blocks = tl.cdiv(T, BT)
    for block in range(tl.program_id(0).to(tl.int64), B * blocks, tl.num_programs(0)):
        b = block // blocks
        weight = row_weight(weights, weights_b, scale, b).to(tl.float32)
        wrong = tl.load(marks + b) | tl.load(marks + B + b)
        t = (block % blocks) * BT + tl.arange(0, BT)
        n = tl.load(slots + b * T + t, mask=t < tl.where((wrong == 0) & (weight != 0), T, 0), other=0)
        if tl.max(n) > 0:
            t_before = tl.load(positions + b * T + n - 1, mask=n > 0, other=0).to(tl.int64)
            before = tl.load(tags + b * tags_b + t_before * tags_t, mask=n > 0, other=-1)
            y = tl.load(tags + b * tags_b + t.to(tl.int64) * tags_t, mask=n > 0, other=-1)
            left, right = tl.where(before[:, None] == k, -weight, 0.0), tl.where(y[:, None] == k, 1.0, 0.0)
            pairs = tl.dot(tl.trans(left), right, pairs, input_precision="ieee")
    tl.store(partials + i * K + k, pairs, mask=(i < K) & (k < K))


@triton.jit(do_not_specialize=["x_b", "g_b", "tags_b", "tags_t", "weights_b", "scale", "B", "T"])
def posterior(
    x, x_b, x_t, x_k, gradient, g_b, g_t, g_k, tags, tags_b, tags_t, transitions, weights, weights_b, scale,
    messages, scales, positions, slots, lengths, marks, partials, B, T, K,
    BK: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Posteriors less one-hot tags to the gradient, and the pairs' counts of every num_programs-th block of BT positions.

    A program owns whole blocks and one row of `partials` (K*K pairs, K first, K last tags): no atomics, so sums have one
    order. A position costs K^2 FMA for expected pairs, as many for observed ones, reads 3 K numbers (alpha twice) and
    K emissions, and writes K of the gradient: zeros where off, and nothing in rows that are not right.
    """
    k = tl.arange(0, BK)
    pairs = tl.zeros([BK, BK], tl.float32)
    firsts, lasts = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    blocks = tl.cdiv(T, BT)
    program = tl.program_id(0).to(tl.int64)
    for block in range(program, B * blocks, tl.num_programs(0)):
        b = block // blocks
        weight = row_weight(weights, weights_b, scale, b).to(tl.float32)
        wrong = tl.load(marks + b) | tl.load(marks + B + b)
        t = ((block % blocks) * BT + tl.arange(0, BT)).to(tl.int32)
        n = tl.load(slots + b * T + t, mask=t < tl.where((wrong == 0) & (weight != 0), T, 0), other=-1)
        value = tl.zeros([BT, BK], tl.float32)
        if tl.max(n) >= 0:
            alpha = messages + b * 2 * T * K
            L = tl.load(lengths + b)
            value, left, right = posterior_block(
                x + b * x_b, x_t, x_k, alpha, alpha + T * K, scales + b * T, t, n, L, K, weight, BK
            )  # fmt: skip
            pairs = tl.dot(tl.trans(left), right, pairs, input_precision="ieee")
            if tags is not None:
                y = tl.load(tags + b * tags_b + t.to(tl.int64) * tags_t, mask=n >= 0, other=-1)
                value -= tl.where(y[:, None] == k[None, :], weight, 0.0)
            firsts += tl.sum(tl.where((n == 0)[:, None], value, 0.0), 0)
            lasts += tl.sum(tl.where((n == L - 1)[:, None], value, 0.0), 0)
        to = gradient + b * g_b + t.to(tl.int64)[:, None] * g_t + k.to(tl.int64)[None, :] * g_k
        tl.store(to, from_float(value, gradient.dtype.element_ty), mask=(t < tl.where(wrong == 0, T, 0))[:, None] & (k < K)[None, :])

    partials += program * (K * K + 2 * K)
    tl.store(partials + K * K + k, firsts, mask=k < K)
    tl.store(partials + K * K + K + k, lasts, mask=k < K)
    tl.store(partials + k[:, None] * K + k[None, :], pairs, mask=(k < K)[:, None] & (k < K)[None, :])
    tl.debug_barrier()
    multiply_by_edges(partials, transitions, K, BK)
    if tags is not None:
        take_off_observed(
            tags, tags_b, tags_t, weights, weights_b, scale, positions, slots, marks, partials, B, T, K, BK, BT
        )  # fmt: skip


@triton.jit(do_not_specialize=["weights_b", "scale", "B", "parts", "exact_parts"])
def reduce(
    partials, parts, exact_partials, used, exact_parts, values, weights, weights_b, scale, B,
    total, transitions, start, end, K, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradients of the parameters, BLOCK numbers a program, from the partial sums; program 0 also adds up the values.

    Reads 4 bytes a number and part. The exact parts, 8 bytes, are read only if one was used.
    """
    size = K * K + 2 * K
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    if partials is not None:
        row = tl.arange(0, 16)[:, None]
        scaled = tl.zeros([BLOCK], tl.float32)
        for first in range(0, parts, 16):
            there = (first + row < parts) & (at < size)[None, :]
            rows = (first + row).to(tl.int64) * size
            scaled += tl.sum(tl.load(partials + rows + at[None, :], mask=there, other=0.0), 0)
        sums += scaled.to(tl.float64)
    for part in range(0, exact_parts):
        if tl.load(used + part) != 0:
            sums += tl.load(exact_partials + tl.cast(part, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(transitions + at, sums, mask=at < K * K)
    tl.store(start + at - K * K, sums, mask=(at >= K * K) & (at < K * K + K))
    tl.store(end + at - K * K - K, sums, mask=(at >= K * K + K) & (at < size))
    if tl.program_id(0) == 0:
        losses = tl.zeros([BLOCK], tl.float64)
        for first in range(0, B, BLOCK):
            b = first + tl.arange(0, BLOCK)
            weight = tl.where(b < B, row_weight(weights, weights_b, scale, tl.minimum(b, B - 1)), 0.0)
            value = tl.load(values + b, mask=b < B, other=0.0)
            losses += tl.where(weight != 0, value * weight, 0.0)  # a row of weight 0 may hold anything
        tl.store(total, tl.sum(losses))
