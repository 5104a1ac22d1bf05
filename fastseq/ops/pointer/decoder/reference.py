"""The definition in plain loops: what every backend of the decoder is held to, itself held to autograd by the tests.

A row at a time, a step at a time, a source position at a time, in float64 numpy vectors; slow, CPU only, and never
chosen unless forced. Conventions are those of the package docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["decoder", "decoder_grad"]

Array = npt.NDArray[np.float64]
STATE = ("hidden", "cell", "context", "coverage")
WEIGHTS = ("w_context", "w_ih", "w_hh", "bias", "w_query", "b_query", "w_coverage", "v")
INPUTS = ("inputs", "memory", "features", "mask", *STATE, *WEIGHTS)
OUTPUTS = ("x", "hidden", "cell", "context", "attention")


def decoder(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """All steps of every row; see `fastseq.ops.pointer.decoder`."""
    args = _numpy(tensors)
    inputs, hidden, context, coverage = (args[name] for name in ("inputs", "hidden", "context", "coverage"))
    rows, steps = inputs.shape[:2]
    sizes = (inputs.shape[2], hidden.shape[1], hidden.shape[1], context.shape[1], coverage.shape[1])
    out = [np.zeros((rows, steps, size)) for size in sizes]
    coverage_out, loss = np.zeros(coverage.shape), np.zeros((rows, steps))
    with np.errstate(all="ignore"):
        for b in range(rows):
            row = _Row(args, b)
            for t in range(steps):
                step = row.forward(t)
                for tensor, name in zip(out, OUTPUTS, strict=True):
                    tensor[b, t] = step[name]
                loss[b, t] = sum((_least(step["attention"][i], step["covered"][i]) for i in row.on), 0.0)
            coverage_out[b] = row.coverage
    return tuple(_like(tensors[0], array) for array in (*out, coverage_out, loss))


def decoder_grad(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The recurrent part of the gradient, from the inputs alone; see `fastseq.ops.pointer.decoder`."""
    grads = [None if g is None else g.detach().double().numpy() for g in tensors[:7]]
    args = _numpy(tensors[7:23])
    inputs, memory = args["inputs"], args["memory"]
    if len(memory) != len(inputs):
        raise ValueError(f"memory: got {len(memory)} rows for {len(inputs)} of inputs, wanted as many for a gradient")
    rows, steps = inputs.shape[:2]
    names = ("inputs", "memory", "features", "hidden", "cell", "context", "coverage", "v")
    out = {name: np.zeros(args[name].shape) for name in names}
    out["gates"], out["query"] = np.zeros((rows, steps, len(args["bias"]))), np.zeros((rows, steps, len(args["v"])))
    out["w_coverage"] = np.zeros(0 if args["w_coverage"] is None else len(args["v"]))
    with np.errstate(all="ignore"):
        for b in range(rows):
            row = _Row(args, b)
            row.backward([row.forward(t) for t in range(steps)], [None if g is None else g[b] for g in grads], out)
    order = ("inputs", "gates", "query", "memory", "features", "hidden", "cell", "context", "coverage")
    return tuple(_like(tensors[7], out[name]) for name in (*order, "w_coverage", "v"))


