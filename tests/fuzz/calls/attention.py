"""functional.attention, functional.disentangled_attention and relative_slots."""

from __future__ import annotations

from typing import Any

import torch
from harness import Call, Draw, draws
from torch import Tensor

from fastseq import functional


def heads(draw: Draw) -> tuple[int, int, int]:
    """Heads of queries, of keys, and their size."""
    few = draw.choice(1, 2, 3)
    return few * draw.choice(1, 1, 2), few, draw.size(1)


def qkv(draw: Draw, rows: tuple[int, ...], keys: tuple[int, ...]) -> dict[str, Tensor]:
    """(*rows,Hq,D) queries, (*keys,Hk,D) keys and values."""
    many, few, size = heads(draw)
    dtype = draw.dtype()
    return {
        "q": draw.floats((*rows, many, size), dtype),
        "k": draw.floats((*keys, few, size), dtype),
        "v": draw.floats((*keys, few, size), dtype),
    }


def result_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def packed_lengths(draw: Draw, arguments: dict[str, Any], count: int, longest: tuple[int, int]) -> None:
    """Boundaries of sequences that do not reach past the longest."""
    for letter, most in zip("qk", longest, strict=True):
        arguments[f"cu_seqlens_{letter}"] = draw.bounds(count, most)
        arguments[f"max_seqlen_{letter}"] = most + draw.choice(0, 0, 3)


def settings(draw: Draw, arguments: dict[str, Any], slopes: list[tuple[int, ...]]) -> None:
    """What flash_attn has too."""
    arguments["causal"] = draw.chance(0.4)
    if draw.chance(0.3):
        arguments["window_size"] = (draw.choice(-1, 0, 1, 4), draw.choice(-1, 0, 2))
    if draw.chance(0.2):
        arguments["softcap"] = draw.choice(0.0, 0.5, 30.0)
    if draw.chance(0.3):
        arguments["softmax_scale"] = draw.choice(None, 0.3, 1.0, 0.0, -0.5)
    if draw.chance(0.3):
        arguments["dropout_p"] = draw.choice(0.0, 0.25, 0.9, 1e-6)
    if draw.chance(0.25):
        arguments["alibi_slopes"] = draw.floats(draw.choice(*slopes), draw.choice(torch.float32, torch.float64))


@draws("functional.attention")
def attention(draw: Draw) -> Call:
    packed = draw.chance(0.4)
    n, sq, sk = draw.sizes(0, 0, 0)
    arguments: dict[str, Any] = {}
    if packed:
        packed_lengths(draw, arguments, n, (sq, sk))
        rest = draw.choice(0, 0, 2)
        arguments |= qkv(draw, (int(arguments["cu_seqlens_q"][-1]) + rest,), (int(arguments["cu_seqlens_k"][-1]),))
        sq, sk = arguments["max_seqlen_q"], arguments["max_seqlen_k"]
    else:
        arguments |= qkv(draw, (n, sq), (n, sk))
    q = arguments["q"]
    many, result = q.shape[-2], result_of(q)
    settings(draw, arguments, [(many,), (n, many)])
    if draw.chance(0.3):
        whole = tuple(draw.choice(size, size, 1) for size in (n, many, sq, sk))
        arguments["attn_bias"] = draw.floats(whole[draw.choice(0, 0, 1, 2) :], draw.choice(q.dtype, *(torch.float32,)))
    if draw.chance(0.3) and not packed:
        arguments["key_lengths"] = draw.lengths((n,), sk)
    arguments["return_lse"], arguments["return_attn_weights"] = draw.chance(0.4), draw.chance(0.3)
    results = [(q.shape, q.dtype)]
    if arguments["return_lse"]:
        results.append(((many, q.shape[0]) if packed else (n, many, sq), result))
        draw.finite = False  # the sum of -inf, of a query that sees nothing
    results += [((n, many, sq, sk), result)] if arguments["return_attn_weights"] else []
    return Call(functional.attention, arguments, results)


@draws("functional.disentangled_attention")
def disentangled(draw: Draw) -> Call:
    packed = draw.chance(0.4)
    n, s, p = draw.size(), draw.size(), draw.size(1)
    h, d, dtype = draw.choice(1, 2, 3), draw.size(1), draw.dtype()
    arguments: dict[str, Any] = {}
    if packed:
        arguments["cu_seqlens"] = draw.bounds(n, s)
        if draw.chance(0.5):
            arguments["max_seqlen"] = s
        rows: tuple[int, ...] = (int(arguments["cu_seqlens"][-1]),)
    else:
        rows = (n, s)
        if draw.chance(0.4):
            arguments["lengths"] = draw.lengths((n,), s)
    arguments |= {name: draw.floats((*rows, h, d), dtype) for name in "qkv"}
    for name in ("pos_key", "pos_query"):
        arguments[name] = draw.floats((p, h, d), dtype) if draw.chance(0.8) else None
    if draw.chance(0.5):
        reach = max(s, 1) + draw.choice(0, 2)
        arguments["slots"] = draw.integers((2 * reach - 1,), 0, p).sort().values
    else:
        arguments["position_buckets"] = buckets = draw.choice(-1, 2, 4)
        arguments["max_position"] = p // 2 if buckets < 1 else 4
        wanted = 2 * (buckets if buckets > 0 else arguments["max_position"])
        for name in ("pos_key", "pos_query"):
            if arguments[name] is not None:
                arguments[name] = draw.floats((max(wanted, 2), h, d), dtype)
        arguments["max_position"] = max(arguments["max_position"], 1)
    if draw.chance(0.3):
        arguments["dropout_p"] = draw.choice(0.0, 0.25, 0.9)
    if draw.chance(0.3):
        arguments["softmax_scale"] = draw.choice(None, 0.3, 0.0)
    return Call(functional.disentangled_attention, arguments, [(arguments["q"].shape, dtype)])


@draws("functional.relative_slots")
def relative_slots(draw: Draw) -> Call:
    arguments = {
        "length": draw.size(),
        "position_buckets": draw.choice(-1, 0, 2, 8),
        "max_position": 6,
        "device": "cpu",
    }
    return Call(functional.relative_slots, arguments)
