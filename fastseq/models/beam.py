"""Beam search in which every hypothesis of every row takes each step together.

Letters: B rows, R rows still searched, K hypotheses of a row (at most the beam size), C candidates, L steps.

In each step the continuations of a row's hypotheses are ordered by log-probability; of equal ones the better
hypothesis comes first, then the candidate that the model names first. A stop word among the best `beam_size`
finishes its hypothesis, and the best `beam_size` without one live on. The score of a hypothesis of n words, its
stop word among them, is its log-probability / ((5 + n) / 6) ** length_penalty (Wu et al. 2016, equation 14). A row
ends when nothing that lives can still beat its best finished hypothesis: that changes no result. A hypothesis that
is cut off counts only where none has finished.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IDLE = 0.15
"""The share of rows that must be done before the others are moved together: moving costs about a step."""


class Model(Protocol):
    """What is searched. It starts with one hypothesis a row."""

    limit: int
    """The most candidates that it can name."""

    def step(self, words: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Reads a word of each hypothesis, (R,K); gives the log-probabilities and ids of the next, (R,K,count)."""
        ...

    def follow(self, rows: Tensor | None, beams: Tensor) -> None:
        """Goes on with `rows` (None: all), and in each with the hypotheses `beams`, (R,K)."""
        ...


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        start: the word that the model reads first.
        stop: the word that ends a hypothesis.
        never: words that are not written.
        beam_size: the most hypotheses that live.
        max_steps: the most words.
        min_steps: words before the stop word may come.
        length_penalty: the exponent; 0 is none.
        no_repeat_ngram: no n words in a row come twice; 0 lets them.
        early_stopping: a row is done once beam_size hypotheses have ended, as is usual; else once none that
            lives could beat the best, which finds more and takes longer.
    """

    start: int
    stop: int
    never: tuple[int, ...] = ()
    beam_size: int = 4
    max_steps: int = 32
    min_steps: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        for name in ("beam_size", "max_steps", "min_steps", "no_repeat_ngram"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name}: an int is wanted, got {getattr(self, name)!r}")
        if isinstance(self.length_penalty, bool) or not isinstance(self.length_penalty, (int, float)):
            raise TypeError(f"length_penalty: a number is wanted, got {self.length_penalty!r}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty: a finite number is wanted, got {self.length_penalty}")
        for name in ("beam_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1 is wanted, got {getattr(self, name)}")
        for name in ("min_steps", "no_repeat_ngram"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: 0 or more is wanted, got {getattr(self, name)}")

    def penalty(self, words: int) -> float:
        """What the log-probability of so many words is divided by."""
        return float(((5 + words) / 6) ** self.length_penalty)


class Step(NamedTuple):
    """What is kept of a step, to find the way back.

    Attributes:
        rows: (R,) which took part.
        totals: (R,K) log-probability of each hypothesis before the step.
        parents: (R,K') the hypothesis that each of the next step continues.
    """

    rows: Tensor
    totals: Tensor
    parents: Tensor


@dataclass
class Found:
    """The best hypothesis of each row.

    Attributes:
        words: (B,L) ids, without the stop word.
        lengths: (B,) how many there are.
        scores: (B,) float64; -inf where there is none.
        totals: (B,) float64 log-probability, undivided.
        ends: (B,) the step that took the last word (or the stop word), -1 where there is none.
        beams: (B,) the hypothesis that it continued.
        steps: the way back.
    """

    words: Tensor
    lengths: Tensor
    scores: Tensor
    totals: Tensor
    ends: Tensor
    beams: Tensor
    steps: list[Step]

    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each word was taken: its row among those of its step, its hypothesis, its log-probability.

        Returns:
            Three (B,L') tensors; the row is -1 after the end.
        """
        shape = len(self.scores), len(self.steps)
        places, beams = self.ends.new_full((2, *shape), -1)
        log_probs = self.totals.new_zeros(shape)
        beam, total = self.beams, self.totals
        for t in range(len(self.steps) - 1, -1, -1):
            step = self.steps[t]
            order = torch.arange(len(step.rows), device=beam.device)
            at = torch.full_like(self.ends, -1).index_copy(0, step.rows, order)
            on = self.ends >= t
            place = at.clamp(min=0)
            before = self.ends > t  # such a row goes on after this step: its hypothesis has a parent
            width = step.parents.shape[1] - 1
            beam = torch.where(before, step.parents[place, beam.clamp(max=width)], beam)
            places[:, t], beams[:, t] = at.masked_fill(~on, -1), beam
            known = step.totals[place, beam.clamp(max=step.totals.shape[1] - 1)]
            log_probs[:, t] = torch.where(on, total - known, 0.0)
            total = torch.where(on, known, total)
        return places, beams, log_probs


class Search:
    """A search in progress.

    Args:
        model: it is driven to the end.
        rows: B.
        settings: of the search.
        device: of the model.
    """

    def __init__(self, model: Model, rows: int, settings: Settings, device: torch.device) -> None:
        self.model, self.settings = model, settings
        self.index = torch.arange(rows, device=device)
        self.totals = torch.zeros(rows, 1, dtype=torch.float64, device=device)
        self.words = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
        self.ended = torch.zeros_like(self.index)
        none = torch.full_like(self.totals[:, 0], -math.inf)
        ids = torch.zeros(rows, settings.max_steps, dtype=torch.int64, device=device)
        nowhere = torch.full_like(self.index, -1)
        self.best = Found(ids, torch.zeros_like(nowhere), none, none.clone(), nowhere, torch.zeros_like(nowhere), [])

    def run(self) -> Found:
        """Searches to the end."""
        for step in range(self.settings.max_steps):
            if not len(self.index):
                break
            self._step(step)
        if len(self.index):
            self._cut_off()
        return self.best

    def _step(self, step: int) -> None:
        totals, beams, words = self._continuations(step)
        size = self.settings.beam_size
        stops = (words == self.settings.stop) & (totals > -math.inf)
        first = stops[:, :size]
        if self.settings.early_stopping:  # a row that is done may still be here, beside others that are not
            first = first & (self.ended < size)[:, None]
            self.ended += first.sum(1)
        self._finish(step, totals[:, :size], beams[:, :size], first)
        # A stable sort: those that stop go to the end, and the others keep their order.
        lives = stops.to(torch.int8).sort(dim=1, stable=True).indices[:, :size]
        parents = beams.gather(1, lives)
        self.best.steps.append(Step(self.index, self.totals, parents))
        self.totals = totals.gather(1, lives).masked_fill(stops.gather(1, lives), -math.inf)
        before = self.words.gather(1, parents[:, :, None].expand(-1, -1, step))
        self.words = torch.cat([before, words.gather(1, lives)[:, :, None]], 2)
        if step + 1 < self.settings.max_steps:
            self.model.follow(self._leave(step), parents)

    def _continuations(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of each row, in order: (R,C) log-probabilities, hypotheses and words."""
        settings = self.settings
        repeats = self._repeats(step)
        barred = 0 if repeats is None else int((repeats >= 0).sum(2).max())
        # Enough for every hypothesis to fill the beam alone, whatever of it may not be written.
        count = min(settings.beam_size + 1 + len(settings.never) + barred, self.model.limit)
        last = self.words[:, :, -1] if step else torch.full_like(self.words.sum(2), settings.start)
        log_probs, ids = self.model.step(last, count)
        off = torch.isin(ids, torch.tensor(settings.never, device=ids.device)) if settings.never else ids < 0
        if step < settings.min_steps:
            off = off | (ids == settings.stop)
        if repeats is not None:
            off = off | (ids[..., None] == repeats[:, :, None]).any(3)
        totals = self.totals[:, :, None] + log_probs
        totals = totals.masked_fill(off | totals.isnan(), -math.inf).flatten(1)
        totals, order = totals.sort(dim=1, descending=True, stable=True)
        totals, order = totals[:, : 2 * settings.beam_size], order[:, : 2 * settings.beam_size]
        return totals, order // count, ids.flatten(1).gather(1, order)

    def _repeats(self, step: int) -> Tensor | None:
        """The words that would complete n words that a hypothesis has already: (R,K,L), -1 where none."""
        n = self.settings.no_repeat_ngram
        if not n or step < n:
            return None
        windows = self.words.unfold(2, n, 1)
        known = (windows[..., :-1] == self.words[:, :, None, step - n + 1 :]).all(3)
        return windows[..., -1].masked_fill(~known, -1)

    def _finish(self, step: int, totals: Tensor, beams: Tensor, stops: Tensor) -> None:
        """Keeps the best hypothesis that has just stopped, where it beats those before it."""
        best = self.best
        first = (~stops).long().cumprod(1).sum(1, keepdim=True)
        total = totals.gather(1, first.clamp(max=totals.shape[1] - 1))[:, 0]
        score = total / self.settings.penalty(step + 1)
        won = (stops.any(1) & (score > best.scores[self.index])).nonzero()[:, 0]
        rows, beam = self.index[won], beams.gather(1, first.clamp(max=beams.shape[1] - 1))[won, 0]
        best.words[rows, :step] = self.words[won, beam]
        best.lengths[rows], best.ends[rows], best.beams[rows] = step, step, beam
        best.scores[rows], best.totals[rows] = score[won], total[won]

    def _leave(self, step: int) -> Tensor | None:
        """Lets go of rows that are done, once they are enough; the places of those that stay, or None for all."""
        settings = self.settings
        # A longer hypothesis is divided by more; with a negative exponent, by less.
        most = max(settings.penalty(step + 2), settings.penalty(settings.max_steps))
        top = self.totals[:, 0]
        done = (self.best.scores[self.index] >= top / most) | (top == -math.inf)
        if settings.early_stopping:
            done |= self.ended >= settings.beam_size
        count = int(done.sum())
        if count < IDLE * len(done):
            return None
        stay = (~done).nonzero()[:, 0]
        self.index, self.totals, self.words = self.index[stay], self.totals[stay], self.words[stay]
        self.ended = self.ended[stay]
        return stay

    def _cut_off(self) -> None:
        """Takes the best that lives where nothing has finished."""
        best, step = self.best, self.words.shape[2]
        total = self.totals[:, 0]
        won = ((best.ends[self.index] < 0) & (total > -math.inf)).nonzero()[:, 0]
        rows = self.index[won]
        best.words[rows, :step] = self.words[won, 0]
        best.lengths[rows], best.ends[rows] = step, step - 1
        best.beams[rows] = best.steps[-1].parents[won, 0]
        best.totals[rows], best.scores[rows] = total[won], total[won] / self.settings.penalty(step)
