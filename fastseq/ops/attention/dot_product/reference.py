"""The definition in plain loops: what every backend is held to, itself held to softmax(q k^T) v with whole masks.

A query at a time, over the keys that it sees and no others, in float64. Slow, CPU only, and never chosen unless forced.
Conventions are those of the package docstring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product.arguments import Arguments, lengths_of

__all__ = ["attention", "attention_grad", "keeps"]

INF, NAN = math.inf, math.nan
WORD = 0xFFFFFFFF


class _Query(NamedTuple):
    """One query: where it is, the keys that it sees, and their scores."""

    place: tuple[int, int]  # of its row in q
    n: int
    h: int
    kv: int  # the head of k and v
    i: int
    row: int  # of k and v
    tokens: slice  # of the keys that it sees, which are a run
    keys: range  # the same, as positions j in the sequence
    scores: Tensor  # (keys,)
    slope: Tensor  # (keys,) their derivative by scale * q k

    def factors(self, args: Arguments) -> Tensor:
        """(keys,) what dropout multiplies probabilities by."""
        level = min(math.floor(args.dropout * 65536 + 0.5), 65535)
        if not level or args.seed is None:
            return torch.ones(len(self.keys), dtype=torch.float64)
        seed, nh = int(args.seed), self.n * args.q.shape[2] + self.h
        kept = [keeps(seed, nh, self.i, j, level) for j in self.keys]
        return torch.tensor(kept, dtype=torch.float64) * 65536 / (65536 - level)


@torch.no_grad()
def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output (B,Sq,Hq,D) and the logsumexp (B,Hq,Sq)."""
    args = Arguments(*arguments)
    b, sq, hq, d = args.q.shape
    out = torch.zeros(b, sq, hq, d, dtype=torch.float64)
    lse = torch.full((b, hq, sq), -INF, dtype=torch.float64)
    v = args.v.double()
    for query in _queries(args):
        norm = _lse(query.scores)
        lse[query.place[0], query.h, query.place[1]] = norm
        if norm != -INF:
            p = (query.scores - norm).exp() * query.factors(args)
            out[query.place][query.h] = _sum(p, v[query.row, query.tokens, query.kv])
    return out.to(args.q.dtype), lse.to(args.result)


