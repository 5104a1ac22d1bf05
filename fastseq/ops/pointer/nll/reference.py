"""The definition in plain loops: what every backend is held to, itself held to the whole extended distribution.

Python floats (float64) and lists, a row at a time. Slow, CPU only, and never chosen unless forced. The loss of a row is
-sum_v q_v log p(v) + z_loss lse^2, where q_v is how much the row wants the word v: 1 for the target, less what label
smoothing spreads over the vocabulary. Conventions are those of the package docstring.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = ["nll", "nll_grad"]

INF, NAN = math.inf, math.nan


class _Row:
    """One target, its logits `z` and what can be copied: the value, and the gradient to z, copy and gate."""

    def __init__(self, z: list[float], copy: list[float], gate: float | None, source: list[int]) -> None:
        self.z, self.copy, self.gate, self.source = z, copy, gate, source
        self.lse = _lse(z)

    def positions(self, word: int) -> list[int]:
        """Where the word is in the source."""
        return [i for i, s in enumerate(self.source) if s == word >= 0]

    def log_all(self) -> float:
        """CopyNet: the logarithm of what words and positions sum to."""
        return _lse([*self.z, *(e for e, s in zip(self.copy, self.source, strict=True) if s >= 0)])

    def log_parts(self, word: int) -> tuple[float, float]:
        """The logarithms of the probabilities to generate the word and to copy it."""
        z = self.z[word] if word < len(self.z) else -INF
        copies = [self.copy[i] for i in self.positions(word)]
        if self.gate is None:
            return z - self.log_all(), _lse(copies) - self.log_all()
        generate = _log_sigmoid(self.gate) + (z - self.lse) if word < len(self.z) else -INF
        return generate, _log_sigmoid(-self.gate) + _log(sum(copies))

    def log_p(self, word: int) -> float:
        return _lse(list(self.log_parts(word)))

    def value(self, wanted: dict[int, float], z_loss: float) -> float:
        value = -sum(q * self.log_p(v) for v, q in wanted.items())
        return value + z_loss * self.lse**2 if z_loss else value

    def gradient(self, wanted: dict[int, float], z_loss: float) -> tuple[list[float], list[float], float]:
        """To the logits, to the attention or the copy scores, and to the gate."""
        if self.gate is None:
            return *self._gradient_of_copynet(*wanted), 0.0
        softmax = [_exp(z - self.lse) for z in self.z]
        to_z = [2 * z_loss * self.lse * s for s in softmax] if z_loss else [0.0] * len(self.z)
        to_copy, to_gate = [0.0] * len(self.copy), 0.0
        for v, q in wanted.items():
            log_p = self.log_p(v)
            generated = _exp(self.log_parts(v)[0] - log_p) if v < len(self.z) else 0.0
            if v < len(self.z):
                to_z = [g + q * generated * s for g, s in zip(to_z, softmax, strict=True)]
                to_z[v] -= q * generated
            to_gate += q * (_exp(_log_sigmoid(self.gate)) - generated)
            for i in self.positions(v):
                to_copy[i] -= q * _exp(_log_sigmoid(-self.gate) - log_p)
        return to_z, to_copy, to_gate

    def _gradient_of_copynet(self, word: int) -> tuple[list[float], list[float]]:
        log_all = self.log_all()
        log_chosen = self.log_p(word) + log_all
        to_z = [_exp(z - log_all) for z in self.z]
        to_copy = [_exp(e - log_all) if s >= 0 else 0.0 for e, s in zip(self.copy, self.source, strict=True)]
        if word < len(self.z):
            to_z[word] -= _exp(self.z[word] - log_chosen)
        for i in self.positions(word):
            to_copy[i] -= _exp(self.copy[i] - log_chosen)
        return to_z, to_copy


@torch.no_grad()
def nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    target_ids: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The value of each target, (B,T)."""
    _check(gate, target_ids, ignore_index, label_smoothing, z_loss)
    values = torch.zeros(target_ids.shape, dtype=torch.float64)
    for b, t in itertools.product(*map(range, target_ids.shape)):
        if (y := int(target_ids[b, t])) != ignore_index:
            row = _row(hidden, weight, bias, copy, gate, source_ids, b, t)
            values[b, t] = row.value(_wanted(y, len(weight), label_smoothing), z_loss)
    return values.to(copy.dtype)


