# mypy: ignore-errors
# ruff: noqa: RET505, SIM102 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""The Triton kernels of the pointer-generator's loss: tiles of rows times tiles of the vocabulary.

    scores            z = x W^T tile by tile, of which only each row's maximum, its sum of exp(z - maximum) and z_target
                      remain: N V H FMA
    rows              a row's value and its gradients in the gate and in what is copied: O(S) work
    hidden_gradient   z again, dz = alpha exp(z - lse) - beta [target], and dz W, BG of its columns a program
    weight_gradient   z again, dz, and dz^T x, likewise; each tile of the gradient is written once

With one BG for all of H that is 5 N V H FMA where a stored z would need 3, and no (N,V) tensor. What tiles read again,
they find in L2.

A program of `scores` and of `hidden_gradient` has BN rows and every P-th tile of the vocabulary; what P programs found
is put together in a fixed order. Nothing is added by atomics: two runs are the same bits.

A row that has no part in a sum (alpha = beta = 0: ignored, of weight 0, or a word that is not in the vocabulary) is
left out by value, so that NaN in it harms no other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.triton_types import as_float, from_float, operand

INF = tl.constexpr(float("inf"))


@triton.jit
def log1p_of(u):
    """log(1 + u) for 0 <= u <= 1: what rounding 1 + u loses is made up for (Kahan)."""
    one = 1.0 + u
    return tl.where(one == 1.0, u, tl.log(one) * (u / tl.where(one == 1.0, 1.0, one - 1.0)))


@triton.jit
def log_sigmoid(g):
    """log(1 / (1 + exp(-g)))."""
    return tl.minimum(g, 0.0) - log1p_of(tl.exp(-tl.abs(g)))


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b)); -inf of two -inf, NaN of a NaN."""
    high = tl.where(a > b, a, b)
    high = tl.where(a != a, a, high)
    low = tl.where(a > b, b, a)
    return tl.where(high == -INF, high, high + log1p_of(tl.exp(tl.where(low == -INF, -INF, low - high))))


@triton.jit
def load_tile(base, n, count, first, H, BLOCK: tl.constexpr, PRODUCTS: tl.constexpr):
    """Rows n and columns first.. of a dense (count,H) matrix as operands (., BLOCK), zeros beyond its ends."""
    h = first + tl.arange(0, BLOCK)
    inside = (n < count)[:, None] & (h < H)[None, :]
    return operand(tl.load(base + n.to(tl.int64)[:, None] * H + h[None, :], mask=inside, other=0), PRODUCTS)


@triton.jit
def logits(
    x, w, bias, n, v, N, V, H, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits (BN,BV) of rows n and words v; -inf beyond the vocabulary."""
    z = tl.zeros([BN, BV], tl.float32)
    for k in range(0, H, BK):
        words = load_tile(w, v, V, k, H, BK, PRODUCTS)
        z += tl.dot(load_tile(x, n, N, k, H, BK, PRODUCTS), tl.trans(words), input_precision=PRECISION)
    if bias is not None:
        z += as_float(tl.load(bias + v, mask=v < V, other=0))[None, :]
    return tl.where((v < V)[None, :], z, -INF)


@triton.jit
def scores(
    x, w, bias, targets, maxima, sums, chosen, N, V, H, P,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, p): rows i BN.. and the tiles p, p + P, ... of the vocabulary. Writes maxima and sums (P,N)."""
    first, part = tl.program_id(0) * BN, tl.program_id(1)
    n = first + tl.arange(0, BN)
    target = tl.load(targets + n, mask=n < N, other=-1)
    top, total = tl.full([BN], -INF, tl.float32), tl.zeros([BN], tl.float32)
    for tile in range(part * BV, V, P * BV):
        v = tile + tl.arange(0, BV)
        z = logits(x, w, bias, n, v, N, V, H, BN, BV, BK, PRODUCTS, PRECISION)
        here = v[None, :] == target[:, None]
        found = tl.sum(tl.where(here, z, 0.0), 1)
        tl.store(chosen + n, found, mask=(n < N) & (target >= tile) & (target < tile + BV) & (target < V))
        largest = tl.max(tl.where(z != z, INF, z), 1)  # the maximum passes over NaN; the sum below will not
        new = tl.maximum(top, largest)
        shift = tl.where(new == -INF, 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        top = new
    place = part.to(tl.int64) * N + n
    tl.store(maxima + place, top, mask=n < N)
    tl.store(sums + place, total, mask=n < N)


@triton.jit
def join_parts(maxima, sums, n, N, P, BP: tl.constexpr):
    """The lse of a row out of its P parts, in float64 and in the order of the parts' numbers."""
    p = tl.arange(0, BP)
    tops = tl.load(maxima + p.to(tl.int64) * N + n, mask=p < P, other=-INF)
    parts = tl.load(sums + p.to(tl.int64) * N + n, mask=p < P, other=0.0)
    top = tl.max(tops, 0)
    shift = tl.where(top == -INF, 0.0, top)
    total = tl.sum((parts * tl.exp(tops - shift)).to(tl.float64), 0)
    return (shift.to(tl.float64) + tl.log(total)).to(tl.float32)


