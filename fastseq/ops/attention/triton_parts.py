# mypy: ignore-errors
# ruff: noqa: RET505 (in a kernel, an `if` on a constant and one on a tensor are different things)
"""What the Triton kernels of attention are made of: sequences, tiles, scores, what is visible, dropout.

Index tensors i (queries) and j (keys) are columns and rows, or rows and columns where a kernel works on transposed
tiles: what takes them broadcasts. Differences of scores are multiplied by log2(e) for exp2, and not the scores: large
ones would lose digits by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.ops.triton_types import as_float, from_float, operand

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence(cu, n, S, longest):
    """Of sequence n: the first token in its row of the batch, the first of all rows, and the number of tokens.

    Dense rows are S long. Packed ones are cut to what there is, so that wrong offsets read nothing outside.
    """
    if cu is not None:
        first = tl.minimum(tl.maximum(tl.load(cu + n), 0), S)
        last = tl.minimum(tl.maximum(tl.load(cu + n + 1), first), S)
        return first.to(tl.int64), first.to(tl.int64), tl.minimum(last - first, longest)
    else:
        return n * 0, n * S, longest


@triton.jit
def heads(cu, n, h, H, S, first):
    """Where the statistics (B,H,S) of a sequence and head begin."""
    if cu is not None:
        return h * S + first
    else:
        return (n * H + h) * S


@triton.jit
def clear(cu, n, N, S, rows, statistics, h, H, D: tl.constexpr, BD: tl.constexpr):
    """Zeros in rows (S,H,D), and -inf in statistics (H,S), for the tokens before and behind all sequences."""
    d = tl.arange(0, BD)
    before = tl.minimum(tl.load(cu, mask=n == 0, other=0), S)
    behind = tl.maximum(tl.load(cu + N, mask=n == N - 1, other=2147483647), 0)
    for part in tl.static_range(2):
        for token in range(behind if part else 0, S if part else before):
            place = rows + h * D + (tl.zeros([BD], tl.int64) + token) * (H * D) + d
            tl.store(place, tl.zeros([BD], rows.dtype.element_ty), mask=d < D)
            if statistics is not None:
                tl.store(statistics + h * S + token, -INF)


@triton.jit
def load_rows(
    base, start, count, stride, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Rows start.. (BLOCK,BD) of a matrix with `count` rows, as operands; zeros beyond its ends."""
    r, d = tl.arange(0, BLOCK), tl.arange(0, BD)
    place = base + (start + r).to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        if D == BD:
            return operand(tl.load(place, mask=(start + r < count)[:, None], other=0), PRODUCTS)
        else:
            return operand(tl.load(place, mask=(start + r < count)[:, None] & (d < D)[None, :], other=0), PRODUCTS)
    else:
        if D == BD:
            return operand(tl.load(place), PRODUCTS)
        else:
            return operand(tl.load(place, mask=(d < D)[None, :], other=0), PRODUCTS)