class _Row:
    """One row of the batch: its state, and what the rows have in common."""

    def __init__(self, args: dict[str, Any], b: int) -> None:
        self.args, self.b = args, b
        source = b // (len(args["inputs"]) // len(args["memory"]))
        self.memory, self.features = args["memory"][source], args["features"][source]
        mask = args["mask"]
        self.on = [i for i in range(len(self.memory)) if mask is None or mask[source, i]]
        self.hidden, self.cell, self.context = (args[name][b] for name in ("hidden", "cell", "context"))
        self.coverage = args["coverage"][b].copy()

    def forward(self, t: int) -> dict[str, Any]:
        """One step: what it computes, with what it started from."""
        p = self.args
        start = {"h": self.hidden, "c": self.cell, "ctx": self.context, "covered": self.coverage.copy()}
        x = p["inputs"][self.b, t] + p["w_context"] @ self.context
        gates = np.split(p["w_ih"] @ x + p["w_hh"] @ self.hidden + p["bias"], 4)
        write, keep, new, show = _sigmoid(gates[0]), _sigmoid(gates[1]), np.tanh(gates[2]), _sigmoid(gates[3])
        self.cell = keep * self.cell + write * new
        self.hidden = show * np.tanh(self.cell)
        query = p["w_query"] @ np.concatenate([self.hidden, self.cell]) + p["b_query"]
        tanh = {i: np.tanh(self.features[i] + query + self._covered(i)) for i in self.on}
        scores = {i: float(p["v"] @ tanh[i]) for i in self.on}
        top = np.max(list(scores.values())) if scores else 0.0
        total = sum(np.exp(score - top) for score in scores.values())
        attention = np.zeros(len(self.memory))
        for i in self.on:
            attention[i] = np.exp(scores[i] - top) / total
        self.context = sum((attention[i] * self.memory[i] for i in self.on), np.zeros(self.context.shape))
        self.coverage = self.coverage + attention
        made = {"x": x, "hidden": self.hidden, "cell": self.cell, "context": self.context, "attention": attention}
        return {**start, **made, "gates": (write, keep, new, show), "tanh": tanh}

    def _covered(self, i: int) -> Any:
        """The term of coverage in the tanh of position i."""
        return 0.0 if self.args["w_coverage"] is None else self.args["w_coverage"] * self.coverage[i]

    def backward(self, steps: Sequence[dict[str, Any]], grads: Sequence[Any], out: dict[str, Array]) -> None:
        """Add this row's gradients, from those of its outputs, to `out`."""
        p, b = self.args, self.b
        d_hidden, d_cell, d_context = (np.zeros(p[name].shape[1:]) for name in ("hidden", "cell", "context"))
        d_coverage = np.zeros(len(self.coverage)) + (0.0 if grads[5] is None else grads[5])
        for t in reversed(range(len(steps))):
            g_x, g_hidden, g_cell, g_context, g_attention, g_loss = (
                0.0 if grads[n] is None else grads[n][t] for n in (0, 1, 2, 3, 4, 6)
            )
            d_query, d_coverage = self._attend_back(
                steps[t], d_context + g_context, d_coverage, g_attention, g_loss, out
            )
            d_state = p["w_query"].T @ d_query
            d_hidden = d_hidden + g_hidden + d_state[: len(d_hidden)]
            d_cell = d_cell + g_cell + d_state[len(d_hidden) :]
            d_gates, d_cell = _cell_back(steps[t], d_hidden, d_cell)
            d_x = g_x + p["w_ih"].T @ d_gates
            out["inputs"][b, t], out["gates"][b, t], out["query"][b, t] = d_x, d_gates, d_query
            d_hidden, d_context = p["w_hh"].T @ d_gates, p["w_context"].T @ d_x
        out["hidden"][b], out["cell"][b], out["context"][b], out["coverage"][b] = (
            d_hidden,
            d_cell,
            d_context,
            d_coverage,
        )

    def _attend_back(
        self,
        step: dict[str, Any],
        d_context: Array,
        d_coverage: Array,
        g_attention: Any,
        g_loss: Any,
        out: dict[str, Array],
    ) -> tuple[Array, Array]:
        """From the gradients of a step's context and coverage to those of its query, and of the coverage before."""
        p, b, a, covered = self.args, self.b, step["attention"], step["covered"]
        d_attention = d_coverage + g_attention  # a position's coverage becomes cov + a
        d_coverage = d_coverage.copy()
        for i in self.on:
            d_attention[i] += self.memory[i] @ d_context
            if a[i] <= covered[i]:
                d_attention[i] += g_loss
            else:
                d_coverage[i] += g_loss
            out["memory"][b, i] += a[i] * d_context
        mean = sum(a[i] * d_attention[i] for i in self.on)
        d_query = np.zeros(len(p["v"]))
        for i in self.on:
            d_score = a[i] * (d_attention[i] - mean)
            d_inside = d_score * (1 - step["tanh"][i] ** 2) * p["v"]
            out["v"] += d_score * step["tanh"][i]
            out["features"][b, i] += d_inside
            d_query += d_inside
            if p["w_coverage"] is not None:
                out["w_coverage"] += d_inside * covered[i]
                d_coverage[i] += d_inside @ p["w_coverage"]
        return d_query, d_coverage


def _cell_back(step: dict[str, Any], d_hidden: Array, d_cell: Array) -> tuple[Array, Array]:
    """From the gradients of a cell's state to those of its gates, before nonlinearities, and of the cell before."""
    i, f, g, o = step["gates"]
    tanh = np.tanh(step["cell"])
    d_cell = d_cell + d_hidden * o * (1 - tanh**2)
    d_i, d_f, d_g, d_o = d_cell * g, d_cell * step["c"], d_cell * i, d_hidden * tanh
    return np.concatenate([d_i * i * (1 - i), d_f * f * (1 - f), d_g * (1 - g**2), d_o * o * (1 - o)]), d_cell * f


def _least(a: float, covered: float) -> float:
    return float(np.minimum(a, covered))  # NaN if either is


def _sigmoid(z: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-z)))


def _numpy(tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    """The inputs by name; floats in float64."""

    def convert(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        return tensor.detach().numpy() if tensor.dtype == torch.bool else tensor.detach().double().numpy()

    return {name: convert(tensor) for name, tensor in zip(INPUTS, tensors, strict=True)}


def _like(tensor: Tensor | None, array: Array) -> Tensor:
    assert tensor is not None
    return torch.from_numpy(array).to(tensor.dtype)
