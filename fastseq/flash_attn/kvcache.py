"""flash_attn_with_kvcache: decoding with a cache of keys and values, which it appends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.flash_attn.call import Settings, attend, check_kv, check_lengths, check_q
from fastseq.flash_attn.rotary import rotate
from fastseq.functional.checks import INTEGERS, expect, flag

__all__ = ["flash_attn_with_kvcache"]


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new queries to cached keys and values, after appending k and v to the cache, in place.

    The keys of row b are those of the cache from cache_leftpad[b] to cache_seqlens[b], then k[b]. Sk below is their
    number; causal and window_size are aligned at its end. There is no backward pass.

    Args:
        q: (B,Sq,Hq,D) floats.
        k_cache: (rows,room,Hk,D) of the same dtype, or with a block_table (pages,page_size,Hk,D); rows is B, or with
            cache_batch_idx any number. Written to if k is given.
        v_cache: Of the same shape and dtype.
        k: (B,new,Hk,D) keys to append at cache_seqlens, or None.
        v: (B,new,Hk,D) values to append, or None.
        rotary_cos: (positions,R/2) if k and q are to be rotated (k before it is stored), R <= D. The key t of k is at
            the position cache_seqlens + t. Query i is at cache_seqlens + i if causal or with a window that is smaller
            than the cache, else at cache_seqlens.
        rotary_sin: (positions,R/2), with rotary_cos.
        cache_seqlens: (B,) int32 how much of each row of the cache is filled, or one number; None: all of it.
        cache_batch_idx: (B,) int32 the row of the cache of each row of q; None: 0, 1, 2, ...
        cache_leftpad: (B,) int32 where a row of the cache begins; None: at 0.
        block_table: (B,pages of a row) int32: which page has the keys from a multiple of page_size on; None: not paged.
        softmax_scale: The scores' factor, by default D^-1/2.
        causal: Query i sees keys up to i + Sk - Sq.
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; -1 for no limit.
        softcap: Scores become softcap * tanh(score / softcap), if it is more than 0.
        rotary_interleaved: Whether pairs that are rotated are neighbours, or else halves of the R numbers.
        alibi_slopes: (Hq,) or (B,Hq): slope * |i + Sk - Sq - j| is taken from a score.
        num_splits: Changes nothing.
        return_softmax_lse: Return (out, softmax_lse).

    Returns:
        (B,Sq,Hq,D) out; with return_softmax_lse also (B,Hq,Sq) the logsumexp of the scores, +inf where there is none.

    Raises:
        ValueError: A shape, a device or (on a CPU) a length is not as above.
        TypeError: A type or dtype is not as above.
    """
    check_q(q, "(B, Sq, Hq, D)")
    causal, return_softmax_lse = flag("causal", causal), flag("return_softmax_lse", return_softmax_lse)
    rotary_interleaved = flag("rotary_interleaved", rotary_interleaved)
    cache = _Cache(q, k_cache, v_cache, cache_batch_idx, block_table)
    start = _start(q, cache, cache_seqlens)
    new = _check_new(q, k, v, cache, cache_seqlens)
    end = start + new
    _at_most("cache_seqlens", end, cache.room, "with what is appended")
    if rotary_cos is not None or rotary_sin is not None:
        cos, sin = _check_rotary(q, k, cache, rotary_cos, rotary_sin)
        moving = causal or any(0 <= w < cache.room for w in window_size)
        places = start[:, None] + torch.arange(q.shape[1] if moving else 1, device=q.device)
        _at_most("rotary_cos", places + 1, len(cos), "as the position of a query")
        q = rotate(q, cos, sin, places, interleaved=rotary_interleaved)
    if k is not None and v is not None and new:
        places = start[:, None] + torch.arange(new, device=q.device)
        if rotary_cos is not None:
            k = rotate(k, cos, sin, places, interleaved=rotary_interleaved)
        cache.write(places, k, v)
    keys, values, lengths = cache.read(end, cache_leftpad)
    settings = Settings(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax_lse)
    found = attend(q, keys, values, settings, key_lengths=lengths)
    return found[:2] if return_softmax_lse else found


