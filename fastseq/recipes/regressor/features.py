"""How the regressor's columns become numbers.

Letters: N numeric columns, C categorical ones, M multi-valued ones (bags).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.models.text_regressor import ABSENT
from fastseq.recipes import table
from fastseq.recipes.encoders import TextEncoder
from fastseq.recipes.feature_cache import Arrays, ragged
from fastseq.recipes.regressor.data import Columns, category, number, values

UNKNOWN = 0
"""The id of a category that training has not seen often enough."""

FEWEST = 5
"""Rows of the training set that a category must be in to have an id."""

MOST = 200
"""Values of one bag that are read."""

FORMAT = 1
"""Of the encoding: another number where the same columns give other arrays."""


@dataclass
class Features:
    """How columns become numbers; fitted to a training set.

    Attributes:
        columns: by what is made of them.
        means: of each numeric column, of the signed logarithms of what is there.
        deviations: their standard deviations.
        categories: of each categorical column, its values in the order of their ids, which follow `UNKNOWN`.
        bag_size: ids of bags; values are hashed into them.
        center: mean of the targets' logarithms.
        scale: their standard deviation.
    """

    columns: Columns
    means: list[float]
    deviations: list[float]
    categories: list[list[str]]
    bag_size: int
    center: float
    scale: float

    @classmethod
    def fit(cls, rows: Sequence[table.Row], columns: Columns, bag_size: int) -> Features:
        """Looks at a training set; the arguments are as of the class."""
        numbers = _signed_log(np.array([[number(row, name) for name in columns.numeric] for row in rows]))
        there = ~np.isnan(numbers)
        count = np.maximum(1, there.sum(0))
        means = np.where(there, numbers, 0).sum(0) / count
        deviations = np.sqrt((np.where(there, numbers - means, 0) ** 2).sum(0) / count)
        categories = []
        for name in columns.categorical:
            counts = Counter(category(row, name) for row in rows)
            categories.append(sorted(value for value, n in counts.items() if n >= FEWEST))
        target = np.log([number(row, columns.target) for row in rows])
        scale = float(target.std()) or 1.0
        deviations = np.where(deviations > 0, deviations, 1.0)
        return cls(columns, means.tolist(), deviations.tolist(), categories, bag_size, float(target.mean()), scale)

    @property
    def width(self) -> int:
        """Numbers that the numeric columns become: each one, and whether it is missing."""
        return 2 * len(self.columns.numeric)

    @property
    def category_sizes(self) -> list[int]:
        """Ids in each categorical column."""
        return [len(known) + 1 for known in self.categories]

    def numeric(self, rows: Sequence[table.Row]) -> np.ndarray:
        """(rows, 2N) float32: the signed logarithms, standardised and 0 where missing; and 1 where missing."""
        shape = (len(rows), len(self.columns.numeric))
        raw = np.array([[number(row, name) for name in self.columns.numeric] for row in rows]).reshape(shape)
        missing = np.isnan(raw)
        scaled = (_signed_log(raw) - self.means) / self.deviations
        return np.concatenate([np.where(missing, 0, scaled), missing], 1).astype(np.float32)

    def category_ids(self, rows: Sequence[table.Row]) -> np.ndarray:
        """(rows, C) int64."""
        out = np.zeros((len(rows), len(self.categories)), dtype=np.int64)
        for column, (name, known) in enumerate(zip(self.columns.categorical, self.categories, strict=True)):
            ids = {value: i for i, value in enumerate(known, start=UNKNOWN + 1)}
            out[:, column] = [ids.get(category(row, name), UNKNOWN) for row in rows]
        return out

    def bags(self, rows: Sequence[table.Row]) -> list[list[int]]:
        """The ids of each row's M bags, bag after bag."""
        return [self._hashed(name, values(row, name)) for row in rows for name in self.columns.bags]

    def _hashed(self, name: str, items: list[str]) -> list[int]:
        distinct = list(dict.fromkeys(items))[:MOST]
        # Not Python's own hash, which differs from run to run.
        return [zlib.crc32(f"{name}\t{item}".encode()) % (self.bag_size - 1) + ABSENT + 1 for item in distinct]

    def texts(self, rows: Sequence[table.Row]) -> list[str]:
        """The text of each row."""
        return ["\n".join(table.text_of(row, name) for name in self.columns.text) for row in rows]

    def arrays(self, rows: Sequence[table.Row], encoder: TextEncoder | None) -> Arrays:
        """What takes time to make, for a cache: ids of texts and of bags, and the numbers of the other columns."""
        ids, offsets = ragged(encoder(self.texts(rows)) if encoder is not None else [[] for _ in rows])
        bag_ids, bag_offsets = ragged(self.bags(rows))
        return {
            "ids": ids,
            "offsets": offsets,
            "bag_ids": bag_ids,
            "bag_offsets": bag_offsets,
            "numeric": self.numeric(rows),
            "categories": self.category_ids(rows),
        }

    @property
    def hash(self) -> str:
        """The sha256 of all of this."""
        return hashlib.sha256(json.dumps(self.to_plain()).encode("utf-8")).hexdigest()

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        columns = {
            key: value if isinstance(value, str) else list(value) for key, value in self.columns._asdict().items()
        }
        return {**self.__dict__, "columns": columns}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> Features:
        """Of what `to_plain` gave."""
        return cls(**{**state, "columns": Columns(**state["columns"])})


def _signed_log(numbers: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.sign(numbers) * np.log1p(np.abs(numbers))
    return result
