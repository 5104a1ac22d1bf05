"""The tagger's data: readers, and the encoding of tokens as ids.

Letters: T tokens, F id columns a token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastseq.models.tagger import IGNORE, PAD
from fastseq.recipes.errors import DataError
from fastseq.recipes.fetch import fetch
from fastseq.recipes.table import decoding
from fastseq.recipes.task import Batch


class Sentence(NamedTuple):
    """Tokens and their tags."""

    tokens: list[str]
    tags: list[str]


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]


def read_conll(path: Path, token_column: int = 0, tag_column: int = -1) -> list[Sentence]:
    """Reads a CoNLL column file: a token a line, columns parted by blanks, an empty line after a sentence.

    Args:
        path: the file; ``-DOCSTART-`` lines are passed over.
        token_column: index of the token; negative counts from the end.
        tag_column: index of the tag.

    Raises:
        DataError: a line without those columns, or no sentence at all; with file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    sentences, current = [], Sentence([], [])
    with decoding(path):
        text = path.read_text("utf-8")
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if current.tokens:
                sentences.append(current)
                current = Sentence([], [])
            continue
        count = len(fields)
        there = all(-count <= column < count for column in (token_column, tag_column))
        if not there or token_column % count == tag_column % count:  # a word is not its own tag
            raise DataError(f"{path}:{number}: columns {token_column} and {tag_column} are wanted, got {count}")
        token, tag = fields[token_column], fields[tag_column]
        current.tokens.append(token)
        current.tags.append(tag)
    if not sentences:
        raise DataError(f"{path}: no sentence in it")
    return sentences


SENTENCE_ENDS = "\u3002\uff01\uff1f\uff1b"  # the full stop, and ! ? ; at full width


def read_peoples_daily(path: Path) -> Iterator[list[tuple[str, str]]]:
    """Reads the corpus, a paragraph of ``word/pos`` a line, and gives sentences of (word, pos)."""
    for line in path.read_text("utf-8").splitlines():
        parts = (word.rsplit("/", 1) for word in line.strip().split("  ") if "/" in word)
        sentence: list[tuple[str, str]] = []
        for word, pos in parts:
            if not (word and pos):
                continue
            sentence.append((word, pos))
            if word in SENTENCE_ENDS:
                yield sentence
                sentence = []
        if sentence:
            yield sentence


def peoples_daily(path: Path, convert: Callable[[list[tuple[str, str]]], Sentence]) -> Splits:
    """The corpus as unique sentences of two words or more, split by a hash of the text: 8 % test, 6 % dev."""
    unique = {"".join(word for word, _ in s): s for s in read_peoples_daily(path) if len(s) > 1}
    splits = Splits([], [], [])
    for text, sentence in unique.items():
        part = int(hashlib.sha1(text.encode("utf-8")).hexdigest(), 16) % 100
        splits[2 if part < 8 else 1 if part < 14 else 0].append(convert(sentence))
    return splits


def words_with_pos(sentence: list[tuple[str, str]]) -> Sentence:
    """Words and their parts of speech."""
    return Sentence([word for word, _ in sentence], [pos for _, pos in sentence])


def characters_with_entities(sentence: list[tuple[str, str]]) -> Sentence:
    """Characters and BIO tags of people, places and organisations."""
    kinds = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
    tokens: list[str] = []
    tags: list[str] = []
    surname = False  # the corpus parts a surname from the given name that follows: together they are one person
    for word, pos in sentence:
        kind = kinds.get(pos)
        first = "I" if kind == "PER" and surname else "B"
        tokens += word
        tags += [f"{first}-{kind}", *[f"I-{kind}"] * (len(word) - 1)] if kind else ["O"] * len(word)
        surname = pos == "nr" and len(word) == 1 and not surname
    return Sentence(tokens, tags)


def read(name: str, files: Sequence[Path | None], token_column: int, tag_column: int) -> Splits:
    """The splits of a named data set, or of three CoNLL files where the name is "conll"."""
    if name == "conll":
        missing = [key for key, file in zip(Splits._fields, files, strict=True) if file is None]
        if missing:
            raise DataError(f"data.{missing[0]}: a file is wanted where data.name is conll")
        return Splits(*(read_conll(Path(str(file)), token_column, tag_column) for file in files))
    convert = words_with_pos if name == "peoples-daily-pos" else characters_with_entities
    return peoples_daily(fetch(name), convert)


