"""flash_attn's functions and those of its bert_padding."""

from __future__ import annotations

from typing import Any

import torch
from harness import Call, Draw, draws

from calls.attention import heads, packed_lengths, qkv, result_of, settings
from fastseq import flash_attn
from fastseq.flash_attn import bert_padding


def tail(draw: Draw, arguments: dict[str, Any], slopes: list[tuple[int, ...]]) -> bool:
    """The arguments that all functions share; whether probabilities come back."""
    settings(draw, arguments, slopes)
    arguments["deterministic"] = draw.chance(0.5)
    arguments["return_attn_probs"] = draw.chance(0.3)
    if arguments["return_attn_probs"]:
        draw.finite = False  # the sum of inf, of a query that sees nothing
    return bool(arguments["return_attn_probs"])


def together(draw: Draw, arguments: dict[str, Any], *names: str) -> None:
    """Puts equally shaped ones of q, k and v into one tensor."""
    parts = [arguments.pop(name) for name in names]
    arguments["".join(names)] = draw.layout(torch.stack(parts, -3))


@draws("flash_attn.flash_attn_func", "flash_attn.flash_attn_kvpacked_func", "flash_attn.flash_attn_qkvpacked_func")
def dense(draw: Draw, name: str) -> Call:
    n, sq, sk = draw.sizes(0, 0, 0)
    arguments: dict[str, Any] = qkv(draw, (n, sq), (n, sk))
    if "qkv" in name:
        arguments = {x: draw.floats(tuple(arguments["q"].shape), arguments["q"].dtype) for x in "qkv"}
    q = arguments["q"]
    if "packed" in name:
        together(draw, arguments, *("qkv" if "qkv" in name else "kv"))
    many = q.shape[2]
    probabilities = tail(draw, arguments, [(many,), (n, many)])
    results = None if probabilities else [(q.shape, q.dtype)]
    return Call(getattr(flash_attn, name), arguments, results, words=("q", "k"))


