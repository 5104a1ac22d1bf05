"""The summarizer's data: readers, text to tokens and back, and the encoding of tokens as ids.

Letters: B examples, S tokens of the longest source, T tokens of the longest target (its end mark included), V words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastseq.host import ExtendedVocabulary
from fastseq.models.summarizer import ABSENT, IGNORE, PAD, START, STOP, UNK
from fastseq.recipes.errors import DataError
from fastseq.recipes.fetch import fetch
from fastseq.recipes.table import decoding
from fastseq.recipes.task import Batch

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
"""The words of the ids PAD, UNK, START and STOP."""


class Pair(NamedTuple):
    """A text and its summary; pairs of one group (such as a package's) are in the same part of a data set."""

    source: str
    target: str
    group: str = ""


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]


def read_jsonl(path: Path) -> list[Pair]:
    """Reads a JSON object a line, with the strings "source" and "target"; other keys are passed over.

    Raises:
        DataError: a line that is something else, or no line at all; with file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    pairs = []
    with decoding(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    pairs.append(_pair(line))
                except ValueError as error:
                    raise DataError(f"{path}:{number}: {error}") from None
    if not pairs:
        raise DataError(f"{path}: no pair in it")
    return pairs


def _pair(line: str) -> Pair:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object is wanted, got {type(value).__name__}")
    for key in ("source", "target"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"the key {key!r} with a string is wanted, got {value.get(key)!r}")
        if not TOKEN.search(value[key]):
            raise ValueError(f"the key {key!r}: no word in it")
        value[key].encode("utf-8")  # JSON can write half a character
    return Pair(value["source"], value["target"], str(value.get("group", "")))


def split(pairs: Iterable[Pair]) -> Splits:
    """5 % test, 5 % dev and the rest, by a hash of the group or else of the source."""
    splits = Splits([], [], [])
    for pair in pairs:
        part = int(hashlib.sha1((pair.group or pair.source).encode("utf-8")).hexdigest(), 16) % 100
        splits[2 if part < 5 else 1 if part < 10 else 0].append(pair)
    return splits


def read(name: str, files: Sequence[Path | None]) -> Splits:
    """The splits of a named data set, or of three JSONL files where the name is "jsonl"."""
    if name == "jsonl":
        missing = [key for key, file in zip(Splits._fields, files, strict=True) if file is None]
        if missing:
            raise DataError(f"data.{missing[0]}: a file is wanted where data.name is jsonl")
        return Splits(*(read_jsonl(Path(str(file))) for file in files))
    return split(read_jsonl(fetch(name)))


JOINT = re.compile(r"(?<=\w)([-/])(?=\w)")
TOKEN = re.compile(r"@[-/]@|\w+(?:[.'’&]\w+)*\+*|[^\w\s]")


def tokenize(text: str) -> list[str]:
    """Words in lower case, and punctuation marks.

    The parts of a word with hyphens or slashes are tokens of their own, with a mark between them that `detokenize`
    knows: a vocabulary holds the parts of many more words than it holds words.
    """
    return TOKEN.findall(JOINT.sub(r" @\1@ ", text.lower()))


def detokenize(tokens: Iterable[str]) -> str:
    """Readable text of tokens; its `tokenize` gives them again, but for lone quotation marks and the like."""
    text = re.sub(r" @([-/])@ ", r"\1", " ".join(tokens))
    text = re.sub(r" ([.,;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    return re.sub(r"([\"'`]) (.*?) \1", r"\1\2\1", text)


@dataclass(frozen=True)
class Example:
    """One pair as ids.

    Attributes:
        index: its place among the examples that were encoded together.
        source: (S,) ids in the vocabulary.
        extended: (S,) the same in the extended vocabulary.
        inputs: (T,) what the decoder reads: the begin mark and the target, in the vocabulary.
        targets: (T,) what it shall give: the target and the end mark, in the extended vocabulary.
        oov: the source's words outside the vocabulary; word j has the extended id V + j.
        reference: the target as it was written.
    """

    index: int
    source: np.ndarray
    extended: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    oov: list[str]
    reference: str


class Encoder:
    """Text to ids and back.

    Args:
        words: the V words in the order of their ids; the first four are `SPECIAL`.
        max_source: tokens of a source that are read.
        max_target: tokens of a target, its end mark included; a longer one is cut and has no end mark.
    """

    CHUNK = 1024

    def __init__(self, words: Sequence[str], max_source: int, max_target: int) -> None:
        self.vocabulary = ExtendedVocabulary(words, UNK, padding=PAD)
        self.max_source, self.max_target = max_source, max_target

    @classmethod
    def fit(
        cls, pairs: Sequence[Pair], max_words: int | None, min_count: int, max_source: int, max_target: int
    ) -> Encoder:
        """Counts the tokens of a training set, as far as they are read.

        Args:
            pairs: of the training set.
            max_words: size of the vocabulary, the four special words included; None for all.
            min_count: how often a token must occur to get an id.
            max_source: as of the class.
            max_target: as of the class.
        """
        counts: Counter[str] = Counter()
        for pair in pairs:
            counts.update(tokenize(pair.source)[:max_source])
            counts.update(tokenize(pair.target)[:max_target])
        for word in SPECIAL:
            counts.pop(word, None)
        room = None if max_words is None else max(0, max_words - len(SPECIAL))
        return cls(
            [*SPECIAL, *(word for word, n in counts.most_common(room) if n >= min_count)], max_source, max_target
        )

    def __len__(self) -> int:
        return len(self.vocabulary)

    def examples(self, pairs: Sequence[Pair]) -> list[Example]:
        """Encodes pairs; for prediction a target may be empty."""
        examples: list[Example] = []
        for start in range(0, len(pairs), self.CHUNK):
            chunk = pairs[start : start + self.CHUNK]
            sources = self.vocabulary.encode_sources([tokenize(pair.source)[: self.max_source] for pair in chunk])
            tokens = [[*tokenize(pair.target), SPECIAL[STOP]][: self.max_target] for pair in chunk]
            targets = self.vocabulary.encode_targets(tokens, sources.oov)
            for i, pair in enumerate(chunk):
                s, t = sources.lengths[i], targets.lengths[i]
                examples.append(
                    Example(
                        index=start + i,
                        source=sources.ids[i, :s].astype(np.int32),
                        extended=sources.extended[i, :s].astype(np.int32),
                        inputs=np.append([START], targets.ids[i, : t - 1]).astype(np.int32),
                        targets=targets.extended[i, :t].astype(np.int32),
                        oov=sources.oov[i],
                        reference=pair.target,
                    )
                )
        return examples

    def words(self, ids: Iterable[int], oov: Sequence[str]) -> list[str]:
        """The tokens of ids in the extended vocabulary of a source, without special ones."""
        size, known = len(self), self.vocabulary.words
        return [known[i] if i < size else oov[i - size] for i in ids if i > STOP]

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"words": self.vocabulary.words, "max_source": self.max_source, "max_target": self.max_target}


def collate(examples: Sequence[Example]) -> Batch:
    """Pads examples to the longest: the arguments of the model's forward.

    Returns:
        source_ids (B,S), source_extended (B,S) with -1 as padding, source_lengths (B,), target_inputs (B,T),
        targets (B,T) with -100 as padding; all int64.
    """
    return {
        "source_ids": _padded([e.source for e in examples], PAD),
        "source_extended": _padded([e.extended for e in examples], ABSENT),
        "source_lengths": torch.tensor([len(e.source) for e in examples]),
        "target_inputs": _padded([e.inputs for e in examples], PAD),
        "targets": _padded([e.targets for e in examples], IGNORE),
    }


def collate_indexed(examples: Sequence[Example]) -> Batch:
    """`collate`, and index (B,): which examples these are, for what no tensor can hold."""
    return {**collate(examples), "index": torch.tensor([e.index for e in examples])}


def _padded(rows: Sequence[np.ndarray], padding: int) -> torch.Tensor:
    out = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
