"""The classifier's data: texts with labels, and their encoding.

Letters: B texts, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastseq.recipes import table
from fastseq.recipes.encoders import Ragged, TextEncoder, padded
from fastseq.recipes.errors import DataError
from fastseq.recipes.feature_cache import cached
from fastseq.recipes.fetch import fetch
from fastseq.recipes.task import Batch

IGNORE = -100
"""The label of a text whose label training has not seen: it counts as wrong."""


class Example(NamedTuple):
    """A text's ids, (S,), and the id of its label."""

    ids: np.ndarray
    label: int


def read(name: str, files: Sequence[Path | None], text: str, label: str) -> table.Splits:
    """The splits of movie-snippets (10 % test, 5 % dev by a hash of the text), or three files ("table").

    Args:
        name: "movie-snippets" or "table".
        files: train, dev and test, for a table.
        text: the column with the text.
        label: the column with the label.

    Raises:
        DataError: a file or a column is missing.
    """
    if name == "table":
        return table.read_three(files, name, lambda row: (table.text_of(row, text), label_of(row, label)))
    rows = table.read(fetch(name), lambda row: (table.text_of(row, "text"), label_of(row, "label")))
    rows = [{text: row["text"], label: row["label"]} for row in rows]
    return table.split(rows, lambda row: str(row[text]), test=10, dev=5)


def label_of(row: table.Row, key: str) -> str:
    """The label of a row: a string, or a whole number as one.

    Raises:
        ValueError: it has none.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"the column {key!r} with a label is wanted (a string or a whole number), got {value!r}")
    return str(value)


def labels_of(rows: Sequence[table.Row], key: str) -> list[str]:
    """The labels of a training set, in the order of their ids.

    Raises:
        DataError: fewer than two.
    """
    labels = sorted({label_of(row, key) for row in rows})
    if len(labels) < 2:
        raise DataError(f"data.train: two labels or more are wanted, got {', '.join(labels)} alone")
    return labels


def examples(
    rows: Sequence[table.Row],
    text: str,
    label: str,
    labels: Sequence[str],
    encoder: TextEncoder,
    cache: tuple[Path | None, str, Mapping[str, object]],
    say: Callable[[str], object] = print,
) -> list[Example]:
    """Encodes rows.

    Args:
        rows: with a text and a label each.
        text: the column with the text.
        label: the column with the label.
        labels: in the order of their ids.
        encoder: gives ids.
        cache: the folder, the name and the key of the encoded texts, as of `cached`.
        say: gets a line where a cache could not be used.
    """
    folder, name, key = cache
    arrays = cached(folder, name, key, lambda: encoder.arrays([table.text_of(row, text) for row in rows]), say)
    ids = {value: i for i, value in enumerate(labels)}
    texts = Ragged(arrays["ids"], arrays["offsets"])
    return [Example(texts[i], ids.get(label_of(row, label), IGNORE)) for i, row in enumerate(rows)]


def collate(batch: Sequence[Example]) -> Batch:
    """Pads to the longest: input_ids (B,S), attention_mask (B,S), labels (B,)."""
    ids, mask = padded([example.ids for example in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([example.label for example in batch])}