@torch.no_grad()
def nll_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    target_ids: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    weights: Tensor | None,
) -> tuple[Tensor, ...]:
    """The sum of weights * values, (), and its gradients to hidden, weight, bias, copy and gate."""
    _check(gate, target_ids, ignore_index, label_smoothing, z_loss)
    total = torch.zeros((), dtype=torch.float64)
    given = hidden, weight, bias, copy, gate
    grads = [torch.zeros(() if x is None else x.shape, dtype=torch.float64) for x in given]
    for b, t in itertools.product(*map(range, target_ids.shape)):
        y, w = int(target_ids[b, t]), 1.0 if weights is None else float(weights[b, t])
        if y == ignore_index or w == 0:
            continue
        row, wanted = _row(*given, source_ids, b, t), _wanted(y, len(weight), label_smoothing)
        value = row.value(wanted, z_loss)
        total += w * value
        if value == INF:
            continue
        to_z, to_copy, to_gate = row.gradient(wanted, z_loss)
        for v, g in enumerate(to_z):
            if g != 0:  # a row that needs no logits does not touch what made them
                grads[0][b, t] += w * g * _rounded(weight, hidden)[v]
                grads[1][v] += w * g * hidden[b, t].double()
                grads[2][... if bias is None else v] += w * g
        grads[3][b, t] = w * torch.tensor(to_copy, dtype=torch.float64)
        grads[4][... if gate is None else (b, t)] += w * to_gate
    empty = copy.new_empty(0)
    return total.to(copy), *(empty if x is None else g.to(x) for x, g in zip(given, grads, strict=True))


def _check(gate: Tensor | None, target_ids: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> None:
    if gate is None and (label_smoothing or z_loss):
        raise ValueError(f"label_smoothing, z_loss: got {label_smoothing}, {z_loss} without a gate, wanted 0")
    for y in target_ids.flatten().tolist():
        if y < 0 and y != ignore_index:
            raise ValueError(f"target_ids: got the id {y}, wanted 0 or more, or ignore_index = {ignore_index}")


def _row(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    gate: Tensor | None,
    source_ids: Tensor,
    b: int,
    t: int,
) -> _Row:
    z = _rounded(weight, hidden) @ hidden[b, t].double() + (0 if bias is None else bias.double())
    return _Row(z.tolist(), copy[b, t].tolist(), None if gate is None else float(gate[b, t]), source_ids[b].tolist())


def _rounded(weight: Tensor, hidden: Tensor) -> Tensor:
    """The weights as the matrix product sees them."""
    return weight.to(hidden.dtype).double()


def _wanted(y: int, vocabulary: int, label_smoothing: float) -> dict[int, float]:
    """How much each word is wanted: q of the module docstring."""
    wanted = dict.fromkeys(range(vocabulary), label_smoothing / vocabulary) if label_smoothing else {}
    wanted[y] = wanted.get(y, 0.0) + 1 - label_smoothing
    return wanted


def _lse(values: list[float]) -> float:
    """Sum in the log domain; -inf of nothing, NaN where there is a NaN or +inf."""
    if any(v != v or v == INF for v in values):
        return NAN
    top = max(values, default=-INF)
    return top if top == -INF else top + math.log(sum(math.exp(v - top) for v in values))


def _log(x: float) -> float:
    return -INF if x == 0 else NAN if x != x or x < 0 else math.log(x)


def _log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _exp(x: float) -> float:
    return INF if x > 709 else math.exp(x)
