"""Checkpoints that survive a kill at any moment: a file is either whole or not there.

A checkpoint is written beside its final name, flushed to the disk and renamed. The one before it is kept, so
that there is always a good one to go back to.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastseq.recipes.errors import CheckpointError, WriteError


def write_atomically(path: Path, write: Callable[[Path], object], keep_previous: bool = False) -> None:
    """Calls `write` with a temporary path and gives the file its name when it is whole and on the disk.

    Args:
        path: the file.
        write: writes it, to the path that it is given.
        keep_previous: the file of that name goes to ``previous-<name>`` first.

    Raises:
        WriteError: it could not be written; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if keep_previous and path.exists():
                path.replace(previous(path))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must reach the disk too
        finally:
            os.close(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's errors inside it into one that names the file, and what to do.

    Raises:
        WriteError: from an OSError.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path}: could not be written ({error.strerror or error}). What was there before is kept. Free some "
            "space, or mend the folder's permissions, and start again with the same settings: the run goes on from its "
            "last checkpoint"
        ) from error


def save(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Writes a checkpoint that ``torch.load(path, weights_only=True)`` reads.

    Args:
        path: the file.
        state: tensors and plain values.
        keep_previous: the file of that name goes to ``previous-<name>`` first.

    Raises:
        WriteError: it could not be written; the checkpoints that were there are still there.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # of a path torch.save would not say why it cannot be written
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch fails once more as it closes a file that could not be written
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_atomically(path, write, keep_previous)


def save_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"previous-{path.name}")


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        CheckpointError: there is none, or it is damaged (each record's checksum is verified).
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a fastseq checkpoint")
    return state


def load_best(path: Path, recipe: str) -> dict[str, Any]:
    """The weights that a finished or running training of a recipe has kept for prediction.

    Args:
        path: a run directory, or a checkpoint in it.
        recipe: the recipe's name.

    Raises:
        CheckpointError: it is not of that recipe, or is damaged.
    """
    state = load(path / "best.pt" if path.is_dir() else path)
    if state.get("recipe") != recipe:
        raise CheckpointError(f"{path}: not the best.pt of the recipe {recipe} (last.pt is for resuming)")
    return state


def load_latest(path: Path, warn: Callable[[str], object]) -> dict[str, Any] | None:
    """The checkpoint, or the good one before it if it is damaged, or None if there has been none.

    Raises:
        CheckpointError: there are checkpoints, and none is good.
    """
    candidates = [candidate for candidate in (path, previous(path)) if candidate.exists()]
    errors = []
    for candidate in candidates:
        try:
            state = load(candidate)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        for line in errors:
            warn(f"{line}; going back to {candidate.name}")
        return state
    if errors:
        raise CheckpointError("; ".join(errors))
    return None


def rng_state() -> dict[str, Any]:
    """The state of every generator that training may draw from, in forms that weights_only reads."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # what a recipe draws from
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of the one that the run is on
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` took."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