@triton.jit
def copied(copy, ids, target, S, PROBABILITIES: tl.constexpr, BS: tl.constexpr):
    """Logarithms of what the row copies to its target, and of all that it could copy (0 for probabilities)."""
    if PROBABILITIES:
        mass = tl.zeros([BS], tl.float32)
        for first in range(0, S, BS):
            s = first + tl.arange(0, BS)
            same = (tl.load(ids + s, mask=s < S, other=-1) == target) & (s < S)
            mass += tl.load(copy + s, mask=same, other=0.0)
        return tl.log(tl.sum(mass, 0)), 0.0
    else:
        top = tl.full([BS], -INF, tl.float32)
        for first in range(0, S, BS):
            s = first + tl.arange(0, BS)
            there = tl.load(ids + s, mask=s < S, other=-1) >= 0
            e = tl.load(copy + s, mask=there, other=-INF)
            top = tl.maximum(top, tl.where(e != e, INF, e))
        shift = tl.max(top, 0)
        shift = tl.where(shift == -INF, 0.0, shift)
        mass, everything = tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32)
        for first in range(0, S, BS):
            s = first + tl.arange(0, BS)
            word = tl.load(ids + s, mask=s < S, other=-1)
            p = tl.exp(tl.load(copy + s, mask=word >= 0, other=-INF) - shift)
            everything += p
            mass += tl.where(word == target, p, 0.0)
        return shift + tl.log(tl.sum(mass, 0)), shift + tl.log(tl.sum(everything, 0))


