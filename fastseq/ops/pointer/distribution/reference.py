"""The definition in plain loops over Python floats (float64): what every backend is held to. See the package docstring.

A *row* below is one (b, t): its logits, attention and gate as lists and a number.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = ["distribution", "distribution_grad", "topk"]

INF, NAN = math.inf, math.nan
Row = tuple[list[float], list[float], float, list[int]]


def distribution(logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, num_oov: int) -> Tensor:
    """The mixture, a row at a time."""
    words = logits.shape[2] + num_oov
    _check_ids(source_ids, words)
    final = [_final(row, words) for row in _rows(logits, attention, gate, source_ids)]
    return torch.tensor(final, dtype=torch.float64).view(*gate.shape, words).to(gate.dtype)


def distribution_grad(
    grad: Tensor, logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, num_oov: int
) -> tuple[Tensor, ...]:
    """The gradient of <grad, final>, a row at a time."""
    _check_ids(source_ids, logits.shape[2] + num_oov)
    grads = grad.double().flatten(0, 1).tolist()
    rows = [_gradient(g, row) for g, row in zip(grads, _rows(logits, attention, gate, source_ids), strict=True)]
    found = zip(*rows, strict=True) if rows else ((), (), ())
    return tuple(
        torch.tensor(part, dtype=torch.float64).view(x.shape).to(x.dtype)
        for part, x in zip(found, (logits, attention, gate), strict=True)
    )


def topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, attention: Tensor, gate: Tensor, source_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """All words of each row, sorted."""
    if not 1 <= k <= len(weight):
        raise ValueError(f"k: got {k}, wanted 1 to V = {len(weight)}")
    logits = hidden.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    best = [_best(row, k) for row in _rows(logits, attention, gate, source_ids)]
    values = torch.tensor([[value for value, _ in row] for row in best], dtype=torch.float64)
    ids = torch.tensor([[word for _, word in row] for row in best], dtype=torch.int64)
    return values.view(*gate.shape, k).to(gate.dtype), ids.view(*gate.shape, k)


def _rows(logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor) -> list[Row]:
    ids = source_ids.tolist()
    places = itertools.product(range(gate.shape[0]), range(gate.shape[1]))
    z, a, g = (x.double().tolist() for x in (logits, attention, gate))
    return [(z[b][t], a[b][t], g[b][t], ids[b]) for b, t in places]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _is_poisoned(row: Row) -> bool:
    """Whether the row has what makes all of it NaN."""
    z, a, g, ids = row
    copied = [x for x, word in zip(a, ids, strict=True) if word >= 0]
    bad_logits = any(x != x or x == INF for x in z) or max(z) == -INF
    return bad_logits or g != g or not all(map(math.isfinite, copied))


def _softmax(z: list[float]) -> list[float]:
    top = max(z)
    powers = [math.exp(x - top) for x in z]
    total = sum(powers)
    return [power / total for power in powers]


def _final(row: Row, words: int) -> list[float]:
    z, a, g, ids = row
    if _is_poisoned(row):
        return [NAN] * words
    final = [_sigmoid(g) * p for p in _softmax(z)] + [0.0] * (words - len(z))
    for x, word in zip(a, ids, strict=True):
        if word >= 0:
            final[word] += _sigmoid(-g) * x
    return final


def _gradient(grad: list[float], row: Row) -> tuple[list[float], list[float], float]:
    """Of one row: to its logits, attention and gate."""
    z, a, g, ids = row
    there = [word >= 0 for word in ids]
    at = [grad[word] if on else 0.0 for word, on in zip(ids, there, strict=True)]
    if _is_poisoned(row) or not all(map(math.isfinite, (*grad[: len(z)], *at))):
        return [NAN] * len(z), [NAN if on else 0.0 for on in there], NAN
    p = _softmax(z)
    mean = sum(x * y for x, y in zip(p, grad, strict=False))
    copied = sum(x * y for x, y, on in zip(a, at, there, strict=True) if on)
    to_logits = [_sigmoid(g) * x * (y - mean) for x, y in zip(p, grad, strict=False)]
    return to_logits, [_sigmoid(-g) * y for y in at], _sigmoid(g) * _sigmoid(-g) * (mean - copied)


def _best(row: Row, k: int) -> list[tuple[float, int]]:
    """(log-probability, word) of the k best words, best first; of equal ones the smaller is first."""
    z, a, g, ids = row
    if _is_poisoned(row):
        return [(NAN, word) for word in range(k)]
    top = max(z)
    lse = top + math.log(sum(math.exp(x - top) for x in z))
    mass: dict[int, float] = {}
    for x, word in zip(a, ids, strict=True):
        if word >= 0:
            mass[word] = mass.get(word, 0.0) + x
    scores = {word: _log_sigmoid(g) + (x - lse) for word, x in enumerate(z)}
    for word, copied in mass.items():
        score = _log_sigmoid(-g) + (math.log(copied) if copied > 0 else -INF)
        scores[word] = _log_add(scores.get(word, -INF), score)
    return [(-score, word) for score, word in sorted((-score, word) for word, score in scores.items())][:k]


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top if min(a, b) == -INF else top + math.log1p(math.exp(min(a, b) - top))


def _check_ids(source_ids: Tensor, words: int) -> None:
    if source_ids.numel() and int(source_ids.max()) >= words:
        raise ValueError(f"source_ids: got {int(source_ids.max())}, wanted ids below V + num_oov = {words}")
