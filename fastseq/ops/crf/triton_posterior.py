# mypy: ignore-errors
"""From the messages of the scaled sweeps to gradients, in Triton: posteriors, counts of pairs, the sum of all parts."""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.crf.triton_rows import INF, as_float, from_float, row_weight
from fastseq.ops.crf.triton_scaled import LOWEST, PRUNED, factors


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
    """Posteriors less one-hot tags to the gradient, and the counts of pairs, for every num_programs-th BT positions.

    A program owns whole blocks and one row of `partials` (K*K pairs, K first, K last tags): no atomics, so a sum has
    one order. A position costs K^2 FMA for expected pairs, as many for observed ones, reads 3 K floats (alpha twice)
    and K emissions, and writes K of the gradient: zeros where off, and nothing in rows that are not right.
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
        tl.store(
            to,
            from_float(value, gradient.dtype.element_ty),
            mask=(t < tl.where(wrong == 0, T, 0))[:, None] & (k < K)[None, :],
        )

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
    """The gradients of the parameters from the partial sums, BLOCK numbers a program; program 0 adds up the values too.

    Reads 4 bytes a number and part. The exact parts, at most 128 of 8 bytes, are read only if they were used.
    """
    size = K * K + 2 * K
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    if partials is not None:
        scaled = tl.zeros([BLOCK], tl.float32)
        for first in range(0, parts, 16):
            row = first + tl.arange(0, 16)[:, None]
            there = (row < parts) & (at < size)[None, :]
            rows = row.to(tl.int64) * size
            scaled += tl.sum(tl.load(partials + rows + at[None, :], mask=there, other=0.0), 0)
        sums += scaled.to(tl.float64)
    part = tl.arange(0, 128)
    if tl.max(tl.load(used + part, mask=part < exact_parts, other=0)) != 0:
        for row in range(exact_parts):
            limit = tl.where(tl.load(used + row) != 0, size, 0)
            sums += tl.load(exact_partials + tl.cast(row, tl.int64) * size + at, mask=at < limit, other=0.0)
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
