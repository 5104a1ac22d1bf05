from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastseq.models.beam import Search, Settings

START, STOP, WORDS, STATES = 0, 1, 9, 53


class Table:
    """A model whose next word depends, through a hash, on all words before it.

    Args:
        log_probs: (B,STATES,WORDS).
    """

    limit = WORDS

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs, self.state = log_probs, torch.zeros(len(log_probs), 1, dtype=torch.int64)
        self.read: list[Tensor] = []

    def step(self, words: Tensor, count: int) -> tuple[Tensor, Tensor]:
        self.read.append(words)
        self.state = after(self.state, words)
        rows = torch.arange(len(words))[:, None]
        values, ids = self.log_probs[rows, self.state].sort(dim=-1, descending=True, stable=True)
        return values[..., :count], ids[..., :count]

    def follow(self, rows: Tensor | None, beams: Tensor) -> None:
        if rows is not None:
            self.log_probs, self.state, beams = self.log_probs[rows], self.state[rows], beams[rows]
        self.state = self.state.gather(1, beams)


def after(state, word):  # type: ignore[no-untyped-def]
    return (31 * state + 7 * word + 3) % STATES


def tables(rows: int, seed: int, ties: bool = False) -> Tensor:
    scores = 2 * torch.randn(rows, STATES, WORDS, generator=torch.Generator().manual_seed(seed))
    return (2 * scores.log_softmax(-1)).round() / 2 if ties else scores.log_softmax(-1)


def repeats(words: list[int], n: int) -> bool:
    return n > 0 and words[-n:] in [words[i : i + n] for i in range(len(words) - n)]


def one_row(table: list[list[float]], settings: Settings) -> tuple[list[int], float]:
    """The search for one row as its definition reads: a list of hypotheses, and nothing stops early."""
    live: list[tuple[float, list[int], int]] = [(0.0, [], 0)]
    best: tuple[list[int], float] = ([], -math.inf)
    ended = 0
    for step in range(settings.max_steps):
        if settings.early_stopping and ended >= settings.beam_size:
            break
        found = []
        for total, words, state in live:
            state = after(state, words[-1] if words else settings.start)
            order = sorted(range(WORDS), key=lambda word: (-table[state][word], word))
            for word in order:
                off = word in settings.never or (word == settings.stop and step < settings.min_steps)
                if not (off or repeats([*words, word], settings.no_repeat_ngram) or table[state][word] == -math.inf):
                    found.append((total + table[state][word], [*words, word], state))
        found.sort(key=lambda item: -item[0])  # stable
        for total, words, _ in found[: settings.beam_size]:
            ended += words[-1] == settings.stop
            score = total / settings.penalty(len(words))
            if words[-1] == settings.stop and score > best[1]:
                best = words[:-1], score
        live = [item for item in found if item[1][-1] != settings.stop][: settings.beam_size]
    if best[1] == -math.inf and live:
        return live[0][1], live[0][0] / settings.penalty(settings.max_steps)
    return best


def search(log_probs: Tensor, settings: Settings) -> tuple[list[list[int]], list[float]]:
    found = Search(Table(log_probs), len(log_probs), settings, log_probs.device).run()
    rows = zip(found.words.tolist(), found.lengths.tolist(), strict=True)
    return [row[:count] for row, count in rows], found.scores.tolist()


BASE = Settings(START, STOP, (START,), beam_size=3, max_steps=9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beam_size": 1},
        {"beam_size": 6, "length_penalty": 0.0},
        {"length_penalty": 2.0, "min_steps": 0},
        {"length_penalty": -0.5},
        {"min_steps": 9},
        {"no_repeat_ngram": 2, "never": ()},
        {"no_repeat_ngram": 1, "min_steps": 4},
        {"max_steps": 1},
        {"early_stopping": True},
        {"early_stopping": True, "beam_size": 1},
        {"early_stopping": True, "beam_size": 2, "length_penalty": 0.0},
    ],
)
def test_it_is_the_search_of_one_row_after_another(changes: dict[str, object], ties: bool) -> None:
    settings = replace(BASE, **changes)  # type: ignore[arg-type]
    log_probs = tables(24, 3, ties)
    wanted = [one_row(table, settings) for table in log_probs.tolist()]
    ids, scores = search(log_probs, settings)
    assert ids == [words for words, _ in wanted]
    assert scores == pytest.approx([score for _, score in wanted], rel=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all(penalty: float) -> None:
    settings = replace(BASE, beam_size=80, max_steps=4, min_steps=0, length_penalty=penalty)
    log_probs = tables(5, 1)
    log_probs[:, :, 5:] = -math.inf  # three words, and the stop word
    ids, scores = search(log_probs, settings)
    for row, table in enumerate(log_probs.tolist()):
        best = -math.inf
        for length in range(settings.max_steps):
            for words in itertools.product((2, 3, 4), repeat=length):
                state, total = 0, 0.0
                for before, word in zip((START, *words), (*words, STOP), strict=True):
                    state = after(state, before)
                    total += table[state][word]
                if total / settings.penalty(length + 1) > best:
                    best, wanted = total / settings.penalty(length + 1), list(words)
        assert ids[row] == wanted
        assert scores[row] == pytest.approx(best)


def test_a_row_is_searched_alone_as_among_others() -> None:
    log_probs = tables(17, 5)
    together = search(log_probs, BASE)
    for i in range(17):
        assert search(log_probs[i : i + 1], BASE) == (together[0][i : i + 1], together[1][i : i + 1])


def test_the_way_back() -> None:
    log_probs = tables(17, 6)
    model = Table(log_probs)
    found = Search(model, 17, replace(BASE, max_steps=5), torch.device("cpu")).run()
    places, beams, values = found.path()
    torch.testing.assert_close(values.sum(1), found.totals)
    assert found.ends.unique().numel() > 2  # some rows end early, some are cut off
    for row in range(17):
        end = int(found.ends[row])
        assert (places[row, end + 1 :] == -1).all()
        read = [int(model.read[t][places[row, t], beams[row, t]]) for t in range(end + 1)]
        assert read == [START, *found.words[row, :end].tolist()]


def test_rows_without_any_hypothesis_are_empty_and_harm_no_other() -> None:
    log_probs = tables(6, 2)
    wanted = search(log_probs, BASE)
    log_probs[1], log_probs[4] = -math.inf, math.nan
    ids, scores = search(log_probs, BASE)
    for row in range(6):
        expected = ([], -math.inf) if row in (1, 4) else (wanted[0][row], wanted[1][row])
        assert (ids[row], scores[row]) == expected
    assert search(log_probs[:0], BASE) == ([], [])


@pytest.mark.parametrize("name", ["beam_size", "max_steps", "min_steps", "no_repeat_ngram"])
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .* got -1"):
        Settings(START, STOP, **{name: -1})  # type: ignore[arg-type]
