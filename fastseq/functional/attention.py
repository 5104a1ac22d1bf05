"""Attention with additive bias, key lengths, packed sequences and exact weights, on any device.

Letters: B rows of the batch, Sq and Sk positions of queries and keys, Hq and Hk heads, D the head's size; N packed
sequences. The mathematics, and what -inf and NaN mean, are written once, in `fastseq.ops.attention.dot_product`.
Nothing of size Sq*Sk is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.functional.attention_arguments import (
    check_dropout,
    check_slopes,
    check_window,
    draw_seed,
    under_autocast,
)
from fastseq.functional.checks import (
    INTEGERS,
    WORKING,
    autocast_dtype,
    boundaries,
    check_generator,
    expect,
    flag,
    longest,
    number,
)
from fastseq.ops.attention import dot_product as ops

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    return_attn_weights: bool = False,
) -> Any:
    """Attention, softmax(q k^T) v, with what flash_attn has, and what it has not: bias, key lengths and exact weights.

    In torch, with Hq = Hk and without windows, for a mask of the keys that there are::

        scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5 + attn_bias
        i, j, lengths = torch.arange(Sq)[:, None], torch.arange(Sk), key_lengths[:, None, None, None]
        hidden = j >= lengths
        if causal:
            hidden = hidden | (j > i + lengths - Sq)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        out = torch.einsum("bhij,bjhd->bihd", F.dropout(weights, dropout_p), v)

    Under autocast, q, k and v are cast to its dtype, as torch's scaled_dot_product_attention does, unless float64.

    Args:
        q: (B,Sq,Hq,D) queries; with cu_seqlens, (total,Hq,D).
        k: (B,Sk,Hk,D) keys, of q's dtype; with cu_seqlens, (total,Hk,D). Hk divides Hq: query head h reads head
            h // (Hq / Hk) of k and v.
        v: Values, of the shape and dtype of k.
        attn_bias: What is added to the scores, broadcastable to (B,Hq,Sq,Sk), with cu_seqlens to
            (N,Hq,max_seqlen_q,max_seqlen_k); -inf forbids. It has a gradient, of its own shape.
        alibi_slopes: (Hq,) or (B,Hq) float32 or float64: slope * distance is taken from the scores; no gradient.
        key_lengths: (B,) or (N,) integers: the first keys of each sequence that are real; the others are not read.
        cu_seqlens_q: (N+1,) integers: the boundaries of N packed sequences in q.
        cu_seqlens_k: The same in k and v; both or none.
        max_seqlen_q: The longest packed sequence in q, or more; by default it is found out, which waits for a GPU.
        max_seqlen_k: The same in k.
        causal: Whether a query sees no key after its own. The last query's own key is the last (bottom right).
        window_size: How many keys a query sees before and after its own; -1 for all.
        softcap: If more than 0, scores become softcap * tanh(scores / softcap), before the bias.
        softmax_scale: The factor of q k^T; by default D^-0.5.
        dropout_p: The probability of an attention weight to be dropped, in [0,1), in steps of 2^-16.
        generator: Where the dropout's seed comes from; by default torch's.
        return_lse: Whether to return the logsumexp of the scores too.
        return_attn_weights: Whether to return the softmax too: computed apart by plain torch, exact, before dropout,
            and differentiable any number of times. It is of size Sq*Sk.

    Returns:
        The output, of the shape and dtype of q; or a tuple of that, and of what is asked for besides: the logsumexp in
        nats, (B,Hq,Sq) or (Hq,total), float64 for float64, else float32; the weights (B,Hq,Sq,Sk) or
        (N,Hq,max_seqlen_q,max_seqlen_k) of that dtype. A query that sees no key has output and weights 0 and logsumexp
        -inf.

    Raises:
        ValueError: A shape, a device or a value is not as above; lengths and boundaries are looked at on a CPU only.
        TypeError: A type or dtype is not as above.

    Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691).
    """
    _check(q, k, v, packed=cu_seqlens_q is not None or cu_seqlens_k is not None)
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = under_autocast(q, k, v)
    bias, slopes = _bias(attn_bias, q, sequences), check_slopes(alibi_slopes, q, sequences.number)
    lengths = _key_lengths(key_lengths, q, sequences)
    check_generator(generator)
    wants_lse, wants_weights = flag("return_lse", return_lse), flag("return_attn_weights", return_attn_weights)
    dropout = check_dropout(dropout_p)
    seed = draw_seed(dropout, q, generator)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else number("softmax_scale", softmax_scale)
    numbers = scale, flag("causal", causal), *check_window(window_size), _check_softcap(softcap), dropout
    packed = sequences.offsets_q is not None
    q, k, v = (x[None] if packed else x for x in (q, k, v))
    args = q, k, v, bias, slopes, *sequences[:2], lengths, seed, *sequences[2:4], *numbers
    out, lse = ops.attention(*args)
    results = [out[0] if packed else out]
    results += [lse[0] if packed else lse] if wants_lse else []
    results += [ops.weights(*args)] if wants_weights else []
    return results[0] if len(results) == 1 else tuple(results)


class _Sequences(NamedTuple):
    """Where sequences begin, None in a dense call; the longest; how many there are."""

    offsets_q: Tensor | None
    offsets_k: Tensor | None
    max_q: int
    max_k: int
    number: int


def _check_softcap(softcap: float) -> float:
    softcap = number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap: got {softcap}, wanted 0 for none, or more")
    return softcap


def _check(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    """Shapes, dtypes and devices of q, k and v."""
    letters = "(total, H, D), with cu_seqlens," if packed else "(B, S, H, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and (x.dim() != (3 if packed else 4) or 0 in x.shape[-2:]):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {letters.rstrip(',')}, H and D at least 1")
        expect(name, x, letters, getattr(x, "shape", ()), q, lead="q")
        if x.dtype != q.dtype and autocast_dtype(q) is None:
            raise TypeError(f"{name}: got {_short(x.dtype)}, wanted {_short(q.dtype)}, the dtype of q")
    heads = k.shape[-2]
    if q.shape[-2] % heads:
        raise ValueError(f"k: got {heads} heads, wanted a number that divides q's {q.shape[-2]} heads")
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: got a batch of {k.shape[0]}, wanted {q.shape[0]}, that of q")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: got heads of size {k.shape[-1]}, wanted {q.shape[-1]}, that of q")
    expect("v", v, "that of k", k.shape, q, lead="q")


def _sequences(
    q: Tensor, k: Tensor, offsets_q: Tensor | None, offsets_k: Tensor | None, max_q: int | None, max_k: int | None
) -> _Sequences:
    if offsets_q is None and offsets_k is None:
        for name, given in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
            if given is not None:
                raise ValueError(f"{name}: got {given} without cu_seqlens, wanted none: it is for packed sequences")
        return _Sequences(None, None, q.shape[1], k.shape[1], q.shape[0])
    if offsets_q is None or offsets_k is None:
        missing = "cu_seqlens_q" if offsets_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: got None, wanted both cu_seqlens_q and cu_seqlens_k, or none of them")
    offsets_q, offsets_k = boundaries("cu_seqlens_q", offsets_q, q), boundaries("cu_seqlens_k", offsets_k, q)
    if len(offsets_q) != len(offsets_k):
        raise ValueError(f"cu_seqlens_k: got {len(offsets_k) - 1} sequences, wanted {len(offsets_q) - 1}, as in q")
    max_q, max_k = longest("max_seqlen_q", offsets_q, max_q), longest("max_seqlen_k", offsets_k, max_k)
    return _Sequences(offsets_q, offsets_k, max_q, max_k, len(offsets_q) - 1)


def _bias(bias: Tensor | None, q: Tensor, sequences: _Sequences) -> Tensor | None:
    """The bias in four dimensions, of q's dtype or of the result's."""
    if bias is None:
        return None
    whole = (sequences.number, q.shape[-2], sequences.max_q, sequences.max_k)
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        raise TypeError(
            "attn_bias: got a bool mask, wanted what is added to the scores: "
            "torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) for a mask of what is seen, or key_lengths"
        )
    expect("attn_bias", bias, "", getattr(bias, "shape", ()), q, lead="q")
    if bias.dim() > 4:
        raise ValueError(f"attn_bias: got shape {tuple(bias.shape)}, wanted at most 4 dimensions")
    four = bias[(None,) * (4 - bias.dim())]
    if any(size not in (1, wanted) for size, wanted in zip(four.shape, whole, strict=True)):
        raise ValueError(f"attn_bias: got shape {tuple(bias.shape)}, wanted one that broadcasts to {whole}")
    return four if four.dtype == q.dtype else four.to(WORKING[q.dtype])


def _key_lengths(lengths: Tensor | None, q: Tensor, sequences: _Sequences) -> Tensor | None:
    if lengths is None:
        return None
    letters = "(B,)" if sequences.offsets_q is None else "(N,)"
    expect("key_lengths", lengths, letters, (sequences.number,), q, INTEGERS, lead="q")
    return lengths.int()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
