"""Decoding with a cache: what is appended and where, rotation, pages, padding on the left, against the formula."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.flash_attn import flash_attn_with_kvcache

PAGE = 8


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotation of (B,S,H,D) by complex numbers."""
    half = cos.shape[1]
    pairs = x[..., : 2 * half].double()
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else pairs.unflatten(-1, (2, half)).transpose(-1, -2)
    turn = torch.complex(cos.double(), sin.double())[positions][:, :, None]
    spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    spun = spun.flatten(-2) if interleaved else spun.transpose(-1, -2).flatten(-2)
    return torch.cat([spun.to(x.dtype), x[..., 2 * half :]], -1)


def options(number: int) -> dict[str, Any]:
    r = random.Random(number)
    hk = r.choice((1, 2))
    return {
        "dtype": r.choice((torch.bfloat16, torch.float16)),
        "d": r.choice((32, 59, 64, 128)),
        "heads": (hk * r.choice((1, 3)), hk),
        "queries": r.choice((1, 1, 5, 16)),
        "new": r.choice((0, 1, 5, 9)),
        "causal": r.random() < 0.5,
        "window": r.choice(((-1, -1), (-1, -1), (7, 3), (200, -1))),
        "softcap": r.choice((0.0, 20.0)),
        "alibi": r.random() < 0.3,
        "paged": number % 3 == 0,
        "indexed": number % 3 == 1 and r.random() < 0.6,
        "leftpad": r.random() < 0.4,
        "rotary": r.choice((None, True, False)),
        "whole": r.random() < 0.2,
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("number", range(40))
def test_random_case(number: int, device: str, formula: Callable[..., Any], rule: Callable[..., None]) -> None:
    with torch.device(device):
        check(options(number), formula, rule)


def check(o: dict[str, Any], formula: Callable[..., Any], rule: Callable[..., None]) -> None:
    b, room, (hq, hk), d, dtype, new = 3, 40, o["heads"], o["d"], o["dtype"], o["new"]
    make: Any = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    q, k, v = make(b, o["queries"], hq, d), make(b, new, hk, d), make(b, new, hk, d)
    named: dict[str, Any] = {"causal": o["causal"], "window_size": o["window"], "softcap": o["softcap"]}
    rows: Any = torch.arange(b)
    if o["paged"]:
        pages = room // PAGE
        table = torch.randperm(b * pages + 2)[: b * pages].view(b, pages).int()
        caches = [make(b * pages + 2, PAGE, hk, d) for _ in "kv"]
        named["block_table"] = table
    else:
        caches = [make(5 if o["indexed"] else b, room, hk, d) for _ in "kv"]
        if o["indexed"]:
            rows = torch.tensor([4, 0, 2])
            named["cache_batch_idx"] = rows.int()

    def lines(cache: Tensor) -> Tensor:
        """(B,room,Hk,D) what a row has in the cache."""
        return cache[table.long()].flatten(1, 2) if o["paged"] else cache[rows]

    filled = torch.full((b,), room) if o["whole"] and not new else torch.tensor([room - 9, 17, 12])
    named["cache_seqlens"] = None if o["whole"] and not new else filled.int()
    before, begin = [lines(c).clone() for c in caches], torch.zeros(b, dtype=torch.int64)
    if o["leftpad"]:
        begin = torch.tensor([3, 0, 11])
        named["cache_leftpad"] = begin.int()
    if new:
        named.update(k=k, v=v)
    slopes = torch.rand(b, hq) * 0.3 if o["alibi"] else None
    turned_q, turned_k = q, k
    if new and o["rotary"] is not None:
        angles = torch.rand(room + 16, 12) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        named.update(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=o["rotary"])
        local = o["causal"] or any(0 <= w < room for w in o["window"])
        steps = torch.arange(o["queries"]) * int(local)
        turned_q = turned(q, cos, sin, filled[:, None] + steps, o["rotary"])
        turned_k = turned(k, cos, sin, filled[:, None] + torch.arange(new), o["rotary"])
    out, lse = flash_attn_with_kvcache(q, *caches, alibi_slopes=slopes, return_softmax_lse=True, **named)
    assert out.shape == q.shape
    assert lse.shape == (b, hq, o["queries"])

    settings = {"causal": o["causal"], "window": o["window"], "softcap": o["softcap"]}
    after = [lines(c) for c in caches]
    for n in range(b):
        start, end = int(filled[n]), int(filled[n]) + new
        for old, now, added in zip(before, after, (turned_k, v), strict=True):
            assert torch.equal(now[n, :start], old[n, :start])
            assert torch.equal(now[n, end:], old[n, end:])
            torch.testing.assert_close(now[n, start:end], added[n], rtol=8e-3, atol=1e-5)  # a digit of bfloat16
        keys, values = (now[n : n + 1, int(begin[n]) : end] for now in after)
        slope = None if slopes is None else slopes[n]
        arguments = turned_q[n : n + 1], keys, values
        wanted, sums = formula(*arguments, slopes=slope, **settings)
        rough, _ = formula(*arguments, slopes=slope, upcast=False, **settings)
        rule("out", out[n : n + 1], wanted, rough, 2e-3 if new and o["rotary"] is not None else 1e-5)
        torch.testing.assert_close(lse[n].double(), sums[0], rtol=2e-2, atol=5e-2)


def test_values_are_exact_in_float64(formula: Callable[..., Any]) -> None:
    """Rotation and appending, with one length for all rows."""
    q, k, v = (torch.randn(2, 3, 2, 8, dtype=torch.float64) for _ in range(3))
    cache_k, cache_v = (torch.randn(2, 12, 2, 8, dtype=torch.float64) for _ in range(2))
    angles = torch.rand(12, 3, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    named = {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": 5}
    out = flash_attn_with_kvcache(q, cache_k, cache_v, causal=True, **named)
    places = torch.arange(5, 8).expand(2, 3)
    torch.testing.assert_close(cache_k[:, 5:8], turned(k, cos, sin, places, True))
    assert torch.equal(cache_v[:, 5:8], v)
    wanted, _ = formula(turned(q, cos, sin, places, True), cache_k[:, :8], cache_v[:, :8], causal=True)
    torch.testing.assert_close(out, wanted)


def test_nothing_beyond_the_end_is_read() -> None:
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 16, 2, 8)
    cache[0, 5:], cache[1, 11:] = torch.nan, torch.nan
    lengths = torch.tensor([5, 11], dtype=torch.int32)
    assert flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths).isfinite().all()
    table = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    paged = cache.view(4, 8, 2, 8)[:3]
    lengths = torch.tensor([5, 8], dtype=torch.int32)
    paged[2] = 1.0
    assert flash_attn_with_kvcache(q, paged, paged, cache_seqlens=lengths, block_table=table).isfinite().all()


def test_an_empty_cache_is_zero() -> None:
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 16, 2, 8)
    out, lse = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=0, return_softmax_lse=True)
    assert not out.any()
    assert bool((lse == torch.inf).all())


