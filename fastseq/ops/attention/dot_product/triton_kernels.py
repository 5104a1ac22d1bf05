# mypy: ignore-errors
# ruff: noqa: SIM102 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""The Triton kernel of attention, by tiles of scores that never leave the multiprocessor (FlashAttention-2, Dao 2023).

    forward   BM queries of a head, all keys that they see: 2 D FMA a score, and 1 exp2

With c2p and p2c it is also disentangled attention's: see `fastseq.ops.attention.disentangled.triton`.

Of the blocks that a program visits, those in the middle need no mask (`triton_parts.bounds`), so a loop stands three
times: for the left edge of a window, the middle, and the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.attention.triton_parts import (
    INF,
    LN2,
    LOG2E,
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


@triton.jit
def forward_blocks(
    total, top, mass, qs, begin, end, k, v, k_s, v_s, i, lq, lk, left, right, scale, softcap, bias, bias_i, bias_j,
    slopes, slope, c2p, p2c, slots, P, key1, key2, threshold,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the keys in [begin, end): sum of weights times values, maximum, and sum of weights."""
    for start in range(begin, end, BN):
        j = (start + tl.arange(0, BN))[None, :]
        keys = load_rows(k, start, lk, k_s, D, BN, BD, MASKED, PRODUCTS)
        products = tl.dot(qs, tl.trans(keys), input_precision=PRECISION)
        t, _bend = scores(
            products, i, j, lq, lk, scale, softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, P, SOFTCAP
        )
        seen = i < lq
        if MASKED:
            seen = visible(i, j, lq, lk, left, right, LEFT, RIGHT)
            t = tl.where(seen, t, -INF)
        new = tl.maximum(top, tl.max(t, 1))
        shift = tl.where(new == -INF, 0.0, new)
        p = tl.exp2((t - shift[:, None]) * LOG2E)
        shrink = tl.exp2((top - shift) * LOG2E)
        mass = mass * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(key1, key2, i, j, threshold), p, 0.0)
        values = load_rows(v, start, lk, v_s, D, BN, BD, MASKED, PRODUCTS)
        total = add_weighted(total * shrink[:, None], p, values, MASKED and (LEFT or RIGHT), PRODUCTS, PRECISION)
        if MASKED and (LEFT or RIGHT):
            total = spoil(total, values, v, start, lk, v_s, i, lk - lq, left, right, D, BN, BD, LEFT, RIGHT)
        top = new
    return total, top, mass


@triton.jit
def forward(
    q, k, v, bias, slopes, cu_q, cu_k, lengths, seed, c2p, p2c, slots, out, lse,
    q_n, q_s, q_h, k_n, k_s, k_h, v_n, v_s, v_h, bias_n, bias_h, bias_i, bias_j, slopes_n,
    N, H, G, Sq, Sk, max_q, max_k, T, P, left, right, scale, softcap, threshold, factor,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of a sequence and head. Those that see the most keys begin."""
    blocks = (max_q + BM - 1) // BM
    block, nh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n, h = (nh // H).to(tl.int64), (nh % H).to(tl.int64)
    if cu_q is not None:
        if block == 0:
            clear(cu_q, n, N, Sq, out, lse, h, H, D, BD)
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
        if p2c is not None:
            p2c += (h * T + token_k) * P
        i = (first + tl.arange(0, BM))[:, None]
        qs = load_rows(q, first, lq, q_s, D, BM, BD, True, PRODUCTS)
        begin, whole, edge, end = bounds(first, lk - lq, lk, left, right, BM, BN, LEFT, RIGHT)
        edge, end = tl.where(first < lq, edge, 0), tl.where(first < lq, end, 0)
        total, top, mass = tl.zeros([BM, BD], tl.float32), tl.full([BM], -INF, tl.float32), tl.zeros([BM], tl.float32)
        if LEFT:
            total, top, mass = forward_blocks(
                total, top, mass, qs, begin, tl.minimum(whole, end), k, v, k_s, v_s, i, lq, lk, left, right, scale,
                softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, P, key1, key2, threshold,
                D, LEFT, RIGHT, SOFTCAP, DROPOUT, BN, BD, True, PRODUCTS, PRECISION
            )  # fmt: skip
        total, top, mass = forward_blocks(
            total, top, mass, qs, whole, edge, k, v, k_s, v_s, i, lq, lk, left, right, scale,
            softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, P, key1, key2, threshold,
            D, LEFT, RIGHT, SOFTCAP, DROPOUT, BN, BD, False, PRODUCTS, PRECISION
        )  # fmt: skip
        total, top, mass = forward_blocks(
            total, top, mass, qs, tl.maximum(whole, edge), end, k, v, k_s, v_s, i, lq, lk, left, right, scale,
            softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, P, key1, key2, threshold,
            D, LEFT, RIGHT, SOFTCAP, DROPOUT, BN, BD, True, PRODUCTS, PRECISION
        )  # fmt: skip
        row = first + tl.arange(0, BM)
        empty = (mass == 0) | (row >= lq)
        inverse = tl.where(empty, 0.0, factor / mass)
        total = tl.where(empty[:, None], 0.0, total * inverse[:, None])
        store_rows(out + (token_q * H + h) * D, total, first, all_q, H * D, D, BM, BD)
        value = tl.where(empty, -INF, top + tl.log2(mass) * LN2)
        tl.store(lse + heads(cu_q, n, h, H, Sq, from_q) + row, value, mask=row < all_q)
