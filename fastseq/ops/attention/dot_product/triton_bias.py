# mypy: ignore-errors
"""The Triton kernel of the gradient of attention's bias.

    bias_gradient    a tile of the bias, over all that it is broadcast to: 2 D FMA a score

Each tile has one owner, or some whose sums are added in a fixed order: no atomics, and two runs are the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.attention.dot_product.triton_gradients import load_statistics, slopes_of
from fastseq.ops.attention.triton_parts import INF, bounds, dropout_keys, heads, load_rows, sequence, visible


@triton.jit
def bias_gradient(
    q, k, v, bias, slopes, cu_q, cu_k, lengths, seed, g, lse, deltas, partial,
    q_n, q_s, q_h, k_n, k_s, k_h, v_n, v_s, v_h, bias_n, bias_h, bias_i, bias_j, slopes_n,
    N, H, G, Sq, Sk, max_q, max_k, left, right, scale, softcap, threshold, factor,
    own_n, own_h, own_i, own_j, loop_n, loop_h, loop_i, loop_j, parts, size_i, size_j,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SUM_I: tl.constexpr, SUM_J: tl.constexpr,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of the bias, and every parts-th of the tiles that it is broadcast to; partial (parts, bias).

    Of each of the four dimensions a program owns one of `own`, and goes through `loop`, one of which is 1.
    """
    owner, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    mine_j, rest = owner % own_j, owner // own_j
    mine_i, rest = rest % own_i, rest // own_i
    mine_h, mine_n = rest % own_h, rest // own_h
    total = tl.zeros([BM, BN], tl.float32)
    for step in range(part, loop_n * loop_h * loop_i * loop_j, parts):
        first_j, more = (mine_j + step % loop_j) * BN, step // loop_j
        first_i, more = (mine_i + more % loop_i) * BM, more // loop_i
        h, n = (mine_h + more % loop_h).to(tl.int64), (mine_n + more // loop_h).to(tl.int64)
        from_q, token_q, lq = sequence(cu_q, n, Sq, max_q)
        from_k, _token_k, lk = sequence(cu_k, n, Sk, max_k)
        if lengths is not None:
            lk = tl.minimum(lk, tl.maximum(tl.load(lengths + n), 0))
        begin, _whole, _edge, end = bounds(first_i, lk - lq, lk, left, right, BM, BN, LEFT, RIGHT)
        if (first_i < lq) & (first_j + BN > begin) & (first_j < end):
            row = first_i + tl.arange(0, BM)
            i, j = row[:, None], (first_j + tl.arange(0, BN))[None, :]
            place = heads(cu_q, n, h, H, Sq, from_q)
            top, shift = load_statistics(lse + place, deltas + place, row, lq)
            slope, key1, key2 = 0.0, 0, 0
            if slopes is not None:
                slope = tl.load(slopes + n * slopes_n + h).to(tl.float32)
            if DROPOUT:
                key1, key2 = dropout_keys(seed, (n * H + h).to(tl.int32))
            qs = load_rows(q + n * q_n + from_q * q_s + h * q_h, first_i, lq, q_s, D, BM, BD, True, PRODUCTS)
            gs = load_rows(g + (token_q * H + h) * D, first_i, lq, H * D, D, BM, BD, True, PRODUCTS)
            gs = tl.where((top != INF)[:, None], gs, 0.0).to(gs.dtype)
            head = h // G
            keys = load_rows(k + n * k_n + from_k * k_s + head * k_h, first_j, lk, k_s, D, BN, BD, True, PRODUCTS)
            values = load_rows(v + n * v_n + from_k * v_s + head * v_h, first_j, lk, v_s, D, BN, BD, True, PRODUCTS)
            products = tl.dot(qs, tl.trans(keys), input_precision=PRECISION)
            dp = tl.dot(gs, tl.trans(values), input_precision=PRECISION)
            seen = visible(i, j, lq, lk, left, right, LEFT, RIGHT)
            _weights, dt, _ds = slopes_of(
                products, dp, i, j, lq, lk, top[:, None], shift[:, None], seen, scale, softcap,
                bias + n * bias_n + h * bias_h, bias_i, bias_j, slopes, slope, None, None, None, 0, key1, key2,
                threshold, factor, SOFTCAP, DROPOUT, True
            )  # fmt: skip
            total += dt
    to_i, to_j = (mine_i * BM + tl.arange(0, BM))[:, None], (mine_j * BN + tl.arange(0, BN))[None, :]
    if SUM_I:
        total, to_i = tl.sum(total, 0)[None, :], mine_i + tl.zeros([1, 1], tl.int32)
    if SUM_J:
        total, to_j = tl.sum(total, 1)[:, None], mine_j + tl.zeros([1, 1], tl.int32)
    matrix = (part * own_n + mine_n).to(tl.int64) * own_h + mine_h
    place = partial + (matrix * size_i + to_i) * size_j + to_j
    tl.store(place, total, mask=(to_i < size_i) & (to_j < size_j))
