"""Which tag may follow which, for the usual ways to write spans as tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["tag_constraints"]


class _Scheme(NamedTuple):
    """A scheme, by which of its prefixes are tied to a neighbour of the same type.

    Attributes:
        prefixes: All that it knows.
        heads: Prefixes after which a span may go on.
        tails: Prefixes that must stand after a head of their type.
        closed: Whether a head must also be followed by a tail.
    """

    prefixes: str
    heads: str
    tails: str
    closed: bool


_SCHEMES = {
    "BIO": _Scheme("BIO", heads="BI", tails="I", closed=False),
    "IOB1": _Scheme("BIO", heads="BI", tails="B", closed=False),  # B only parts two spans of a type that touch
    "BIOES": _Scheme("BIOES", heads="BI", tails="IE", closed=True),
    "BILOU": _Scheme("BILOU", heads="BI", tails="IL", closed=True),
    "BMES": _Scheme("BMESO", heads="BM", tails="ME", closed=True),
}


def tag_constraints(labels: Sequence[str], scheme: str = "BIO") -> tuple[Tensor, Tensor, Tensor]:
    """The constraints of `fastseq.nn.CRF` under which every path is a well-formed sequence of spans.

        transitions, start, end = tag_constraints(labels)
        CRF(len(labels), allowed_transitions=transitions, allowed_start=start, allowed_end=end)

    Args:
        labels: The K tags in the order of their ids: "O", a prefix and a type such as "B-PER", or a bare
            prefix such as "B" (a span of no type). The type is all that follows the first hyphen.
        scheme: How spans are written; O is outside, in all. BIO: B-X I-X I-X. IOB1: I-X I-X I-X, with B-X
            only where a span touches one of its type before it. BIOES, BILOU, BMES: B-X I-X E-X, B-X I-X L-X,
            B-X M-X E-X, and S-X, U-X, S-X for a span of one.

    Returns:
        (K,K) bool, whether y may follow x; (K,) bool, whether x may be first; (K,) bool, whether x may be
        last.

    Raises:
        ValueError: The scheme is unknown, there is no label, or the scheme does not know a label.
        TypeError: The labels are not strings.

    Source: Ramshaw & Marcus 1995 (IOB1); Tjong Kim Sang & Veenstra 1999 (BIO); Ratinov & Roth 2009 (BILOU).
    """
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        raise ValueError(f"scheme: got {scheme!r}, wanted one of {', '.join(_SCHEMES)}")
    if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels: got {labels!r}, wanted a list of strings")
    if not labels:
        raise ValueError("labels: got none, wanted at least one")
    rules = _SCHEMES[scheme]
    tags = [_parse(label, scheme) for label in labels]
    head = [prefix in rules.heads for prefix, _ in tags]
    tail = [prefix in rules.tails for prefix, _ in tags]
    bound = [h and rules.closed for h in head]

    def follows(x: int, y: int) -> bool:
        joined = head[x] and tail[y] and tags[x][1] == tags[y][1]
        return joined or not (bound[x] or tail[y])

    ids = range(len(tags))
    transitions = torch.tensor([[follows(x, y) for y in ids] for x in ids])
    return transitions, ~torch.tensor(tail), ~torch.tensor(bound)


def _parse(label: str, scheme: str) -> tuple[str, str]:
    """The prefix and the type of a label; the type of a bare prefix is empty."""
    prefix, hyphen, kind = label.partition("-")
    known = len(prefix) == 1 and prefix in _SCHEMES[scheme].prefixes
    if not known or bool(hyphen) != bool(kind) or (prefix == "O" and hyphen):
        wanted = ", ".join(p if p == "O" else f"{p}-TYPE" for p in _SCHEMES[scheme].prefixes)
        raise ValueError(f"labels: got {label!r}, which {scheme} does not know; wanted one of {wanted}")
    return prefix, kind
