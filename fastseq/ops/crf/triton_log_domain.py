# mypy: ignore-errors
# ruff: noqa: SIM102 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""The exact kernel in Triton: the float64 log domain, for float64 and for the rows that the scaled sweeps marked.

Infinities need no special case: -inf falls out as a weight of 0, and NaN or +inf make log Z NaN. K <= 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.crf.triton_rows import INF, as_float, from_float, gold_score, index_row, row_weight


@triton.jit
def exact_emissions(x, x_k, k, mask):
    """Emissions of one position, in float64."""
    return as_float(tl.load(x + k.to(tl.int64) * x_k, mask=mask, other=0)).to(tl.float64)


@triton.jit
def log_sum(terms, axis: tl.constexpr):
    """The log of a sum of exponentials: the shift that was subtracted from the terms, the new terms, their log sum."""
    top = tl.max(terms, axis)
    shift = tl.where(top == -INF, 0.0, top)
    terms = tl.exp(terms - tl.expand_dims(shift, axis))
    return shift, terms, shift + tl.log(tl.sum(terms, axis))


@triton.jit
def exact_forward(
    x, x_t, x_k, transitions, start, end, positions, alphas, kept, L, K, BK: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The log alphas of a row, the last `kept` of them in `alphas`; returns log Z. BC tags at a time."""
    k = tl.arange(0, BK)
    for n in range(L):
        row = x + tl.load(positions + n).to(tl.int64) * x_t
        if n == 0:
            alpha = tl.load(start + k, mask=k < K, other=-INF).to(tl.float64) + exact_emissions(row, x_k, k, k < K)
            tl.store(alphas + k, alpha, mask=k < K)
        else:
            before = tl.load(alphas + (n - 1) % kept * K + k, mask=k < K, other=-INF)
            for first in range(0, K, BC):
                j = first + tl.arange(0, BC)
                edge = tl.load(
                    transitions + k[:, None] * K + j[None, :], mask=(k < K)[:, None] & (j < K)[None, :], other=-INF
                )
                _, _, total = log_sum(before[:, None] + edge.to(tl.float64), 0)
                tl.store(alphas + n % kept * K + j, total + exact_emissions(row, x_k, j, j < K), mask=j < K)
        tl.debug_barrier()
    alpha = tl.load(alphas + (L - 1) % kept * K + k, mask=k < K, other=-INF)
    _, _, log_z = log_sum(alpha + tl.load(end + k, mask=k < K, other=-INF).to(tl.float64), 0)
    return log_z


@triton.jit
def exact_backward(
    x, x_t, x_k, gradient, g_t, g_k, tags, tags_t, transitions, end, positions, alphas, betas, pairs, log_z, weight,
    L, K, BK: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """A row's gradient from its log alphas and a finite log Z; adds to `pairs` (K*K), and the 2 K after it."""
    k = tl.arange(0, BK)
    tl.store(betas + k, tl.load(end + k, mask=k < K, other=0.0).to(tl.float64), mask=k < K)
    tl.debug_barrier()
    for back in range(L):
        n = L - 1 - back
        t = tl.load(positions + n).to(tl.int64)
        beta = tl.load(betas + back % 2 * K + k, mask=k < K, other=-INF)
        marginal = weight * tl.exp(tl.load(alphas + n * K + k, mask=k < K, other=-INF) + beta - log_z)
        if tags is not None:
            marginal -= tl.where(k == tl.load(tags + t * tags_t), weight, 0.0)
        tl.store(gradient + t * g_t + k * g_k, from_float(marginal, gradient.dtype.element_ty), mask=k < K)
        ends = pairs + K * K + k
        tl.store(ends, tl.load(ends, mask=k < K, other=0.0) + marginal, mask=k < tl.where(n == 0, K, 0))
        tl.store(ends + K, tl.load(ends + K, mask=k < K, other=0.0) + marginal, mask=k < tl.where(n == L - 1, K, 0))
        if n > 0:
            c = exact_emissions(x + t * x_t, x_k, k, k < K) + beta
            for first in range(0, K, BC):
                i = first + tl.arange(0, BC)
                square = (i < K)[:, None] & (k < K)[None, :]
                at = i[:, None] * K + k[None, :]
                edge = tl.load(transitions + at, mask=square, other=-INF).to(tl.float64)
                shift, terms, total = log_sum(edge + c[None, :], 1)
                tl.store(betas + (back + 1) % 2 * K + i, total, mask=i < K)
                alpha = tl.load(alphas + (n - 1) * K + i, mask=i < K, other=-INF)
                # At most 1, as alpha(i) beta(i) <= Z. Where shift stands for -inf, the terms are 0 and this is finite.
                part = weight * tl.exp(tl.minimum(alpha + shift - log_z, 1.0))
                counts = part[:, None] * terms
                if tags is not None:
                    before = tl.load(tags + tl.load(positions + n - 1).to(tl.int64) * tags_t)
                    y = tl.load(tags + t * tags_t)
                    counts -= tl.where((i[:, None] == before) & (k[None, :] == y), weight, 0.0)
                tl.store(pairs + at, tl.load(pairs + at, mask=square, other=0.0) + counts, mask=square)
        tl.debug_barrier()


@triton.jit
def fill_row(gradient, g_t, g_k, slots, on, off, T, K, BK: tl.constexpr, BT: tl.constexpr):
    """The gradient of a whole row: one number where on, another where off."""
    k = tl.arange(0, BK)[None, :]
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        n = tl.load(slots + t, mask=t < T, other=-1)
        value = tl.where((n >= 0)[:, None] & (k < K), on, off)
        to = gradient + t.to(tl.int64)[:, None] * g_t + k * g_k
        tl.store(to, from_float(value, gradient.dtype.element_ty), mask=(t < T)[:, None] & (k < K))


@triton.jit
def fill(values, value, size, BLOCK: tl.constexpr):
    """Set `size` float64 numbers to one value."""
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(values + at, tl.full([BLOCK], value, tl.float64), mask=at < size)
    tl.debug_barrier()


@triton.jit
def exact_row(
    x, x_t, x_k, gradient, g_t, g_k, tags, tags_t, mask, mask_t, transitions, start, end, weight, alphas, vectors,
    positions, slots, partials, T, K, BK: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """One row: its value, and with a gradient its part of that."""
    L = index_row(tags, tags_t, mask, mask_t, positions, slots, T, BT)
    log_z, value = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if (L > 0) & (weight != 0):
        if gradient is not None:
            log_z = exact_forward(x, x_t, x_k, transitions, start, end, positions, alphas, T, L, K, BK, BC)
        else:
            log_z = exact_forward(x, x_t, x_k, transitions, start, end, positions, vectors, 2, L, K, BK, BC)
        value = log_z
        if tags is not None:
            score, invalid = gold_score(x, x_t, x_k, tags, tags_t, transitions, start, end, positions, L, K, BT)
            log_z = tl.where(invalid != 0, float("nan"), log_z)
            value = tl.where(log_z == -INF, INF, log_z - score)
    if gradient is not None:
        poisoned = log_z != log_z
        fill_row(gradient, g_t, g_k, slots, tl.where(poisoned, float("nan"), 0.0), 0.0, T, K, BK, 16)
        tl.debug_barrier()
        if poisoned:
            fill(partials, float("nan"), K * K + 2 * K, 256)
        elif (L > 0) & (weight != 0) & (log_z > -INF):
            exact_backward(
                x, x_t, x_k, gradient, g_t, g_k, tags, tags_t, transitions, end, positions, alphas, vectors, partials,
                log_z, weight, L, K, BK, BC
            )  # fmt: skip
    return value


@triton.jit(do_not_specialize=["x_b", "g_b", "tags_b", "tags_t", "mask_b", "mask_t", "weights_b", "scale", "B", "T"])
def exact(
    x, x_b, x_t, x_k, gradient, g_b, g_t, g_k, tags, tags_b, tags_t, mask, mask_b, mask_t, transitions, start, end,
    weights, weights_b, scale, alphas, vectors, positions, slots, marks, values, partials, used, B, T, K,
    BK: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Every num_programs-th row, if it is marked, or if there are no marks: its value, and with `gradient` all of that.

    A program owns its rows, 2 K doubles of `vectors`, and a row of `partials`, which it touches only if it works at all
    (`used`). Log alphas of a row take 8 T K bytes: with marks, those are where the sweeps' messages of that row were.
    An edge costs one exp forward, one and a read and write of 8 bytes backward; edges are read from a cache each step.
    """
    program = tl.program_id(0).to(tl.int64)
    vectors += program * 2 * K
    if gradient is not None:
        partials += program * (K * K + 2 * K)
    worked = 0
    for b in range(program, B, tl.num_programs(0)):
        wrong = 1
        if marks is not None:
            wrong = tl.load(marks + b)
            if gradient is not None:
                wrong = wrong | tl.load(marks + B + b)
        if wrong != 0:
            if gradient is not None:
                if worked == 0:
                    fill(partials, 0.0, K * K + 2 * K, 256)
            worked = 1
            value = exact_row(
                x + b * x_b, x_t, x_k, None if gradient is None else gradient + b * g_b, g_t, g_k,
                None if tags is None else tags + b * tags_b, tags_t,
                None if mask is None else mask + b * mask_b, mask_t,
                transitions, start, end, row_weight(weights, weights_b, scale, b),
                None if alphas is None else alphas + b * T * K, vectors, positions + b * T,
                None if slots is None else slots + b * T, partials, T, K, BK, BC, BT
            )  # fmt: skip
            tl.store(values + b, value)
    if gradient is not None:
        tl.store(used + program, worked)
