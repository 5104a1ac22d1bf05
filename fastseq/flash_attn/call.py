"""From flash_attn's arguments to one call of the op: checks, conventions, and what return_attn_probs returns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.functional.attention_arguments import check_dropout, check_slopes, check_window, draw_seed
from fastseq.functional.checks import INTEGERS, expect, flag, number
from fastseq.ops.attention import dot_product
from fastseq.ops.attention.dropout import keep_mask

__all__ = ["Settings", "attend", "check_kv", "check_lengths", "check_q"]

INF = math.inf
TILE = 128  # the returned probabilities are padded to multiples of it


class Settings(NamedTuple):
    """The arguments that all functions share, as they came."""

    dropout_p: Any
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    return_attn_probs: bool = False


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Settings,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
) -> Any:
    """Attention of checked q, k and v, dense or packed: (B,S,H,D), or (total,H,D) with `bounds` and `longest`.

    Returns:
        out, or with return_attn_probs (out, softmax_lse, S_dmask), as flash_attn's functions do.
    """
    dropout, (left, right) = check_dropout(settings.dropout_p), check_window(settings.window_size, any_negative=True)
    slopes = check_slopes(settings.alibi_slopes, q, len(q) if bounds is None else len(bounds[0]) - 1)
    wants_probs = flag("return_attn_probs", settings.return_attn_probs)
    seed = draw_seed(dropout, q)
    scale = q.shape[-1] ** -0.5 if settings.softmax_scale is None else number("softmax_scale", settings.softmax_scale)
    causal, softcap = flag("causal", settings.causal), max(number("softcap", settings.softcap), 0.0)
    numbers = scale, causal, left, right, softcap, dropout
    packed = bounds is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    sizes = (q.shape[1], k.shape[1]) if longest is None else longest
    args = q, k, v, None, slopes, *(bounds or (None, None)), key_lengths, seed, *sizes, *numbers
    out, lse = dot_product.attention(*args)
    if not wants_probs:
        return out[0] if packed else out
    lse = lse.masked_fill(lse == -INF, INF)  # flash_attn's sign for a query that sees no key
    dropped = q.new_empty(0) if seed is None else _signed_weights(args, seed, dropout)
    return (out[0], lse[0], dropped) if packed else (out, lse, dropped)


@torch.no_grad()
def _signed_weights(args: tuple[Any, ...], seed: Tensor, dropout: float) -> Tensor:
    """(N,Hq,rounded Sq,rounded Sk) probabilities before dropout, negative where they were dropped."""
    p = dot_product.weights(*args)
    count, heads, rows, keys = p.shape
    numbers = torch.arange(count * heads, device=p.device).view(count, heads)
    kept = keep_mask(seed, numbers, torch.arange(rows, device=p.device), keys, dropout)
    p = torch.where(kept, p, -p).to(args[0].dtype)
    return F.pad(p, (0, -keys % TILE, 0, -rows % TILE))


def check_q(q: Tensor, letters: str) -> None:
    """Check the queries, which all else is compared with; `letters` is "(B, Sq, Hq, D)" or such."""
    expect("q", q, letters, getattr(q, "shape", ()), q)
    wanted = letters.count(",") + 1
    if q.dim() != wanted or not q.shape[-1]:
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted {letters}")


def check_kv(q: Tensor, names: tuple[str, str], k: Tensor, v: Tensor, letters: str, lead: tuple[int, ...]) -> None:
    """Check keys and values (*lead, Hk, D); a -1 in `lead` is any size, of the keys."""
    for name, x in zip(names, (k, v), strict=True):
        if not isinstance(x, Tensor) or x.dim() != len(lead) + 2:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise (ValueError if isinstance(x, Tensor) else TypeError)(f"{name}: got {got}, wanted {letters}")
        shape = tuple(n if n >= 0 else k.shape[i] for i, n in enumerate(lead))
        expect(name, x, letters, (*shape, k.shape[-2], q.shape[-1]), q, (q.dtype,), lead="q")
    heads = k.shape[-2]
    if not heads or q.shape[-2] % heads:
        raise ValueError(f"{names[0]}: got {heads} heads, wanted a number that divides the {q.shape[-2]} heads of q")


def check_lengths(name: str, lengths: Tensor, letters: str, size: int | None, q: Tensor) -> Tensor:
    """Check a vector of integers, which is then int32; `size` None is any but 0."""
    some = lengths.shape[0] if isinstance(lengths, Tensor) and lengths.dim() and lengths.numel() else 1
    expect(name, lengths, letters, (some if size is None else size,), q, INTEGERS, lead="q")
    return lengths.int()
