"""The definition in plain loops: what every backend of the CRF ops is held to, itself held to enumeration.

Python floats (float64) and lists, a row at a time, in the log domain. Slow, CPU only, and never chosen unless
forced. A *row* below is the list of the emissions at its positions that are on; conventions are those of the
package docstring.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["entropy", "nbest", "nll", "nll_grad", "sample", "token_nll", "viterbi"]

OFF = -100
INF, NAN = math.inf, math.nan
Row = list[list[float]]


class _Model:
    """The parameters as lists, and the sums over paths of a row that everything else is made of."""

    def __init__(self, transitions: Tensor, start: Tensor, end: Tensor) -> None:
        self.a: Row = transitions.double().tolist()
        self.start: list[float] = start.double().tolist()
        self.end: list[float] = end.double().tolist()
        self.tags = range(len(self.start))

    def poisons(self, row: Row) -> bool:
        """Whether a NaN or +inf is read on the way through this row, which makes its results NaN."""
        read = (*row, *(self.a if len(row) > 1 else ()), self.start, self.end) if row else ()
        return any(v != v or v == INF for part in read for v in part)

    def alphas(self, row: Row) -> Row:
        """alpha[t][j]: log of the sum over all prefixes y_1..y_t that end in j."""
        alphas = [[self.start[j] + row[0][j] for j in self.tags]]
        for x in row[1:]:
            alphas.append([_lse([alphas[-1][i] + self.a[i][j] for i in self.tags]) + x[j] for j in self.tags])
        return alphas

    def betas(self, row: Row) -> Row:
        """beta[t][i]: log of the sum over all suffixes y_{t+1}..y_L that follow tag i at t, with the end."""
        betas = [list(self.end)]
        for x in row[:0:-1]:
            betas.append([_lse([self.a[i][j] + x[j] + betas[-1][j] for j in self.tags]) for i in self.tags])
        return betas[::-1]

    def log_z(self, row: Row) -> float:
        """0 for an empty row, -inf where nothing is possible, NaN where a NaN or +inf is read."""
        if not row:
            return 0.0
        if self.poisons(row):
            return NAN
        return _lse([a + e for a, e in zip(self.alphas(row)[-1], self.end, strict=True)])

    def score(self, row: Row, path: list[int]) -> float:
        """The score s(y) of one path."""
        if not row:
            return 0.0
        score = self.start[path[0]] + self.end[path[-1]] + sum(x[y] for x, y in zip(row, path, strict=True))
        return score + sum(self.a[i][j] for i, j in itertools.pairwise(path))

    def nll(self, row: Row, path: list[int] | None) -> float:
        """Get log Z - s(path), +inf where either is impossible; log Z itself without a path."""
        log_z = self.log_z(row)
        if path is None or log_z != log_z:
            return log_z
        return INF if log_z == -INF else log_z - self.score(row, path)


def nll(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
) -> Tensor:
    """The value log Z - s(tags) of each row, (B,); log Z itself where tags is None."""
    model = _Model(transitions, start, end)
    values = [model.nll(row, path) for row, path, _ in _rows(emissions, tags, mask)]
    return torch.tensor(values, dtype=_result(emissions), device=emissions.device)


def nll_grad(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    weights: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """The sum scale * sum_b weights_b nll_b, and its gradients: (), (B,T,K), (K,K), (K,), (K,).

    A gradient is, for each feature of a path, its expected count less its count in `tags`. A row of weight 0
    is left out.
    """
    model = _Model(transitions, start, end)
    total = torch.zeros((), dtype=torch.float64)
    gradients = [torch.zeros(t.shape, dtype=torch.float64) for t in (emissions, transitions, start, end)]
    row_weights = [1.0] * emissions.shape[0] if weights is None else weights.double().tolist()
    for b, (row, path, positions) in enumerate(_rows(emissions, tags, mask)):
        weight = scale * row_weights[b]
        if not row or row_weights[b] == 0:
            continue
        total += weight * model.nll(row, path)
        if model.log_z(row) == -INF:
            continue
        _count_expected(model, row, positions, b, weight, gradients)
        if path is not None:
            _count_path(path, positions, b, -weight, gradients)
    return total.to(start), gradients[0].to(emissions), *(g.to(start) for g in gradients[1:])


def _count_expected(
    model: _Model, row: Row, positions: list[int], b: int, weight: float, gradients: list[Tensor]
) -> None:
    """Add weight * (the expected count of each feature of row b); NaN for a poisoned row."""
    x, a, start, end = gradients
    if model.poisons(row):
        x[b, positions] = NAN
        for g in (a, start, end):
            g += NAN
        return
    alphas, betas, log_z = model.alphas(row), model.betas(row), model.log_z(row)
    for t, position in enumerate(positions):
        for j in model.tags:
            posterior = weight * math.exp(alphas[t][j] + betas[t][j] - log_z)
            x[b, position, j] += posterior
            if t == 0:
                start[j] += posterior
            if t == len(row) - 1:
                end[j] += posterior
            for i in model.tags if t > 0 else ():
                pair = alphas[t - 1][i] + model.a[i][j] + row[t][j] + betas[t][j]
                a[i, j] += weight * math.exp(pair - log_z)


def _count_path(path: list[int], positions: list[int], b: int, weight: float, gradients: list[Tensor]) -> None:
    """Add weight * (the count of each feature in one path)."""
    x, a, start, end = gradients
    start[path[0]] += weight
    end[path[-1]] += weight
    for t, position in enumerate(positions):
        x[b, position, path[t]] += weight
        if t > 0:
            a[path[t - 1], path[t]] += weight


def token_nll(
    emissions: Tensor, tags: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """-log p(y_t | y_1..y_{t-1}, x), (B,T), 0 where off.

    It is +inf where the path becomes impossible (at its first position if the row is), and 0 after that.
    """
    model = _Model(transitions, start, end)
    out = torch.zeros(emissions.shape[:2], dtype=torch.float64)
    for b, (row, path, positions) in enumerate(_rows(emissions, tags, mask)):
        if model.poisons(row):
            out[b, positions] = NAN
        elif row and path is not None:
            betas, whole, possible = model.betas(row), model.log_z(row), True
            for t, (position, y) in enumerate(zip(positions, path, strict=True)):
                step = model.start[y] if t == 0 else model.a[path[t - 1]][y]
                part = step + row[t][y] + betas[t][y]
                if possible:
                    out[b, position] = INF if part == -INF else whole - part
                possible, whole = possible and part > -INF, betas[t][y]
    return out.to(_result(emissions))


def entropy(emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """-sum_y p(y) log p(y) of each row, (B,), in nats; 0 for an empty or impossible row."""
    model = _Model(transitions, start, end)
    values = [_row_entropy(model, row) for row, _, _ in _rows(emissions, None, mask)]
    return torch.tensor(values, dtype=_result(emissions), device=emissions.device)


def _row_entropy(model: _Model, row: Row) -> float:
    """Entropy by the chain rule: H[t][j] is that of the prefix y_1..y_{t-1} given y_t = j."""
    if not row:
        return 0.0
    if model.poisons(row):
        return NAN
    alphas = model.alphas(row)
    prefix = [0.0 for _ in model.tags]
    for t in range(1, len(row)):
        prefix = [_mix([alphas[t - 1][i] + model.a[i][j] for i in model.tags], prefix) for j in model.tags]
    return _mix([a + e for a, e in zip(alphas[-1], model.end, strict=True)], prefix)


def _mix(logits: list[float], inner: list[float]) -> float:
    """The entropy of a draw from softmax(logits) followed by one whose entropy is inner[drawn]."""
    norm = _lse(logits)
    return sum(math.exp(v - norm) * (h - (v - norm)) for v, h in zip(logits, inner, strict=True) if v > -INF)


def viterbi(
    emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The best path (B,T), -100 where off, and its score (B,).

    Scores are rounded to the result's dtype after each addition, fl(fl(s_i + A_ij) + x_j), and the first
    maximum wins: so paths are equal to pytorch-crf's to the last tie. Where nothing is possible the same rule
    gives a path, of score -inf. The path of a row with NaN or +inf is any in range.
    """
    paths = torch.full(emissions.shape[:2], OFF)
    scores = torch.zeros(emissions.shape[0], dtype=_result(emissions))
    a, first, last = (_rounded(p, emissions) for p in (transitions, start, end))
    model = _Model(transitions, start, end)
    for b, (row, _, positions) in enumerate(_rows(emissions, None, mask)):
        if model.poisons(row):
            scores[b], paths[b, positions] = NAN, 0
        elif row:
            x = _rounded(emissions[b, positions], emissions)
            best, came_from = first + x[0], []
            for t in range(1, len(row)):
                candidates = (best[:, None] + a) + x[t]  # (from, to)
                came_from.append(candidates.argmax(0))
                best = candidates.max(0)
            path = [int((best + last).argmax())]
            scores[b] = float((best + last).max())
            for previous in reversed(came_from):
                path.append(int(previous[path[-1]]))
            paths[b, positions] = torch.tensor(path[::-1])
    return paths, scores