FEATURES: Mapping[str, Callable[[Sequence[str]], Iterable[str]]] = {
    "token": lambda tokens: tokens,
    "lower": lambda tokens: [token.lower() for token in tokens],
    "bigram": lambda tokens: [a + "\t" + b for a, b in zip(tokens, [*tokens[1:], ""], strict=True)],
    "first": lambda tokens: [token[:1] for token in tokens],
    "last": lambda tokens: [token[-1:] for token in tokens],
    "prefix": lambda tokens: [token[:3] for token in tokens],
    "suffix": lambda tokens: [token[-3:] for token in tokens],
}
"""What a column of ids can stand for: each makes one string of every token."""

UNKNOWN = 1


@dataclass
class Encoder:
    """Strings to ids: a table for each column, and the labels.

    Attributes:
        columns: of each feature, its strings in the order of their ids, which follow padding and unknown.
        labels: the K tags in the order of their ids.
    """

    columns: dict[str, list[str]]
    labels: list[str]

    def __post_init__(self) -> None:
        self._ids = {
            feature: {value: i for i, value in enumerate(values, start=UNKNOWN + 1)}
            for feature, values in self.columns.items()
        }
        self._tags = {label: i for i, label in enumerate(self.labels)}

    @classmethod
    def fit(cls, sentences: Sequence[Sentence], limits: Mapping[str, tuple[int, int | None]]) -> Encoder:
        """Counts a training set.

        Args:
            sentences: of the training set.
            limits: of each feature, how often a string must occur to get an id, and how many get one.
        """
        columns = {}
        for feature, (min_count, max_size) in limits.items():
            counts = Counter(value for s in sentences for value in FEATURES[feature](s.tokens))
            columns[feature] = [value for value, n in counts.most_common(max_size) if n >= min_count]
        return cls(columns, sorted({tag for s in sentences for tag in s.tags}))

    @property
    def sizes(self) -> list[int]:
        """The number of ids in each column."""
        return [len(values) + UNKNOWN + 1 for values in self.columns.values()]

    def tokens(self, tokens: Sequence[str]) -> np.ndarray:
        """(T,F) int64 ids."""
        rows = [[ids.get(value, UNKNOWN) for value in FEATURES[feature](tokens)] for feature, ids in self._ids.items()]
        return np.stack([np.array(row, dtype=np.int64) for row in rows], axis=1)

    def example(self, sentence: Sentence) -> tuple[np.ndarray, np.ndarray]:
        """(T,F) ids and (T,) tag ids; a tag that training has not seen counts as no tag at all."""
        tags = np.array([self._tags.get(tag, IGNORE) for tag in sentence.tags], dtype=np.int64)
        return self.tokens(sentence.tokens), tags

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"columns": self.columns, "labels": self.labels}


def collate(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Pads examples to the longest: tokens (B,T,F), lengths (B,), tags (B,T)."""
    lengths = [len(tags) for _, tags in examples]
    tokens = np.full((len(examples), max(lengths), examples[0][0].shape[1]), PAD, dtype=np.int64)
    tags = np.full(tokens.shape[:2], IGNORE, dtype=np.int64)
    for row, (ids, target) in enumerate(examples):
        tokens[row, : len(target)] = ids
        tags[row, : len(target)] = target
    return {
        "tokens": torch.from_numpy(tokens),
        "lengths": torch.tensor(lengths),
        "tags": torch.from_numpy(tags),
    }


def read_vectors(path: Path, values: Sequence[str], size: int) -> torch.Tensor:
    """Pretrained vectors for a column, from a text file: a string and `size` numbers a line.

    Args:
        path: the file, as word2vec or GloVe write it (a header line is passed over).
        values: the column's strings, in the order of their ids.
        size: numbers in a vector.

    Returns:
        (len(values) + 2, size); random like a fresh table where the file has no vector, zero for padding.

    Raises:
        DataError: no file, or a line that is no vector; with file and line.
    """
    if not path.is_file():
        raise DataError(f"model.vectors: no file at {path}")
    table = torch.randn(len(values) + UNKNOWN + 1, size) * 0.3
    table[PAD] = 0
    ids = {value: i for i, value in enumerate(values, start=UNKNOWN + 1)}
    with decoding(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            value, *numbers = line.rstrip().split(" ")
            if number == 1 and len(numbers) == 1:
                continue
            if len(numbers) != size:
                raise DataError(f"{path}:{number}: {size} numbers are wanted (model.features), got {len(numbers)}")
            if value in ids:
                try:
                    table[ids[value]] = torch.tensor([float(x) for x in numbers])
                except ValueError as error:
                    raise DataError(f"{path}:{number}: {error}") from None
    return table
