"""Rows of named columns, from a file of JSON lines or of comma-separated values."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastseq.recipes.errors import DataError

Row = dict[str, Any]
T = TypeVar("T")

csv.field_size_limit(1 << 24)  # a text may be longer than the module's 128 KiB


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turns the error of text that is not UTF-8 into one that names the file and the line.

    Raises:
        DataError: from a UnicodeDecodeError.
    """
    try:
        yield
    except UnicodeDecodeError:
        try:
            path.read_bytes().decode("utf-8")  # all of it, for the place in the file
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}:{line}: not UTF-8: {error.reason}") from None
        raise


def read(path: Path, check: Callable[[Row], object]) -> list[Row]:
    """Reads a table: ``.csv`` and ``.tsv`` files have a line of column names, any other holds a JSON object a line.

    Args:
        path: the file, in UTF-8.
        check: raises ValueError for a row that cannot be used.

    Raises:
        DataError: a row that is no row or that `check` refuses, or no row at all; with file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    rows = []
    values = _separated if path.suffix in (".csv", ".tsv") else _json_lines
    with decoding(path):
        for number, value in values(path):
            try:
                row = value if isinstance(value, dict) else parse(value)
                check(row)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: no row in it")
    return rows


def parse(line: str) -> Row:
    """The row of one line of JSON.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object is wanted, got {type(value).__name__}")
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _separated(path: Path) -> Iterator[tuple[int, Row]]:
    """A field that is missing at the end of a line is an error; an empty one is the empty string."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: {len(reader.fieldnames or [])} fields are wanted")
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def read_three(files: Sequence[Path | None], name: str, check: Callable[[Row], object]) -> Splits:
    """The three files of the configuration's data section, where ``data.name`` is `name`."""
    missing = [key for key, file in zip(Splits._fields, files, strict=True) if file is None]
    if missing:
        raise DataError(f"data.{missing[0]}: a file is wanted where data.name is {name}")
    return Splits(*(read(Path(str(file)), check) for file in files))


def split(rows: Sequence[Row], group: Callable[[Row], str], test: int, dev: int) -> Splits:
    """So many per cent of test and of dev, and the rest, by the sha1 of a row's group: groups are never parted."""
    splits = Splits([], [], [])
    for row in rows:
        part = int(hashlib.sha1(group(row).encode("utf-8")).hexdigest(), 16) % 100
        splits[2 if part < test else 1 if part < test + dev else 0].append(row)
    return splits


def text_of(row: Row, key: str) -> str:
    """A string of a row.

    Raises:
        ValueError: there is none, or one with half a character, which JSON can write.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"the column {key!r} with a string is wanted, got {value!r}")
    value.encode("utf-8")
    return value
