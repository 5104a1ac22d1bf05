"""flash_attn_func and its relatives: dense and packed sequences, with q, k and v apart or together.

Letters: B rows, Sq and Sk positions of queries and keys, Hq and Hk heads, D head size. What they share:

- dropout_p: probability of a weight to be dropped, in steps of 2^-16; the seed comes from torch's default generator.
- softmax_scale: the scores' factor, by default D^-1/2.
- causal: query i sees keys up to i + Sk - Sq: aligned at the bottom right corner.
- window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; -1 for no limit.
- softcap: scores become softcap * tanh(score / softcap), if it is more than 0.
- alibi_slopes: (Hq,) or (B,Hq): slope * |i + Sk - Sq - j| is taken from a score.
- deterministic: changes nothing, since all backward passes are.
- return_attn_probs: return (out, softmax_lse, S_dmask): the logsumexp of the scores, +inf for a query that sees
  nothing, float32 (float64 for float64); and, of q's dtype, the probabilities before dropout, negative where they were
  dropped, padded with 0 to multiples of 128. S_dmask is for tests: it takes the space that all else saves. It is empty,
  (0,), without dropout.

A query that sees nothing has out 0. Hk divides Hq, and head h of q reads head h // (Hq / Hk). ValueError names an
argument whose shape, device or value does not fit, TypeError one of a wrong type or dtype.

Source: Dao et al. 2022, 2023 (FlashAttention 1 and 2); the interface is that of the package flash_attn 2.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.flash_attn.call import Settings, attend, check_kv, check_lengths, check_q
from fastseq.functional.checks import INTEGERS, expect, integer

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention, softmax(softmax_scale q k^T) v.

    In torch, without what comes after softmax_scale::

        k, v = (x.repeat_interleave(Hq // Hk, 2) for x in (k, v))
        p = (softmax_scale * torch.einsum("bihd,bjhd->bhij", q, k)).softmax(3)
        torch.einsum("bhij,bjhd->bihd", p, v)

    Args:
        q: (B,Sq,Hq,D) floats.
        k: (B,Sk,Hk,D) of the same dtype.
        v: (B,Sk,Hk,D) of the same dtype.
        dropout_p: This and the others are those of the module's docstring.
        softmax_scale: See there.
        causal: See there.
        window_size: See there.
        softcap: See there.
        alibi_slopes: See there.
        deterministic: See there.
        return_attn_probs: See there.

    Returns:
        (B,Sq,Hq,D) out, or (out, (B,Hq,Sq) softmax_lse, S_dmask) with return_attn_probs.
    """
    check_q(q, "(B, Sq, Hq, D)")
    check_kv(q, ("k", "v"), k, v, "(B, Sk, Hk, D)", (q.shape[0], -1))
    tail = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    return attend(q, k, v, Settings(*tail))


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q (B,Sq,Hq,D) and kv (B,Sk,2,Hk,D), whose gradient is one tensor."""
    k, v = _apart("kv", kv, "(B, Sk, 2, Hk, D)")
    tail: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *tail)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B,S,3,H,D), whose gradient is one tensor."""
    q, k, v = _apart("qkv", qkv, "(B, S, 3, H, D)")
    tail: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *tail)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` of packed sequences, one after the other without padding.

    Args:
        q: (total_q,Hq,D) floats.
        k: (total_k,Hk,D) of the same dtype, or with a block_table (pages,page_size,Hk,D).
        v: Of the shape and dtype of k.
        cu_seqlens_q: (B+1,) int32, rising from 0: sequence n has the queries cu_seqlens_q[n] to cu_seqlens_q[n+1].
        cu_seqlens_k: (B+1,) int32: the same for keys; with a block_table, their differences are the lengths.
        max_seqlen_q: The longest sequence of queries, or more.
        max_seqlen_k: The longest sequence of keys, or more.
        dropout_p: This and the others but the last are those of the module's docstring.
        softmax_scale: See there.
        causal: See there.
        window_size: See there.
        softcap: See there.
        alibi_slopes: See there.
        deterministic: See there.
        return_attn_probs: See there.
        block_table: (B,pages of a sequence) int32: which page has the keys from a multiple of page_size on; None: not
            paged.

    Returns:
        (total_q,Hq,D) out, or (out, (Hq,total_q) softmax_lse, (B,Hq,...) S_dmask) with return_attn_probs.
    """
    check_q(q, "(total_q, Hq, D)")
    cu_seqlens_q = check_lengths("cu_seqlens_q", cu_seqlens_q, "(B + 1,)", None, q)
    cu_seqlens_k = check_lengths("cu_seqlens_k", cu_seqlens_k, "(B + 1,)", len(cu_seqlens_q), q)
    if block_table is None:
        check_kv(q, ("k", "v"), k, v, "(total_k, Hk, D)", (-1,))
    else:
        check_kv(q, ("k", "v"), k, v, "(pages, page_size, Hk, D)", (-1, -1))
        k, v = _from_pages(k, v, cu_seqlens_k, block_table)
    tail = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    longest = integer("max_seqlen_q", max_seqlen_q, 0), integer("max_seqlen_k", max_seqlen_k, 0)
    return attend(q, k, v, Settings(*tail), bounds=(cu_seqlens_q, cu_seqlens_k), longest=longest)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q (total_q,Hq,D) and kv (total_k,2,Hk,D), whose gradient is one tensor."""
    k, v = _apart("kv", kv, "(total_k, 2, Hk, D)")
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    tail: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, *lengths, *tail)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (total,3,H,D), whose gradient is one tensor."""
    q, k, v = _apart("qkv", qkv, "(total, 3, H, D)")
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    tail: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, *lengths, *tail)


def _apart(name: str, x: Tensor, letters: str) -> tuple[Tensor, ...]:
    """What lies together in x, as views."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
    if x.dim() != letters.count(",") + 1 or x.shape[-3] != len(name):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {letters}")
    return x.unbind(-3)


def _from_pages(k: Tensor, v: Tensor, cu_seqlens: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (total_k,Hk,D) from pages."""
    count, size = len(cu_seqlens) - 1, k.shape[1]
    if not isinstance(block_table, Tensor) or block_table.dim() != 2 or len(block_table) != count:
        got = f"shape {tuple(block_table.shape)}" if isinstance(block_table, Tensor) else type(block_table).__name__
        raise ValueError(f"block_table: got {got}, wanted (B, pages of a sequence) with B = {count}")
    if k.is_meta:
        raise ValueError("block_table: got one on the meta device, wanted one with values")
    expect("block_table", block_table, "(B, pages of a sequence)", tuple(block_table.shape), k, INTEGERS, lead="k")
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    room = block_table.shape[1] * size
    if k.device.type == "cpu" and count and int(lengths.max()) > room:
        raise ValueError(
            f"cu_seqlens_k: got a sequence of {int(lengths.max())} keys, wanted at most the {room} of its pages"
        )
    rows = torch.repeat_interleave(torch.arange(count, device=k.device), lengths)
    places = torch.arange(len(rows), device=k.device) - cu_seqlens[rows]
    pages = block_table[rows, places // size].long()
    return k[pages, places % size], v[pages, places % size]