@torch.no_grad()
def attention_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients to q, k, v and bias, from what the forward pass returned."""
    args, bias_grad = Arguments(*arguments[:17]), arguments[17]
    q, k, v = (x.double() for x in args[:3])
    grads = [torch.zeros(x.shape, dtype=torch.float64) for x in args[:3]]
    n_sequences = len(args.cu_seqlens_q) - 1 if args.cu_seqlens_q is not None else len(args.q)
    whole_bias = torch.zeros(n_sequences, args.q.shape[2], args.max_q, args.max_k, dtype=torch.float64)
    for query in _queries(args):
        there, keys = (*query.place, query.h), (query.row, query.tokens, query.kv)
        norm = float(lse[query.place[0], query.h, query.place[1]])
        if norm == -INF:
            continue
        p, factors = (query.scores - norm).exp(), query.factors(args)
        grad_p, delta = torch.zeros_like(p), 0.0
        if grad_out is not None:
            grad_row = grad_out[there].double()
            grad_p, delta = factors * _dots(v[keys], grad_row), float((grad_row * out[there].double()).sum())
            grads[2][keys] += (p * factors)[:, None] * grad_row
        if grad_lse is not None:
            delta -= float(grad_lse[query.place[0], query.h, query.place[1]])
        grad = p * (grad_p - delta)
        whole_bias[query.n, query.h, query.i, query.keys.start : query.keys.stop] = grad
        grad = grad * query.slope * args.scale
        grads[0][there] = _sum(grad, k[keys])
        grads[1][keys] += grad[:, None] * q[there]
    grad_bias = torch.zeros(0, dtype=args.result if args.bias is None else args.bias.dtype)
    if args.bias is not None and bias_grad:
        grad_bias = whole_bias.sum_to_size(args.bias.shape).to(args.bias.dtype)
    return *(g.to(args.q.dtype) for g in grads), grad_bias


def _queries(args: Arguments) -> Iterator[_Query]:
    """Each query of each sequence and head, with what it sees."""
    starts_q, lengths_q, starts_k, lengths_k = lengths_of(args)
    packed, heads = args.cu_seqlens_q is not None, args.q.shape[2]
    for n, h in itertools.product(range(len(lengths_q)), range(heads)):
        row, kv = 0 if packed else n, h // (heads // args.k.shape[2])
        offset = lengths_k[n] - lengths_q[n]
        for i in range(lengths_q[n]):
            visible = [j for j in range(lengths_k[n]) if _visible(args, i + offset, j)]
            keys = range(visible[0], visible[-1] + 1) if visible else range(0)
            tokens, place = slice(starts_k[n] + keys.start, starts_k[n] + keys.stop), (row, starts_q[n] + i)
            scores, slope = _scores(args, (n, h, i), args.q[place][h], args.k[row, tokens, kv], keys, offset)
            yield _Query(place, n, h, kv, i, row, tokens, keys, scores, slope)


def _visible(args: Arguments, at: int, j: int) -> bool:
    """Whether the key j is visible to the query that is aligned with the key `at`."""
    left = args.window_left < 0 or j >= at - args.window_left
    right = args.window_right < 0 or j <= at + args.window_right
    return left and right and (not args.causal or j <= at)


def _scores(
    args: Arguments, place: tuple[int, int, int], q: Tensor, k: Tensor, keys: range, offset: int
) -> tuple[Tensor, Tensor]:
    """The scores of some keys (keys,D) and their derivative by scale * q k."""
    n, h, i = place
    scores = args.scale * _dots(k.double(), q.double())
    slope = torch.ones_like(scores)
    if args.softcap > 0:
        tanh = (scores / args.softcap).tanh()
        scores, slope = args.softcap * tanh, 1 - tanh * tanh
    if args.bias is not None:
        there = (0 if size == 1 else x for size, x in zip(args.bias.shape, place, strict=False))
        row = args.bias[tuple(there)].double()
        scores += row if len(row) == 1 else row[keys.start : keys.stop]
    if args.slopes is not None:
        slope_of_head = float(args.slopes[h] if args.slopes.dim() == 1 else args.slopes[n, h])
        scores -= slope_of_head * torch.tensor([abs(i + offset - j) for j in keys], dtype=torch.float64)
    return scores, slope


def _dots(rows: Tensor, x: Tensor) -> Tensor:
    """(n,) rows (n,D) times x (D,); not by a BLAS, whose threads would cost more than they do on sizes like these."""
    return (rows * x).sum(1)


def _sum(factors: Tensor, rows: Tensor) -> Tensor:
    """(D,) the sum of rows (n,D), each times its factor."""
    return (factors[:, None] * rows).sum(0)


def _lse(scores: Tensor) -> float:
    """NaN where there is a NaN or +inf, -inf of nothing."""
    values = scores.tolist()
    if any(v != v or v == INF for v in values):
        return NAN
    top = max(values, default=-INF)
    return top if top == -INF else top + math.log(sum(math.exp(v - top) for v in values))


def keeps(seed: int, nh: int, i: int, j: int, level: int) -> bool:
    """Whether dropout keeps an entry: the hash of `fastseq.ops.attention.dropout` in Python's integers."""
    a = _fmix((_fmix((_fmix(seed & WORD) + nh) & WORD) + i) & WORD)
    b = _fmix(_fmix((_fmix(((seed >> 32) & WORD) ^ 0x9E3779B9) + nh) & WORD) ^ i)
    x = (a + ((j >> 5) * 16 + (j & 15)) * 0x9E3779B9) & WORD
    x ^= x >> 16
    x = (x * 0x7FEB352D) & WORD
    x ^= x >> 15
    x = ((x + b) * 0x846CA68B) & WORD
    x ^= x >> 16
    return ((x >> (16 if j & 16 else 0)) & 0xFFFF) >= level


def _fmix(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D) & WORD
    x ^= x >> 15
    x = (x * 0x846CA68B) & WORD
    return x ^ (x >> 16)