@draws(
    "flash_attn.flash_attn_varlen_func",
    "flash_attn.flash_attn_varlen_kvpacked_func",
    "flash_attn.flash_attn_varlen_qkvpacked_func",
)
def packed(draw: Draw, name: str) -> Call:
    n, sq, sk = draw.sizes(0, 0, 0)
    arguments: dict[str, Any] = {}
    packed_lengths(draw, arguments, n, (sq, sk))
    if "qkv" in name:
        rows = keys = (int(arguments["cu_seqlens_q"][-1]),)
        arguments = {"cu_seqlens": arguments["cu_seqlens_q"], "max_seqlen": arguments["max_seqlen_q"]}
    else:
        rows, keys = (int(arguments["cu_seqlens_q"][-1]),), (int(arguments["cu_seqlens_k"][-1]),)
    arguments |= qkv(draw, rows, keys)
    if "qkv" in name:
        arguments |= {x: draw.floats(tuple(arguments["q"].shape), arguments["q"].dtype) for x in "kv"}
    q, k = arguments["q"], arguments["k"]
    if "packed" in name:
        together(draw, arguments, *("qkv" if "qkv" in name else "kv"))
    elif draw.chance(0.3) and n:  # pages of 2 keys, in any order; some are nobody's
        wide = -(-sk // 2)
        table = torch.randperm(n * wide + 1, generator=draw.generator)[: n * wide].view(n, wide)
        arguments["block_table"] = table.to(torch.int32)
        arguments |= {x: draw.floats((n * wide + 1, 2, *k.shape[1:]), k.dtype) for x in "kv"}
    probabilities = tail(draw, arguments, [(q.shape[1],), (n, q.shape[1])])
    results = None if probabilities else [(q.shape, q.dtype)]
    return Call(
        getattr(flash_attn, name), arguments, results, words=("q", "k", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q")
    )


@draws("flash_attn.flash_attn_with_kvcache")
def kvcache(draw: Draw) -> Call:
    b, sq, new, room = draw.size(), draw.size(), draw.size(), draw.size(1) + 17
    many, few, d = heads(draw)
    dtype, paged = draw.dtype(), draw.chance(0.3)
    pages = -(-room // 4)
    shape = (b * pages + 1, 4, few, d) if paged else (b + draw.choice(0, 2), room, few, d)
    room = pages * 4 if paged else room
    arguments: dict[str, Any] = {"q": draw.floats((b, sq, many, d), dtype)}
    arguments |= {name: draw.floats(shape, dtype).contiguous() for name in ("k_cache", "v_cache")}
    filled = room - 17 if draw.chance(0.8) else 0
    arguments["cache_seqlens"] = draw.integers((b,), 0, filled + 1, draw.choice(torch.int32, torch.int64))
    if draw.chance(0.2):
        arguments["cache_seqlens"] = filled
    if paged:
        order = torch.randperm(b * pages + 1, generator=draw.generator)[: b * pages]
        arguments["block_table"] = order.view(b, pages).to(torch.int32)
    elif draw.chance(0.3):
        order = torch.randperm(shape[0], generator=draw.generator)[:b]
        arguments["cache_batch_idx"] = order.to(torch.int32)
    if draw.chance(0.6):
        arguments |= {name: draw.floats((b, new, few, d), dtype) for name in "kv"}
        if draw.chance(0.5) and sq <= 17:
            half = draw.random.randrange(d // 2 + 1)
            arguments |= {f"rotary_{x}": draw.floats((room + 17, half), dtype) for x in ("cos", "sin")}
            arguments["rotary_interleaved"] = draw.chance(0.5)
    if draw.chance(0.2):
        arguments["cache_leftpad"] = torch.zeros(b, dtype=torch.int32)
    settings(draw, arguments, [(many,), (b, many)])
    arguments.pop("dropout_p", None)
    arguments["return_softmax_lse"] = draw.chance(0.3)
    results = [((b, sq, many, d), dtype)]
    if arguments["return_softmax_lse"]:
        results.append(((b, many, sq), result_of(arguments["q"])))
        draw.finite = False
    return Call(flash_attn.flash_attn_with_kvcache, arguments, results, inplace=True)


def padded(draw: Draw) -> tuple[int, int, tuple[int, ...], torch.dtype]:
    return draw.size(), draw.size(), tuple(draw.size() for _ in range(draw.choice(1, 1, 2))), draw.dtype()


@draws("flash_attn.bert_padding.unpad_input")
def unpad(draw: Draw) -> Call:
    b, s, rest, dtype = padded(draw)
    taken = torch.rand(b, s, generator=draw.generator)
    kind = draw.choice(torch.bool, torch.int64, torch.int32)
    arguments = {"hidden_states": draw.floats((b, s, *rest), dtype), "attention_mask": (taken < 0.6).to(kind)}
    if draw.chance(0.3):
        arguments["unused_mask"] = (taken > 0.8).to(kind)
    return Call(bert_padding.unpad_input, arguments)


@draws("flash_attn.bert_padding.unpad_input_for_concatenated_sequences")
def unpad_concatenated(draw: Draw) -> Call:
    b, s, rest, dtype = padded(draw)
    lengths = torch.zeros(b, s, dtype=torch.int64)
    for row in lengths:
        room, place = s, 0
        while room and draw.chance(0.7):
            row[place] = 1 + draw.random.randrange(room)
            room, place = room - int(row[place]), place + 1
    arguments = {"hidden_states": draw.floats((b, s, *rest), dtype), "attention_mask_in_length": lengths}
    return Call(bert_padding.unpad_input_for_concatenated_sequences, arguments)


@draws("flash_attn.bert_padding.pad_input")
def pad(draw: Draw) -> Call:
    b, s, rest, dtype = padded(draw)
    indices = torch.randperm(b * s, generator=draw.generator)[: draw.size()]
    arguments = {
        "hidden_states": draw.floats((len(indices), *rest), dtype),
        "indices": indices,
        "batch": b,
        "seqlen": s,
    }
    return Call(bert_padding.pad_input, arguments, [((b, s, *rest), dtype)], words=("first_axis_dim", "values"))


@draws("flash_attn.bert_padding.index_first_axis")
def index_first(draw: Draw) -> Call:
    n, m, rest, dtype = padded(draw)
    indices = draw.integers((m if n else 0,), 0, n, torch.int64)
    results = [((len(indices), *rest), dtype)]
    return Call(bert_padding.index_first_axis, {"input": draw.floats((n, *rest), dtype), "indices": indices}, results)


@draws("flash_attn.bert_padding.index_put_first_axis")
def index_put(draw: Draw) -> Call:
    n, m, rest, dtype = padded(draw)
    indices = torch.randperm(n, generator=draw.generator)[:m]
    arguments = {"values": draw.floats((len(indices), *rest), dtype), "indices": indices, "first_axis_dim": n}
    return Call(bert_padding.index_put_first_axis, arguments, [((n, *rest), dtype)])
