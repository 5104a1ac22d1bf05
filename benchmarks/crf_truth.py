"""The truth of the CRF benchmarks: the definition, in the float64 log domain, by torch and autograd alone.

It shares no code with fastseq, and is as slow as its B*T*K*K terms. Masks are right padding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Inputs", "Paths", "best_paths", "loss_and_gradients", "nll", "path_score"]

CHUNK_BYTES = 2**28  # of one (rows,T,K,K) float64 tensor; autograd keeps about three


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One CRF problem: emissions (B,T,K), tags (B,T), mask (B,T), and the parameters (K,K), (K,), (K,)."""

    emissions: Tensor
    tags: Tensor
    mask: Tensor
    transitions: Tensor
    start: Tensor
    end: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, T, K."""
        B, T, K = self.emissions.shape
        return B, T, K

    @property
    def tokens(self) -> int:
        """How many positions are on."""
        return int(self.mask.sum())


@dataclasses.dataclass(frozen=True)
class Paths:
    """The best path of each row, and its score (B,)."""

    inputs: Inputs
    paths: list[list[int]]
    scores: Tensor


def loss_and_gradients(inputs: Inputs) -> dict[str, Tensor]:
    """The negative log-likelihood, summed over rows, and its gradient in emissions and all parameters."""
    B, T, K = inputs.shape
    leaves = {
        name: getattr(inputs, name).detach().double().requires_grad_()
        for name in ("emissions", "transitions", "start", "end")
    }
    rows = max(1, CHUNK_BYTES // (8 * T * K * K))
    total = inputs.emissions.new_zeros((), dtype=torch.float64)
    for first in range(0, B, rows):
        chunk = slice(first, first + rows)
        x, *parameters = leaves.values()
        loss = nll(x[chunk], inputs.tags[chunk], inputs.mask[chunk], *parameters).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return {"loss": total} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def nll(x: Tensor, tags: Tensor, mask: Tensor, A: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The log-partition minus the score of `tags`, (B,), of emissions x and transitions A."""
    steps = x.unbind(1)  # x[:, t] would cost a gradient of x's size at each step
    alpha = start + steps[0]
    for t in range(1, x.shape[1]):
        step = torch.logsumexp(alpha[:, :, None] + A, dim=1) + steps[t]
        alpha = torch.where(mask[:, t, None], step, alpha)
    last = tags.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    emitted = (x.gather(2, tags[:, :, None])[:, :, 0] * mask).sum(1)
    moved = (A[tags[:, :-1], tags[:, 1:]] * mask[:, 1:]).sum(1)
    return torch.logsumexp(alpha + end, dim=1) - (start[tags[:, 0]] + emitted + moved + end[last])


@torch.no_grad()
def best_paths(inputs: Inputs) -> Paths:
    """The Viterbi paths and their scores."""
    x, A = inputs.emissions.double(), inputs.transitions.double()
    T = inputs.shape[1]
    lengths = inputs.mask.sum(1).tolist()
    score, came_from = inputs.start.double() + x[:, 0], []
    for t in range(1, T):
        best, argbest = (score[:, :, None] + A).max(1)
        score = torch.where(inputs.mask[:, t, None], best + x[:, t], score)
        came_from.append(argbest)
    scores, tag = (score + inputs.end.double()).max(1)
    back = torch.stack([*came_from, torch.zeros_like(score, dtype=torch.int64)], 1).cpu().tolist()
    paths = []
    for b, length in enumerate(lengths):
        path = [int(tag[b])]
        for t in range(length - 2, -1, -1):
            path.append(back[b][t][path[-1]])
        paths.append(path[::-1])
    return Paths(inputs, paths, scores)


def path_score(inputs: Inputs, row: int, path: list[int]) -> float:
    """The score of a path in float64; -inf if its length is wrong, or one of its tags does not exist."""
    K = inputs.shape[2]
    if len(path) != int(inputs.mask[row].sum()) or not all(0 <= tag < K for tag in path):
        return float("-inf")
    y = torch.tensor(path, device=inputs.emissions.device)
    emitted = inputs.emissions[row, : len(path)].double().gather(1, y[:, None]).sum()
    moved = inputs.transitions.double()[y[:-1], y[1:]].sum()
    return float(inputs.start.double()[y[0]] + emitted + moved + inputs.end.double()[y[-1]])