def test_no_gradient_and_no_copy() -> None:
    q, cache = torch.randn(2, 1, 2, 8, requires_grad=True), torch.randn(3, 16, 2, 8)
    assert not flash_attn_with_kvcache(q, cache, cache, cache_seqlens=4).requires_grad


Q, CACHE, NEW = torch.zeros(2, 3, 4, 8), torch.zeros(2, 16, 2, 8), torch.zeros(2, 3, 2, 8)
COS = torch.zeros(16, 4)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"k": NEW, "v": NEW}, ValueError, "cache_seqlens: got None, wanted k, v and cache_seqlens"),
        ({"k": NEW, "cache_seqlens": 1}, ValueError, "v: got None"),
        ({"k": NEW, "v": NEW, "cache_seqlens": 14}, ValueError, "cache_seqlens: got 17 with what is appended"),
        ({"k": CACHE[..., :1, :], "v": CACHE[..., :1, :], "cache_seqlens": 0}, ValueError, "k: got 1 heads, wanted 2"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens: got -1"),
        ({"cache_seqlens": torch.tensor([1])}, ValueError, r"cache_seqlens: got shape \(1,\)"),
        ({"cache_seqlens": 3, "cache_leftpad": torch.tensor([1, 4])}, ValueError, "cache_leftpad: got 1 less"),
        ({"rotary_cos": COS, "rotary_sin": COS}, ValueError, "k: got None, wanted k, v, rotary_cos"),
        ({"k": NEW, "v": NEW, "cache_seqlens": 1, "rotary_cos": COS}, ValueError, "rotary_sin: got None"),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "rotary_cos": COS[:9], "rotary_sin": COS[:9]},
            ValueError,
            r"rotary_cos: got shape \(9, 4\), wanted at least 16 positions",
        ),
        (
            {"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.zeros(2, 1).int()},
            ValueError,
            "cache_batch_idx: got it with a block_table",
        ),
        ({"block_table": torch.zeros(3, 1).int()}, ValueError, r"block_table: got shape \(3, 1\)"),
        ({"window_size": (1, 2, 3)}, TypeError, "window_size"),
        ({"causal": torch.ones(2)}, TypeError, "causal: got a float32 tensor"),
        ({"return_softmax_lse": torch.ones(2)}, TypeError, "return_softmax_lse: got a float32 tensor"),
    ],
    ids=str,
)
def test_errors(named: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(Q, CACHE, CACHE, **named)


def test_more_queries_than_rows() -> None:
    with pytest.raises(ValueError, match="k_cache: got 1 rows, wanted at least the 2 of q"):
        flash_attn_with_kvcache(Q, CACHE[:1], CACHE[:1])
