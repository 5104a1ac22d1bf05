"""The regressor's data: rows of columns, examples and batches.

Letters: B rows, S tokens of the longest text, N numeric columns, C categorical ones, M multi-valued ones (bags).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastseq.recipes import table
from fastseq.recipes.encoders import Ragged, padded
from fastseq.recipes.feature_cache import Arrays
from fastseq.recipes.fetch import fetch
from fastseq.recipes.task import Batch


class Columns(NamedTuple):
    """The names of a table's columns, by what is made of them."""

    target: str
    text: Sequence[str]
    numeric: Sequence[str]
    categorical: Sequence[str]
    bags: Sequence[str]

    def check(self, row: table.Row, target: bool = True) -> None:
        """Finds out whether a row can be encoded.

        Raises:
            ValueError: a column is missing or holds something else; names it.
        """
        for name in self.text:
            table.text_of(row, name)
        for name in self.numeric:
            number(row, name)
        for name in self.categorical:
            category(row, name)
        for name in self.bags:
            bag(row, name)
        if target:
            value = number(row, self.target)
            if not value > 0:
                raise ValueError(f"the column {self.target!r} with a positive number is wanted, got {value!r}")


def number(row: table.Row, name: str) -> float:
    """A number of a row, NaN where it is missing: nothing, null, the empty string or NaN.

    Raises:
        ValueError: it is something else, or there is no such column.
    """
    if name not in row:
        raise ValueError(f"the column {name!r} is missing; there are {', '.join(row) or 'none'}")
    value = row[name]
    if value is None or value == "":
        return math.nan
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.inf
    if math.isinf(result):
        raise ValueError(f"the column {name!r} with a number is wanted, got {value!r}")
    return result


def category(row: table.Row, name: str) -> str:
    """A category of a row as a string; what is missing is a category too.

    Raises:
        ValueError: it is a list or an object, or there is no such column.
    """
    if name not in row:
        raise ValueError(f"the column {name!r} is missing; there are {', '.join(row) or 'none'}")
    value = row[name]
    if isinstance(value, (list, dict)):
        raise ValueError(f"the column {name!r} with one category is wanted, got {value!r}")
    return "" if value is None else str(value)


WORD, DIGIT = re.compile(r"[^\W\d_]+|\d+"), re.compile(r"\d")


def bag(row: table.Row, name: str) -> list[str] | str:
    """The values of a bag as they are in the row; none where it is null.

    Raises:
        ValueError: it is neither a list of strings nor a string, or there is no such column.
    """
    if name not in row:
        raise ValueError(f"the column {name!r} is missing; there are {', '.join(row) or 'none'}")
    value = row[name]
    if value is None:
        return []
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError(f"the column {name!r} with a list of strings or a string is wanted, got {value!r}")


def values(row: table.Row, name: str) -> list[str]:
    """The values of a bag, one by one.

    They are a list's, each whole and up to its first digit (libboost1.74 is a libboost), or a string's words, of
    which the first and the last are marked as such too.
    """
    value = bag(row, name)
    if isinstance(value, list):
        return [*value, *(stem for item in value if (stem := DIGIT.split(item, maxsplit=1)[0]))]
    words = WORD.findall(value.lower())
    return [f"^{words[0]}", f"{words[-1]}$", *words] if words else []


def read(name: str, files: Sequence[Path | None], columns: Columns) -> table.Splits:
    """The splits of debian-size (5 % test, 5 % dev by a hash of the source package), or three files ("table").

    Raises:
        DataError: a file or a column is missing, or a target is not positive.
    """
    if name == "table":
        return table.read_three(files, name, columns.check)
    return table.split(table.read(fetch(name), columns.check), lambda row: str(row["group"]), test=5, dev=5)


class Example(NamedTuple):
    """One row as numbers.

    Attributes:
        ids: (S,) of its text.
        numeric: (2N,) float32.
        categories: (C,) int64.
        bags: the ids of its M bags.
        bag_lengths: (M,) of each.
        target: the natural logarithm.
    """

    ids: np.ndarray
    numeric: np.ndarray
    categories: np.ndarray
    bags: np.ndarray
    bag_lengths: np.ndarray
    target: float


class Examples:
    """The rows of arrays that `Features.arrays` made, as examples; read by index.

    Args:
        arrays: of the rows.
        targets: the natural logarithm of each row's target.
    """

    def __init__(self, arrays: Arrays, targets: np.ndarray) -> None:
        self.arrays, self.targets = arrays, targets
        self.texts = Ragged(arrays["ids"], arrays["offsets"])
        self.bags = (len(arrays["bag_offsets"]) - 1) // max(1, len(targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Example:
        ends = self.arrays["bag_offsets"][row * self.bags : (row + 1) * self.bags + 1]
        return Example(
            ids=self.texts[row],
            numeric=self.arrays["numeric"][row],
            categories=self.arrays["categories"][row],
            bags=self.arrays["bag_ids"][ends[0] : ends[-1]],
            bag_lengths=np.diff(ends),
            target=float(self.targets[row]),
        )


def collate(batch: Sequence[Example]) -> Batch:
    """Pads the texts to the longest: the arguments of the model's forward."""
    ids, mask = padded([example.ids for example in batch])
    lengths = np.concatenate([example.bag_lengths for example in batch])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "numeric": torch.from_numpy(np.stack([example.numeric for example in batch])),
        "categories": torch.from_numpy(np.stack([example.categories for example in batch])),
        "bag_ids": torch.from_numpy(np.concatenate([example.bags for example in batch]).astype(np.int64)),
        "bag_offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
        "targets": torch.tensor([example.target for example in batch], dtype=torch.float32),
    }
