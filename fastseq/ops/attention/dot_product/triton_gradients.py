# mypy: ignore-errors
# ruff: noqa: SIM102 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""The Triton kernels of attention's gradients: scores and probabilities are computed again, tile by tile, from lse.

    delta            delta_i = sum_d grad_out_id out_id - grad_lse_i
    key_gradient     BN keys of a key head, the queries of its heads that see them: 4 D FMA a score
    query_gradient   BM queries of a head, the keys that they see: 3 D FMA a score

Each gradient has one owner, which sums in a fixed order: no atomics, and two runs are the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.attention.triton_parts import (
    INF,
    LOG2E,
    add_to_slots,
    add_weighted,
    bounds,
    clear,
    dropout_keys,
    heads,
    kept,
    load_rows,
    scores,
    sequence,
    spoil,
    store_rows,
    visible,
)
from fastseq.ops.triton_types import as_float


@triton.jit
def delta(grad_out, grad_lse, out, lse, deltas, rows, S, H, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """A program: BR rows of (B,S,H). A row whose lse is -inf has no gradient, whatever came for it."""
    r, d = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BD)
    token, h = r // H, r % H
    place, inside = (token // S * H + h) * S + token % S, r < rows
    live = inside & (tl.load(lse + place, mask=inside, other=-INF) != -INF)
    both = live[:, None] & (d < D)[None, :]
    g = as_float(tl.load(grad_out + r[:, None] * D + d[None, :], mask=both, other=0))
    total = tl.sum(g * as_float(tl.load(out + r[:, None] * D + d[None, :], mask=both, other=0)), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + place, mask=live, other=0.0)
    tl.store(deltas + place, total, mask=inside)


@triton.jit
def slopes_of(
    products, dp, i, j, lq, lk, lse, delta, seen, scale, softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots,
    P, key1, key2, threshold, factor, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile: m p, the weights of values; dt; and the slopes in the products, but for `scale`."""
    t, bend = scores(
        products, i, j, lq, lk, scale, softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, P, SOFTCAP
    )
    p = tl.exp2((t - lse) * LOG2E)
    weights = p
    if DROPOUT:
        keep = kept(key1, key2, i, j, threshold)
        weights = tl.where(keep, p * factor, 0.0)
        dp = tl.where(keep, dp * factor, 0.0)
    dt = p * (dp - delta)
    if MASKED:
        weights, dt = tl.where(seen, weights, 0.0), tl.where(seen, dt, 0.0)
    ds = dt
    if SOFTCAP:
        ds = dt * (1.0 - bend * bend)
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
    return weights, dt, ds


@triton.jit
def load_statistics(lse, deltas, i, lq):
    """lse, +inf where there is no row or no gradient in it, and delta."""
    value = tl.load(lse + i, mask=i < lq, other=-INF)
    return tl.where(value == -INF, INF, value), tl.load(deltas + i, mask=i < lq, other=0.0)


@triton.jit
def key_blocks(
    dk, dv, ks, vs, begin, end, q, g, q_s, g_s, lse, deltas, j, first, lq, lk, left, right, scale, softcap, bias,
    bias_i, bias_j, slopes, slope, c2p, p2c, slots, d_p2c, P, key1, key2, threshold, factor,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of the queries in [begin, end); tiles are transposed, (BN,BM)."""
    for start in range(begin, end, BM):
        row = start + tl.arange(0, BM)
        i = row[None, :]
        top, shift = load_statistics(lse, deltas, row, lq)
        qs = load_rows(q, start, lq, q_s, D, BM, BD, MASKED, PRODUCTS)
        gs = load_rows(g, start, lq, g_s, D, BM, BD, MASKED, PRODUCTS)
        if bias is not None:  # which may have forbidden all keys of a row: what came for it is not looked at
            gs = tl.where((top != INF)[:, None], gs, 0.0).to(gs.dtype)
        seen = i < lq
        if MASKED:
            seen = visible(i, j, lq, lk, left, right, LEFT, RIGHT)
        products = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)
        dp = tl.dot(vs, tl.trans(gs), input_precision=PRECISION)
        weights, _, ds = slopes_of(
            products, dp, i, j, lq, lk, top[None, :], shift[None, :], seen, scale, softcap, bias, bias_i, bias_j,
            slopes, slope, c2p, p2c, slots, P, key1, key2, threshold, factor, SOFTCAP, DROPOUT, MASKED
        )  # fmt: skip
        dv = add_weighted(dv, weights, gs, MASKED and (LEFT or RIGHT), PRODUCTS, PRECISION)
        dk = add_weighted(dk, ds, qs, MASKED and (LEFT or RIGHT), PRODUCTS, PRECISION)
        if MASKED and (LEFT or RIGHT):
            dv = spoil(dv, gs, g, start, lq, g_s, j, lq - lk, right, left, D, BM, BD, RIGHT, LEFT)
            dk = spoil(dk, qs, q, start, lq, q_s, j, lq - lk, right, left, D, BM, BD, RIGHT, LEFT)
        if d_p2c is not None:
            add_to_slots(d_p2c, ds * scale, j, i, lk, lq, start + BM - 1, slots, P, -1)
    return dk, dv


@triton.jit
def key_gradient(
    q, k, v, bias, slopes, cu_q, cu_k, lengths, seed, c2p, p2c, slots, g, lse, deltas, dk, dv, d_p2c,
    q_n, q_s, q_h, k_n, k_s, k_h, v_n, v_s, v_h, bias_n, bias_h, bias_i, bias_j, slopes_n,
    N, H, G, Sq, Sk, max_q, max_k, T, P, left, right, scale, softcap, threshold, factor,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: BN keys of a sequence and key head, over its G query heads."""
    blocks = (max_k + BN - 1) // BN
    block, nh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    heads_k = H // G
    n, hk = (nh // heads_k).to(tl.int64), (nh % heads_k).to(tl.int64)
    if cu_k is not None:
        if block == 0:
            clear(cu_k, n, N, Sk, dk, None, hk, heads_k, D, BD)
            clear(cu_k, n, N, Sk, dv, None, hk, heads_k, D, BD)
    from_q, token_q, lq = sequence(cu_q, n, Sq, max_q)
    from_k, token_k, all_k = sequence(cu_k, n, Sk, max_k)
    lk = all_k
    if lengths is not None:
        lk = tl.minimum(lk, tl.maximum(tl.load(lengths + n), 0))
        if slots is not None:
            lq = lk
    first = block * BN
    if first < all_k:
        k += n * k_n + from_k * k_s + hk * k_h
        v += n * v_n + from_k * v_s + hk * v_h
        j = (first + tl.arange(0, BN))[:, None]
        ks = load_rows(k, first, lk, k_s, D, BN, BD, True, PRODUCTS)
        vs = load_rows(v, first, lk, v_s, D, BN, BD, True, PRODUCTS)
        begin, whole, edge, end = bounds(first, lq - lk, lq, right, left, BN, BM, RIGHT, LEFT)
        edge, end = tl.where(first < lk, edge, 0), tl.where(first < lk, end, 0)
        sum_k, sum_v = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
        for member in range(G):
            h = hk * G + member
            qh, gh = q + n * q_n + from_q * q_s + h * q_h, g + (token_q * H + h) * D
            place = heads(cu_q, n, h, H, Sq, from_q)
            lse_h, deltas_h = lse + place, deltas + place
            bias_nh, c2p_h, p2c_h, d_p2c_h, slope, key1, key2 = bias, c2p, p2c, d_p2c, 0.0, 0, 0
            if bias is not None:
                bias_nh = bias + n * bias_n + h * bias_h
            if slopes is not None:
                slope = tl.load(slopes + n * slopes_n + h).to(tl.float32)
            if DROPOUT:
                key1, key2 = dropout_keys(seed, (n * H + h).to(tl.int32))
            if c2p is not None:
                c2p_h = c2p + (h * T + token_q) * P
            if p2c is not None:
                p2c_h = p2c + (h * T + token_k) * P
                d_p2c_h = d_p2c + (h * T + token_k) * P
            if RIGHT:
                sum_k, sum_v = key_blocks(
                    sum_k, sum_v, ks, vs, begin, tl.minimum(whole, end), qh, gh, q_s, H * D, lse_h, deltas_h, j, first,
                    lq, lk, left, right, scale, softcap, bias_nh, bias_i, bias_j, slopes, slope, c2p_h, p2c_h, slots,
                    d_p2c_h, P, key1, key2, threshold, factor, D, LEFT, RIGHT, SOFTCAP, DROPOUT, BM, BD, True,
                    PRODUCTS, PRECISION
                )  # fmt: skip
            sum_k, sum_v = key_blocks(
                sum_k, sum_v, ks, vs, whole, edge, qh, gh, q_s, H * D, lse_h, deltas_h, j, first, lq, lk, left, right,
                scale, softcap, bias_nh, bias_i, bias_j, slopes, slope, c2p_h, p2c_h, slots, d_p2c_h, P, key1, key2,
                threshold, factor, D, LEFT, RIGHT, SOFTCAP, DROPOUT, BM, BD, False, PRODUCTS, PRECISION
            )  # fmt: skip
            sum_k, sum_v = key_blocks(
                sum_k, sum_v, ks, vs, tl.maximum(whole, edge), end, qh, gh, q_s, H * D, lse_h, deltas_h, j, first, lq,
                lk, left, right, scale, softcap, bias_nh, bias_i, bias_j, slopes, slope, c2p_h, p2c_h, slots, d_p2c_h,
                P, key1, key2, threshold, factor, D, LEFT, RIGHT, SOFTCAP, DROPOUT, BM, BD, True, PRODUCTS, PRECISION
            )  # fmt: skip
        place = (token_k * heads_k + hk) * D
        real = j < lk
        store_rows(dk + place, tl.where(real, sum_k * scale, 0.0), first, all_k, heads_k * D, D, BN, BD)
        store_rows(dv + place, tl.where(real, sum_v, 0.0), first, all_k, heads_k * D, D, BN, BD)


@triton.jit
def query_blocks(
    dq, qs, gs, top, shift, begin, end, k, v, k_s, v_s, i, lq, lk, left, right, scale, softcap, bias, bias_i, bias_j,
    slopes, slope, c2p, p2c, slots, d_c2p, P, key1, key2, threshold, factor,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of the keys in [begin, end)."""
    for start in range(begin, end, BN):
        j = (start + tl.arange(0, BN))[None, :]
        keys = load_rows(k, start, lk, k_s, D, BN, BD, MASKED, PRODUCTS)
        values = load_rows(v, start, lk, v_s, D, BN, BD, MASKED, PRODUCTS)
        seen = i < lq
        if MASKED:
            seen = visible(i, j, lq, lk, left, right, LEFT, RIGHT)
        products = tl.dot(qs, tl.trans(keys), input_precision=PRECISION)
        dp = tl.dot(gs, tl.trans(values), input_precision=PRECISION)
        _weights, _dt, ds = slopes_of(
            products, dp, i, j, lq, lk, top[:, None], shift[:, None], seen, scale, softcap, bias, bias_i, bias_j,
            slopes, slope, c2p, p2c, slots, P, key1, key2, threshold, factor, SOFTCAP, DROPOUT, MASKED
        )  # fmt: skip
        dq = add_weighted(dq, ds, keys, MASKED and (LEFT or RIGHT), PRODUCTS, PRECISION)
        if MASKED and (LEFT or RIGHT):
            dq = spoil(dq, keys, k, start, lk, k_s, i, lk - lq, left, right, D, BN, BD, LEFT, RIGHT)
        if d_c2p is not None:
            add_to_slots(d_c2p, ds * scale, i, j, lq, lk, start + BN - 1, slots, P, 1)
    return dq


@triton.jit
def query_gradient(
    q, k, v, bias, slopes, cu_q, cu_k, lengths, seed, c2p, p2c, slots, g, lse, deltas, dq, d_c2p,
    q_n, q_s, q_h, k_n, k_s, k_h, v_n, v_s, v_h, bias_n, bias_h, bias_i, bias_j, slopes_n,
    N, H, G, Sq, Sk, max_q, max_k, T, P, left, right, scale, softcap, threshold, factor,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of a sequence and head."""
    blocks = (max_q + BM - 1) // BM
    block, nh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n, h = (nh // H).to(tl.int64), (nh % H).to(tl.int64)
    if cu_q is not None:
        if block == 0:
            clear(cu_q, n, N, Sq, dq, None, h, H, D, BD)
    if RIGHT:
        block = blocks - 1 - block
    from_q, token_q, all_q = sequence(cu_q, n, Sq, max_q)
    from_k, token_k, lk = sequence(cu_k, n, Sk, max_k)
    lq = all_q
    if lengths is not None:
        lk = tl.minimum(lk, tl.maximum(tl.load(lengths + n), 0))
        if slots is not None:  # self-attention: queries end where keys do
            lq = lk
    first = block * BM
    if first < all_q:
        q += n * q_n + from_q * q_s + h * q_h
        k += n * k_n + from_k * k_s + (h // G) * k_h
        v += n * v_n + from_k * v_s + (h // G) * v_h
        slope, key1, key2 = 0.0, 0, 0
        if bias is not None:
            bias += n * bias_n + h * bias_h
        if slopes is not None:
            slope = tl.load(slopes + n * slopes_n + h).to(tl.float32)
        if DROPOUT:
            key1, key2 = dropout_keys(seed, nh)
        if c2p is not None:
            c2p += (h * T + token_q) * P
            d_c2p += (h * T + token_q) * P
        if p2c is not None:
            p2c += (h * T + token_k) * P
        row = first + tl.arange(0, BM)
        i = row[:, None]
        place = heads(cu_q, n, h, H, Sq, from_q)
        top, shift = load_statistics(lse + place, deltas + place, row, lq)
        qs = load_rows(q, first, lq, q_s, D, BM, BD, True, PRODUCTS)
        gs = load_rows(g + (token_q * H + h) * D, first, lq, H * D, D, BM, BD, True, PRODUCTS)
        gs = tl.where((top != INF)[:, None], gs, 0.0).to(gs.dtype)
        begin, whole, edge, end = bounds(first, lk - lq, lk, left, right, BM, BN, LEFT, RIGHT)
        edge, end = tl.where(first < lq, edge, 0), tl.where(first < lq, end, 0)
        total = tl.zeros([BM, BD], tl.float32)
        if LEFT:
            total = query_blocks(
                total, qs, gs, top, shift, begin, tl.minimum(whole, end), k, v, k_s, v_s, i, lq, lk, left, right, scale,
                softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, d_c2p, P, key1, key2, threshold, factor,
                D, LEFT, RIGHT, SOFTCAP, DROPOUT, BN, BD, True, PRODUCTS, PRECISION
            )  # fmt: skip
        total = query_blocks(
            total, qs, gs, top, shift, whole, edge, k, v, k_s, v_s, i, lq, lk, left, right, scale,
            softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, d_c2p, P, key1, key2, threshold, factor,
            D, LEFT, RIGHT, SOFTCAP, DROPOUT, BN, BD, False, PRODUCTS, PRECISION
        )  # fmt: skip
        total = query_blocks(
            total, qs, gs, top, shift, tl.maximum(whole, edge), end, k, v, k_s, v_s, i, lq, lk, left, right, scale,
            softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, d_c2p, P, key1, key2, threshold, factor,
            D, LEFT, RIGHT, SOFTCAP, DROPOUT, BN, BD, True, PRODUCTS, PRECISION
        )  # fmt: skip
        total = tl.where(i < lq, total * scale, 0.0)
        store_rows(dq + (token_q * H + h) * D, total, first, all_q, H * D, D, BM, BD)