@triton.jit
def rows(
    copy, gate, source_ids, targets, weights, maxima, sums, chosen, values, lses, alphas, betas, grad_copy, grad_gate,
    ignore_index, z_loss, N, V, S, T, P, PROBABILITIES: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Program n: one row. Without gradients (grad_copy is None) the value alone."""
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + n)
    ids = source_ids + (n // T) * S
    copy += n * S
    lse = join_parts(maxima, sums, n, N, P, BP)
    known = (target >= 0) & (target < V)
    z = tl.load(chosen + n, mask=known, other=-INF)
    log_copy, log_all = copied(copy, ids, target, S, PROBABILITIES, BS)
    if PROBABILITIES:
        g = tl.load(gate + n)
        log_generate, log_gate = log_sigmoid(g), log_sigmoid(-g)
        a = tl.where(known, log_generate + z - lse, -INF)
        c = log_gate + log_copy
    else:
        whole = log_add(lse, log_all)
        log_generate = lse - whole
        a = tl.where(known, z - whole, -INF)
        c = log_copy - whole
    log_p = log_add(a, c)
    value = z_loss * lse * lse - log_p if z_loss != 0 else -log_p
    on = (target != ignore_index) & (weight != 0)
    wrong = (target < 0) & on  # nobody waits for a GPU's complaint
    value = tl.where(wrong, float("nan"), tl.where(on, value, 0.0))
    tl.store(values + n, value)
    if grad_copy is not None:
        possible = on & (log_p != -INF)
        r = tl.where(a == -INF, 0.0, tl.exp(a - log_p))
        generate = tl.exp(log_generate)
        bad = tl.where(wrong, float("nan"), 0.0)
        beta = tl.where(possible, weight * r, 0.0) + bad
        alpha = beta
        if PROBABILITIES:
            if z_loss != 0:
                alpha += tl.where(possible, 2.0 * weight * z_loss * lse, 0.0)
            tl.store(grad_gate + n, tl.where(possible, weight * (generate - r), 0.0) + bad)
        else:
            alpha = tl.where(possible, weight * generate, 0.0) + bad
        tl.store(lses + n, lse)
        tl.store(alphas + n, alpha)
        tl.store(betas + n, beta)
        for first in range(0, S, BS):
            s = first + tl.arange(0, BS)
            word = tl.load(ids + s, mask=s < S, other=-1)
            same = (word == target) & (word >= 0)
            if PROBABILITIES:
                slope = tl.where(same, -weight * tl.exp(log_gate - log_p), 0.0)
            else:
                e = tl.load(copy + s, mask=word >= 0, other=-INF)
                slope = weight * (tl.exp(e - whole) - tl.where(same, tl.exp(e - whole - log_p), 0.0))
            slope = tl.where(possible & (word >= 0), slope, 0.0) + bad
            tl.store(grad_copy + n * S + s, slope, mask=s < S)


@triton.jit
def slopes(z, v, lse, alpha, beta, target):
    """Slopes (BN,BV) dz = alpha exp(z - lse) - beta [target], 0 in the rows that have no part in it."""
    one_hot = v[None, :] == target[:, None]
    part = ((alpha != 0) | (beta != 0))[:, None]
    dz = alpha[:, None] * tl.exp(z - lse[:, None]) - tl.where(one_hot, beta[:, None], 0.0)
    return tl.where(part & (z != -INF), dz, 0.0)


@triton.jit
def hidden_gradient(
    x, w, bias, targets, lses, alphas, betas, partial, N, V, H, P, BN: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, p, g): rows and tiles as of `scores`, and BG columns; its part of the gradient, partial[p] (N,H)."""
    part, column = tl.program_id(1), tl.program_id(2) * BG
    n, h = tl.program_id(0) * BN + tl.arange(0, BN), column + tl.arange(0, BG)
    target = tl.load(targets + n, mask=n < N, other=-1)
    lse = tl.load(lses + n, mask=n < N, other=0.0)
    alpha, beta = tl.load(alphas + n, mask=n < N, other=0.0), tl.load(betas + n, mask=n < N, other=0.0)
    gradient = tl.zeros([BN, BG], tl.float32)
    for tile in range(part * BV, V, P * BV):
        v = tile + tl.arange(0, BV)
        z = logits(x, w, bias, n, v, N, V, H, BN, BV, BK, PRODUCTS, PRECISION)
        dz = operand(slopes(z, v, lse, alpha, beta, target), PRODUCTS)
        gradient += tl.dot(dz, load_tile(w, v, V, column, H, BG, PRODUCTS), input_precision=PRECISION)
    place = (part.to(tl.int64) * N + n)[:, None] * H + h[None, :]
    tl.store(partial + place, gradient, mask=(n < N)[:, None] & (h < H)[None, :])


@triton.jit
def weight_gradient(
    x, w, bias, targets, lses, alphas, betas, grad_w, grad_bias, N, V, H, BN: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (j, g): BV words and BG columns, over all rows in their order."""
    column = tl.program_id(1) * BG
    v, h = tl.program_id(0) * BV + tl.arange(0, BV), column + tl.arange(0, BG)
    gradient, total = tl.zeros([BV, BG], tl.float32), tl.zeros([BV], tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        target = tl.load(targets + n, mask=n < N, other=-1)
        lse = tl.load(lses + n, mask=n < N, other=0.0)
        alpha, beta = tl.load(alphas + n, mask=n < N, other=0.0), tl.load(betas + n, mask=n < N, other=0.0)
        z = logits(x, w, bias, n, v, N, V, H, BN, BV, BK, PRODUCTS, PRECISION)
        dz = slopes(z, v, lse, alpha, beta, target)
        part = tl.where((alpha != 0) | (beta != 0), n, N)  # rows without are not read: 0 times NaN is NaN
        rows = load_tile(x, part, N, column, H, BG, PRODUCTS)
        gradient += tl.dot(operand(tl.trans(dz), PRODUCTS), rows, input_precision=PRECISION)
        total += tl.sum(dz, 0)
    place = v.to(tl.int64)[:, None] * H + h[None, :]
    inside = (v < V)[:, None] & (h < H)[None, :]
    tl.store(grad_w + place, from_float(gradient, grad_w.dtype.element_ty), mask=inside)
    if grad_bias is not None:
        if column == 0:
            tl.store(grad_bias + v, from_float(total, grad_bias.dtype.element_ty), mask=v < V)
