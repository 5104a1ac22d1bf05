"""Encoded features in a file, so that only a run's first start pays for the encoding.

A file is used only if it is whole and of the very data, tokenizer, settings and format that it is asked for; else it
is made again, and the reason is said. It holds numbers and no pickle: reading somebody else's runs no code.

    NAME-KEY.npz     the arrays (numpy, not compressed)
    NAME-KEY.json    what they are of, their size in bytes and their sha256; written last
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastseq.recipes.checkpoint import save_json, write_atomically
from fastseq.recipes.config import differences

FORMAT = 1
"""Of the files; another number is another key."""

MAPPED = 1 << 30
"""Bytes of a file from which on its arrays are read where they lie, since they may not fit into memory."""

Arrays = dict[str, np.ndarray]


def file_hash(path: Path) -> str:
    """The sha256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached(
    folder: Path | None, name: str, key: Mapping[str, Any], make: Callable[[], Arrays], say: Callable[[str], object]
) -> Arrays:
    """The arrays of a key: those in the folder if they are good, else those that `make` makes, which are then kept.

    Files of the same name with another key are stale, and are deleted.

    Args:
        folder: where the files are; None keeps nothing.
        name: of the features; the file names begin with it.
        key: plain values that the arrays are a function of, such as the hash of a data file.
        make: the arrays; numbers only.
        say: gets a line of text where files were there and could not be used.
    """
    if folder is None:
        return make()
    full = json.loads(json.dumps({"format": FORMAT, **key}))
    digest = hashlib.sha256(json.dumps(full, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    path = folder / f"{name}-{digest}.npz"
    arrays, reason = _read(path, full)
    if arrays is not None:
        return arrays
    stale = [other for other in sorted(folder.glob(f"{name}-*.npz")) if other != path and _is_ours(other, name)]
    if not reason and stale:
        reason = f"{stale[0].name} is stale: {_changes(stale[0], full)}"
    if reason:
        say(f"feature cache: {reason}; making it anew")
    arrays = make()
    _write(path, full, arrays)
    if path.stat().st_size >= MAPPED:
        arrays = _arrays(path)
    for other in stale:
        other.unlink(missing_ok=True)
        other.with_suffix(".json").unlink(missing_ok=True)
    return arrays


def _is_ours(path: Path, name: str) -> bool:
    digest = path.stem.removeprefix(f"{name}-")
    return len(digest) == 16 and set(digest) <= set("0123456789abcdef")


def _read(path: Path, key: dict[str, Any]) -> tuple[Arrays | None, str]:
    """The arrays, or the reason why there are none; the reason is empty where nothing is there."""
    if not path.exists():
        return None, ""
    try:
        about = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if about["key"] != key:
            return None, f"{path.name} is of another key"
        size = path.stat().st_size
        if size != about["bytes"]:
            return None, f"{path.name} has {size} bytes, not {about['bytes']}"
        if file_hash(path) != about["sha256"]:
            return None, f"the checksum of {path.name} is wrong"
        return _arrays(path), ""
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        return None, f"{path.name} cannot be used ({type(error).__name__}: {error})"


def _arrays(path: Path) -> Arrays:
    """The arrays of a file, in memory or, of a large one, mapped into it."""
    if path.stat().st_size < MAPPED:
        with np.load(path, allow_pickle=False) as file:
            return dict(file.items())
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        return {info.filename.removesuffix(".npy"): _mapped(file, info) for info in archive.infolist()}


def _mapped(file: BinaryIO, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of the archive, which is stored in it as the .npy file that it is."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(info.header_offset + 30 + name + extra)
    np.lib.format.read_magic(file)  # 1.0: only structured arrays have another
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _write(path: Path, key: dict[str, Any], arrays: Arrays) -> None:
    wrong = [name for name, array in arrays.items() if array.dtype.hasobject]
    if wrong:
        raise TypeError(f"arrays: numbers are wanted, got objects in {', '.join(wrong)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)  # no description of a file that is being replaced
    about: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a path would get the ending .npz
            np.savez(file, allow_pickle=False, **arrays)
        about.update(key=key, bytes=temporary.stat().st_size, sha256=file_hash(temporary))

    write_atomically(path, write)
    save_json(path.with_suffix(".json"), about)


def _changes(path: Path, key: dict[str, Any]) -> str:
    try:
        old = json.loads(path.with_suffix(".json").read_text("utf-8"))["key"]
        return "; ".join(differences(old, key)) or "nothing that is recorded"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "of what, nothing says"


def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one int32 array, and (N+1,) int64 offsets of the rows in it."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(offsets[-1]))
    return flat, offsets