@triton.jit
def store_rows(base, values, start, count, stride, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """The counterpart of `load_rows`."""
    r, d = tl.arange(0, BLOCK), tl.arange(0, BD)
    place = base + (start + r).to(tl.int64)[:, None] * stride + d[None, :]
    inside = (start + r < count)[:, None] & (d < D)[None, :]
    tl.store(place, from_float(values, base.dtype.element_ty), mask=inside)


@triton.jit
def bounds(
    first, shift, count, lower, upper, OWN: tl.constexpr, OTHER: tl.constexpr, LOWER: tl.constexpr,
    UPPER: tl.constexpr,
):  # fmt: skip
    """What x = first .. first + OWN - 1 see of `count` others: y from x + shift - lower to x + shift + upper.

    Four multiples of OTHER (the last is no multiple, but an end): all others that any x sees lie in [begin, end), and
    in [whole, edge) each x sees each y. Loops go [begin, min(whole, end)), [whole, edge), [max(whole, edge), end).
    """
    begin, whole = 0, 0
    edge, end = count // OTHER * OTHER, count
    if LOWER:
        begin = tl.maximum(first + shift - lower, 0) // OTHER * OTHER
        whole = (tl.maximum(first + OWN - 1 + shift - lower, 0) + OTHER - 1) // OTHER * OTHER
    if UPPER:
        end = tl.minimum(end, tl.maximum(first + OWN + shift + upper, 0))
        edge = tl.minimum(edge, tl.maximum(first + shift + upper + 1, 0) // OTHER * OTHER)
    return begin, whole, edge, end


@triton.jit
def visible(i, j, lq, lk, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which of queries i see which of keys j; both exist."""
    seen = (i < lq) & (j < lk)
    if LEFT:
        seen = seen & (j >= i + (lk - lq) - left)
    if RIGHT:
        seen = seen & (j <= i + (lk - lq) + right)
    return seen


@triton.jit
def tanh_of(x):
    """Near 0 a series, as the quotient loses digits there."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    y = x * x
    small = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.15, small, tl.where(x < 0, -large, large))


@triton.jit
def scores(
    products, i, j, lq, lk, scale, softcap, bias, bias_i, bias_j, slopes, slope, c2p, p2c, slots, P,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores t out of products q.k, and the tanh of softcap (or anything, without)."""
    real = (i < lq) & (j < lk)
    if slots is not None:
        slot = tl.load(slots + (i - j), mask=real, other=0)
        if c2p is not None:
            products += as_float(tl.load(c2p + (i * P + slot), mask=real, other=0))
        if p2c is not None:
            products += as_float(tl.load(p2c + (j * P + slot), mask=real, other=0))
    bend = products
    if SOFTCAP:
        bend = tanh_of(products * (scale / softcap))
        t = bend * softcap
    else:
        t = products * scale
    if bias is not None:
        t += as_float(tl.load(bias + (i.to(tl.int64) * bias_i + j * bias_j), mask=real, other=0))
    if slopes is not None:
        t -= tl.abs(i + (lk - lq) - j).to(tl.float32) * slope
    return t, bend


@triton.jit
def mix(x):
    """A permutation of 32-bit numbers that changes half of the bits for one."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_keys(seed, nh):
    """What the seed makes of head nh, n Hq + h."""
    bits = tl.load(seed)
    low, high = (bits & 0xFFFFFFFF).to(tl.uint32), ((bits >> 32) & 0xFFFFFFFF).to(tl.uint32)
    nh = nh.to(tl.uint32)
    return mix(mix(low) + nh), mix(mix(high ^ 0x9E3779B9) + nh)


@triton.jit
def kept(key1, key2, i, j, threshold):
    """The entries that dropout keeps: the hash of fastseq.ops.attention.dropout, 32 bits for two of them."""
    row = i.to(tl.uint32)
    word = ((j >> 5) * 16 + (j & 15)).to(tl.uint32)
    x = mix(key1 + row) + word * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x += mix(key2 ^ row)
    x *= 0x846CA68B
    x ^= x >> 16
    return ((x >> (j & 16).to(tl.uint32)) & 0xFFFF).to(tl.int32) >= threshold


@triton.jit
def add_weighted(total, weights, values, EXCLUDE: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr):
    """Add weights @ values; with EXCLUDE without values that are not finite, which are for `spoil`."""
    if EXCLUDE:
        values = tl.where(tl.abs(as_float(values)) < INF, values, 0.0).to(values.dtype)
    return tl.dot(operand(weights, PRODUCTS), values, total, input_precision=PRECISION)


@triton.jit
def spoil(
    total, values, base, start, count, stride, own, shift, lower, upper, D: tl.constexpr, BLOCK: tl.constexpr,
    BD: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
):  # fmt: skip
    """NaN in `total` for each number of `values` that is not finite, where `own` sees it: `bounds` has what it sees.

    A product with 0 would do it for those that do not see it, too.
    """
    if tl.min(tl.min((tl.abs(as_float(values)) < INF).to(tl.int32), 1), 0) == 0:
        d = tl.arange(0, BD)
        for other in range(start, tl.minimum(start + BLOCK, count)):
            row = tl.load(base + (tl.zeros([BD], tl.int64) + other) * stride + d, mask=d < D, other=0)
            bad = tl.where(tl.abs(as_float(row)) < INF, 0, 1) == 1
            seen = own == own
            if LOWER:
                seen = seen & (other >= own + shift - lower)
            if UPPER:
                seen = seen & (other <= own + shift + upper)
            total = tl.where(seen & bad[None, :], float("nan"), total)
    return total


@triton.jit
def _join(value1, slot1, value2, slot2):
    return tl.where(slot1 == slot2, value1, 0.0) + value2, slot2


@triton.jit
def add_to_slots(table, values, own, other, own_count, other_count, last, slots, P, SIGN: tl.constexpr):
    """Add values (own, other) to table[own, slot], slot being that of the distance SIGN (own - other).

    Slots rise or fall along a row, so that those of one slot are a run: a segmented scan sums it, and its last entry
    adds to the table, which no other entry of the tile does. Tiles of a row follow each other in one program.
    """
    real = (own < own_count) & (other < other_count)
    slot = tl.load(slots + (own - other) * SIGN, mask=real, other=-1)
    sums, _slot = tl.associative_scan((tl.where(real, values, 0.0), slot), 1, _join)
    beyond = (other == last) | (other + 1 >= other_count)
    following = tl.load(slots + (own - other - 1) * SIGN, mask=real & (other + 1 < other_count), other=-1)
    ends = real & (beyond | (following != slot))
    place = table + (own * P + slot)
    tl.store(place, tl.load(place, mask=ends, other=0.0) + sums, mask=ends)
    tl.debug_barrier()  # the next tile goes on with some of these sums, in other threads