class _Cache:
    """Where keys and values are: rows, or pages that a table puts in order."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, table: Tensor | None) -> None:
        letters = "(rows, room, Hk, D)" if table is None else "(pages, page_size, Hk, D)"
        check_kv(q, ("k_cache", "v_cache"), k, v, letters, (-1, -1))
        self.q, self.k, self.v, self.table, self.rows = q, k, v, table, rows
        self.size = self.room = k.shape[1]
        if table is not None:
            if rows is not None:
                raise ValueError("cache_batch_idx: got it with a block_table, wanted one of the two")
            wide = table.shape[-1] if isinstance(table, Tensor) and table.dim() else -1
            expect("block_table", table, "(B, pages of a row)", (len(q), wide), q, INTEGERS, lead="q")
            self.room *= wide
        elif rows is not None:
            self.rows = check_lengths("cache_batch_idx", rows, "(B,)", len(q), q).long()
        elif len(k) < len(q):
            raise ValueError(f"k_cache: got {len(k)} rows, wanted at least the {len(q)} of q")

    def where(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(B,n) positions as indices of the first two dimensions of the cache."""
        if self.table is not None:
            return self.table.gather(1, places // self.size).long(), places % self.size
        rows = torch.arange(len(self.q), device=places.device) if self.rows is None else self.rows
        return rows[:, None].expand_as(places), places

    def write(self, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store (B,n,Hk,D) at (B,n)."""
        where = self.where(places)
        self.k[where], self.v[where] = k, v

    def read(self, end: Tensor, leftpad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B,longest,Hk,D), without a copy where they lie in order, and how many there are (B,)."""
        if self.table is None and self.rows is None and leftpad is None:
            return self.k[: len(self.q)], self.v[: len(self.q)], end.int()
        begin = torch.zeros_like(end)
        if leftpad is not None:
            begin = check_lengths("cache_leftpad", leftpad, "(B,)", len(self.q), self.q).long()
            _at_most("cache_leftpad", begin - end, 0, "less the length of the row")
        on_cpu = end.device.type == "cpu" and len(end)
        longest = int((end - begin).max()) if on_cpu else self.room
        places = (begin[:, None] + torch.arange(longest, device=end.device)).clamp(max=max(self.room - 1, 0))
        first, second = self.where(places)
        first = first.clamp(0, len(self.k) - 1)  # tables may hold anything beyond the end
        return self.k[first, second], self.v[first, second], (end - begin).int()


def _start(q: Tensor, cache: _Cache, cache_seqlens: int | Tensor | None) -> Tensor:
    """(B,) how much of each row is filled."""
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        filled = cache.room if cache_seqlens is None else cache_seqlens
        start = torch.full((len(q),), filled, device=q.device)
    else:
        start = check_lengths("cache_seqlens", cache_seqlens, "(B,)", len(q), q).long()
    if start.device.type == "cpu" and bool((start < 0).any()):
        raise ValueError(f"cache_seqlens: got {int(start.min())}, wanted at least 0")
    return start


def _check_new(q: Tensor, k: Tensor | None, v: Tensor | None, cache: _Cache, cache_seqlens: Any) -> int:
    """The number of keys to append to each row."""
    if k is None and v is None:
        return 0
    if k is None or v is None or cache_seqlens is None:
        missing = "k" if k is None else "v" if v is None else "cache_seqlens"
        raise ValueError(f"{missing}: got None, wanted k, v and cache_seqlens to append to the cache")
    check_kv(q, ("k", "v"), k, v, "(B, new, Hk, D)", (len(q), -1))
    if k.shape[2] != cache.k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, wanted {cache.k.shape[2]}, as k_cache has")
    return k.shape[1]


def _check_rotary(
    q: Tensor, k: Tensor | None, cache: _Cache, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    if k is None or cos is None or sin is None:
        missing = "k" if k is None else "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing}: got None, wanted k, v, rotary_cos and rotary_sin for rotation")
    half = cos.shape[-1] if isinstance(cos, Tensor) and cos.dim() else -1
    count = cos.shape[0] if isinstance(cos, Tensor) and cos.dim() else -1
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        expect(name, x, "(positions, R/2)", (count, half), q, lead="q")
    if count < cache.room or 2 * half > q.shape[-1]:
        wanted = f"at least {cache.room} positions, and R <= D = {q.shape[-1]}"
        raise ValueError(f"rotary_cos: got shape {tuple(cos.shape)}, wanted {wanted}")
    return cos, sin


def _at_most(name: str, values: Tensor, most: int, what: str) -> None:
    """Complain where a CPU can tell; nobody waits for a GPU."""
    if values.device.type == "cpu" and values.numel() and int(values.max()) > most:
        raise ValueError(f"{name}: got {int(values.max())} {what}, wanted at most {most}")
