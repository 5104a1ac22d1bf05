"""Label smoothing over the mixture, in closed form: only the words of the source differ from the vocabulary's share.

With A_v = logsig(g) + z_v - lse and C_v = logsig(-g) + log(what is copied of v), log p(v) is A_v but for the words of
the source, where it is logaddexp(A_v, C_v). So sum_v log p(v) is a sum of logits and a correction at the source ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Part", "Smoothed", "Smoothing", "Words"]

Part = Tensor | slice


class Words(NamedTuple):
    """The source words of some rows: (n,S) each, but `rest`."""

    ids: Tensor  # in the vocabulary; 0 where the position does not count
    first: Tensor  # bool: the first position of its word
    valid: Tensor  # bool: the position counts
    logits: Tensor
    log_mass: Tensor  # log of what is copied of the word, all its positions together
    rest: Tensor  # (n,) the sum of the logits of all other words


class Smoothed(NamedTuple):
    """The smoothing term of some rows, (n,) each, and the source words' own part of it."""

    value: Tensor  # -(1/V) sum_v log p(v)
    generated: Tensor  # (1/V) sum_v of the posterior probability that v was generated
    copied: Tensor  # (n,S) for a first position: 1 - the word's own
    log_p: Tensor  # (n,S)


class Smoothing:
    """The source words of a batch, each once.

    Args:
        copy: (B,T,S) attention.
        source_ids: (B,S).
        vocabulary: V.
        share: The weight of the term, label_smoothing.
    """

    def __init__(self, copy: Tensor, source_ids: Tensor, vocabulary: int, share: float) -> None:
        self.vocabulary, self.share = vocabulary, share
        self.copy = copy.flatten(0, 1)
        self.valid = (source_ids >= 0) & (source_ids < vocabulary)
        # Positions that do not count are positions of word 0 from which nothing is copied: that changes nothing.
        self.ids = source_ids.masked_fill(~self.valid, 0)
        self.leader = _first_position(self.ids)
        self.first = self.leader == torch.arange(copy.shape[2], device=copy.device)
        self.batch = torch.arange(len(self.copy), device=copy.device) // max(copy.shape[1], 1)

    def read(self, z: Tensor, part: Part) -> Words:
        """The source words of the rows whose logits are `z` (n,V)."""
        b = self.batch[part]
        ids, valid, leader = self.ids[b], self.valid[b], self.leader[b]
        logits = z.gather(1, ids)
        # The others' sum, by their sum with these at 0: a forbidden word (-inf) that can be copied must not be in it.
        rest = z.scatter_(1, ids, 0.0).sum(1)
        z.scatter_(1, ids, logits)
        copy = self.copy[part].masked_fill(~valid, 0)
        mass = torch.zeros_like(copy).scatter_add_(1, leader, copy).gather(1, leader)
        return Words(ids, self.first[b], valid, logits, mass.log_(), rest)

    def mix(self, words: Words, log_gate: Tensor, log_not_gate: Tensor, lse: Tensor) -> Smoothed:
        """The smoothing term, from log sigmoid(gate), log sigmoid(-gate) and lse, (n,) each."""
        a = words.logits + (log_gate - lse)[:, None]
        log_p = torch.logaddexp(a, words.log_mass + log_not_gate[:, None])
        copied = (1 - (a - log_p).exp()).masked_fill(~words.first, 0)
        others = self.vocabulary - words.first.sum(1)
        total = others * (log_gate - lse) + words.rest + log_p.masked_fill(~words.first, 0).sum(1)
        return Smoothed(-total / self.vocabulary, 1 - copied.sum(1) / self.vocabulary, copied, log_p)

    def add_to_logits(self, grad_z: Tensor, words: Words, smoothed: Smoothed, weights: Tensor) -> None:
        """Add the term's own part of the gradient to (n,V); `weights` (n,), 0 for rows without a gradient."""
        each = (weights * (self.share / self.vocabulary))[:, None]
        sparse = torch.where(each != 0, each * smoothed.copied, 0)
        grad_z.sub_(each).scatter_add_(1, words.ids, sparse)

    def grad_copy(self, words: Words, smoothed: Smoothed, weights: Tensor, log_not_gate: Tensor) -> Tensor:
        """The term's gradient to the attention, (n,S); `weights` as above."""
        each = (weights * (-self.share / self.vocabulary))[:, None]
        pull = each * (log_not_gate[:, None] - smoothed.log_p).exp()
        return torch.where((each != 0) & words.valid, pull, 0)


def _first_position(ids: Tensor) -> Tensor:
    """(B,S) for each position, the first one with the same id."""
    ordered, order = ids.sort(dim=1, stable=True)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = places.masked_fill(~new, 0).cummax(1).values if ids.shape[1] else places
    return torch.empty_like(ids).scatter_(1, order, order.gather(1, start))
