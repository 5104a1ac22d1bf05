"""`tag_constraints` against a checker that knows the schemes only as rules about one sequence."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastseq.nn import tag_constraints


def read_spans(tags: tuple[str, ...], scheme: str) -> list[tuple[int, int, str]] | None:
    """The spans (first, last, type) that a sequence writes, read left to right; None if malformed."""
    spans: list[tuple[int, int, str]] = []
    open_at, open_type = None, ""
    begin, single, last = {"BIOES": "BSE", "BILOU": "BUL", "BMES": "BSE"}.get(scheme, "B  ")
    for t, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if scheme in ("BIO", "IOB1"):
            goes_on = bool(spans) and spans[-1][1] == t - 1 and spans[-1][2] == kind
            if prefix == "I" and goes_on:
                spans[-1] = (spans[-1][0], t, kind)
            elif prefix == "I" and scheme == "BIO":
                return None  # continues nothing
            elif prefix == "B" and scheme == "IOB1" and not goes_on:
                return None  # parts nothing
            elif prefix != "O":
                spans.append((t, t, kind))
        elif prefix in (begin, single, "O"):
            if open_at is not None:
                return None  # the span before was never closed
            if prefix == begin:
                open_at, open_type = t, kind
            elif prefix == single:
                spans.append((t, t, kind))
        else:
            if open_at is None or kind != open_type:
                return None
            if prefix == last:
                spans.append((open_at, t, kind))
                open_at = None
    return None if open_at is not None else spans


LABELS = {
    "BIO": ["O", "B-X", "I-X", "B-Y", "I-Y"],
    "IOB1": ["I-X", "O", "B-X", "I-Y", "B-Y"],
    "BIOES": ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "E-Y"],
    "BILOU": ["U-Y", "O", "B-X", "I-X", "L-X", "U-X", "I-Y"],
    "BMES": ["B", "M", "E", "S"],
}


@pytest.mark.parametrize("scheme", LABELS)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_allows_exactly_the_well_formed_sequences(scheme: str, length: int) -> None:
    labels = LABELS[scheme]
    transitions, start, end = tag_constraints(labels, scheme)
    for path in itertools.product(range(len(labels)), repeat=length):
        allowed = start[path[0]] and end[path[-1]] and all(transitions[a, b] for a, b in itertools.pairwise(path))
        tags = tuple(labels[i] for i in path)
        assert bool(allowed) == (read_spans(tags, scheme) is not None), tags


def test_shapes_and_types_of_spans() -> None:
    transitions, start, end = tag_constraints(["O", "B-MISC-A", "I-MISC-A", "I-MISC-B"])
    assert transitions.dtype == start.dtype == end.dtype == torch.bool
    assert transitions.shape == (4, 4)
    assert start.shape == end.shape == (4,)
    assert transitions[1].tolist() == [True, True, True, False]  # the type is all after the first hyphen


@pytest.mark.parametrize(
    ("labels", "scheme", "words"),
    [
        (["O", "E-PER"], "BIO", "'E-PER', which BIO does not know"),
        (["PER-B"], "BIO", "'PER-B', which BIO"),
        (["B-"], "BIO", "'B-', which BIO"),
        (["O-PER"], "BIOES", "'O-PER', which BIOES"),
        (["M"], "BILOU", "'M', which BILOU"),
        (["I-PER"], "BMES", "'I-PER', which BMES"),
        ([""], "BIO", "'', which BIO"),
        (["<pad>"], "BIO", "'<pad>', which BIO"),
        ([], "BIO", "labels: got none"),
        (["O"], "IOB2", "scheme: got 'IOB2', wanted one of BIO, IOB1"),
    ],
)
def test_errors(labels: list[str], scheme: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tag_constraints(labels, scheme)