def nbest(
    emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n best paths (B,n,T), best first, and their scores (B,n), rounded as `viterbi` does.

    Among equal scores, at each position, the smaller previous tag goes first, then the better rank there. A
    path that does not exist or is impossible has tags -100 and score -inf; an empty row has one path.
    Poisoned rows: tags -100.
    """
    batch, steps, _ = emissions.shape
    paths = torch.full((batch, n, steps), OFF)
    scores = torch.full((batch, n), -INF, dtype=_result(emissions))
    a, first, last = (_rounded(p, emissions) for p in (transitions, start, end))
    model = _Model(transitions, start, end)
    for b, (row, _, positions) in enumerate(_rows(emissions, None, mask)):
        if model.poisons(row):
            scores[b] = NAN
        elif not row:
            scores[b, :1] = 0
        else:
            x = _rounded(emissions[b, positions], emissions)
            for rank, (score, path) in enumerate(_best_paths(x, a, first, last, n)):
                scores[b, rank] = float(score)
                paths[b, rank, positions] = torch.tensor(path)
    return paths, scores


def _best_paths(x: Any, a: Any, first: Any, last: Any, n: int) -> list[tuple[Any, list[int]]]:
    """The n best (score, path) of one row; kept[j] is the list of the best that end in tag j, best first."""

    def best(candidates: list[tuple[Any, list[int]]]) -> list[tuple[Any, list[int]]]:
        possible = [c for c in candidates if c[0] > -INF]
        return sorted(possible, key=lambda c: -c[0])[:n]  # a stable sort: ties stay in order

    tags = range(len(first))
    kept = [best([(first[j] + x[0][j], [j])]) for j in tags]
    for emission in x[1:]:
        kept = [
            best([((score + a[i][j]) + emission[j], [*path, j]) for i in tags for score, path in kept[i]]) for j in tags
        ]
    return best([(score + last[j], path) for j in tags for score, path in kept[j]])


def sample(
    uniforms: Tensor, emissions: Tensor, mask: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Exact samples (n,B,T) by inverse CDF on uniforms (n,B,T), last tag first; -100 where off.

    y_L is drawn from weights alpha_L(i) exp(end_i), then y_t from alpha_t(i) exp(A[i, y_{t+1}]): the smallest
    i whose cumulative weight is above u * total. A row that is impossible or poisoned gives -100.
    """
    out = torch.full(uniforms.shape, OFF)
    model = _Model(transitions, start, end)
    for b, (row, _, positions) in enumerate(_rows(emissions, None, mask)):
        if not row or not model.log_z(row) > -INF:
            continue
        alphas = model.alphas(row)
        for k in range(uniforms.shape[0]):
            ahead = model.end
            for t in range(len(row) - 1, -1, -1):
                tag = _draw(
                    [v + w for v, w in zip(alphas[t], ahead, strict=True)],
                    float(uniforms[k, b, positions[t]]),
                )
                out[k, b, positions[t]] = tag
                ahead = [model.a[i][tag] for i in model.tags]
    return out


def _draw(logits: list[float], uniform: float) -> int:
    """The smallest i whose cumulative weight is above uniform * total."""
    top = max(logits)
    weights = [math.exp(v - top) for v in logits]
    cumulative = [sum(weights[: i + 1]) for i in range(len(weights))]
    above = [i for i, c in enumerate(cumulative) if c > uniform * cumulative[-1]]
    return above[0] if above else max(i for i, w in enumerate(weights) if w > 0)


def _rows(emissions: Tensor, tags: Tensor | None, mask: Tensor | None) -> list[tuple[Row, list[int] | None, list[int]]]:
    """For each row: its emissions where it is on, its tags there if there are tags, and those positions.

    Raises:
        ValueError: A tag at a position that is on is neither in [0, K) nor -100.
    """
    batch, steps, tag_count = emissions.shape
    on = torch.ones(batch, steps, dtype=torch.bool) if mask is None else mask.clone()
    if tags is not None:
        on &= tags != OFF
        wrong = tags[on & ((tags < 0) | (tags >= tag_count))]
        if len(wrong):
            raise ValueError(f"tags: got the id {int(wrong[0])}, wanted 0 to {tag_count - 1}, or {OFF} for no position")
    rows: list[tuple[Row, list[int] | None, list[int]]] = []
    for b in range(batch):
        positions = on[b].nonzero().flatten().tolist()
        path = None if tags is None else tags[b, positions].tolist()
        rows.append((emissions[b, positions].double().tolist(), path, positions))
    return rows


def _result(emissions: Tensor) -> torch.dtype:
    """The dtype of results: float64 for float64 emissions, else float32."""
    return torch.float64 if emissions.dtype == torch.float64 else torch.float32


def _rounded(values: Tensor, emissions: Tensor) -> Any:
    """`values` as a numpy array of the result's dtype, whose additions round as every backend's do."""
    return np.asarray(values.detach().to(_result(emissions)))


def _lse(values: list[float]) -> float:
    """Sum in the log domain; -inf where every value is."""
    top = max(values)
    return top if top == -INF else top + math.log(sum(math.exp(v - top) for v in values))
