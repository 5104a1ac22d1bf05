"""Encoded features come from the cache only if they are whole and of what is asked for."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastseq.recipes import feature_cache
from fastseq.recipes.feature_cache import cached, file_hash, ragged

KEY = {"data": "abc", "settings": {"max_length": 8}}


class Maker:
    """Makes arrays, and counts how often."""

    def __init__(self) -> None:
        self.calls, self.said = 0, list[str]()

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"ids": np.arange(50, dtype=np.int32), "numeric": np.ones((2, 3), dtype=np.float32)}

    def get(self, folder: Path | None, key: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        return cached(folder, "toy-train", key or KEY, self, self.said.append)


def files(folder: Path) -> tuple[Path, Path]:
    (arrays,) = folder.glob("*.npz")
    return arrays, arrays.with_suffix(".json")


def assert_made_anew(maker: Maker, folder: Path, message: str) -> None:
    calls = maker.calls
    np.testing.assert_array_equal(maker.get(folder)["ids"], np.arange(50))
    assert maker.calls == calls + 1
    assert message in maker.said[-1]
    maker.get(folder)  # and the new one is good
    assert maker.calls == calls + 1


def test_kept_and_read_again(tmp_path: Path) -> None:
    maker, folder = Maker(), tmp_path / "cache"
    first, second = maker.get(folder), maker.get(folder)
    assert maker.calls == 1
    assert maker.said == []
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert array.dtype == second[name].dtype
    arrays, about = files(folder)
    assert json.loads(about.read_text())["sha256"] == file_hash(arrays)
    assert {file.name for file in folder.iterdir()} == {arrays.name, about.name}  # nothing temporary


def test_a_large_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "MAPPED", 0)
    arrays = {"bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "fortran": np.ones((5, 2)).T, "one": np.array(7)}
    for _ in range(2):  # made, and read again
        found = cached(tmp_path, "toy", KEY, lambda: arrays, print)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert isinstance(found[name], np.memmap)
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    maker = Maker()
    maker.get(None)
    maker.get(None)
    assert maker.calls == 2


def test_a_torn_or_changed_file_is_made_anew(tmp_path: Path) -> None:
    maker = Maker()
    maker.get(tmp_path)
    arrays, about = files(tmp_path)
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-9])
    assert_made_anew(maker, tmp_path, f"has {len(whole) - 9} bytes, not {len(whole)}")
    flipped = bytearray(whole)
    flipped[whole.index(np.arange(50, dtype=np.int32).tobytes()) + 4] ^= 1
    arrays.write_bytes(flipped)
    assert_made_anew(maker, tmp_path, "the checksum of")
    about.unlink()  # a kill between the two
    assert_made_anew(maker, tmp_path, "cannot be used (FileNotFoundError")
    about.write_text("{")
    assert_made_anew(maker, tmp_path, "cannot be used (JSONDecodeError")
    about.write_text("[]")
    assert_made_anew(maker, tmp_path, "cannot be used (TypeError")


def test_stale_files_are_named_and_deleted(tmp_path: Path) -> None:
    maker = Maker()
    maker.get(tmp_path)
    old, _ = files(tmp_path)
    mine = tmp_path / "toy-train-notes.npz"  # not one of ours: the name has no key
    mine.write_bytes(b"mine")
    maker.get(tmp_path, {**KEY, "settings": {"max_length": 16}})
    assert maker.calls == 2
    assert "is stale: settings.max_length: 8 -> 16; making it anew" in maker.said[0]
    assert not old.exists()
    assert not old.with_suffix(".json").exists()
    assert mine.exists()


def test_a_file_under_the_name_of_another_key_is_not_believed(tmp_path: Path) -> None:
    maker = Maker()
    maker.get(tmp_path)
    _, about = files(tmp_path)
    said = json.loads(about.read_text())
    about.write_text(json.dumps({**said, "key": {"data": "other"}}))
    assert_made_anew(maker, tmp_path, "is of another key")


class Trap:
    """Runs code when it is unpickled."""

    sprung = False

    def __reduce__(self) -> Any:
        return setattr, (Trap, "sprung", True)


def test_a_pickle_is_never_loaded_and_never_written(tmp_path: Path) -> None:
    maker = Maker()
    maker.get(tmp_path)
    arrays, about = files(tmp_path)
    with arrays.open("wb") as file:
        np.savez(file, ids=np.array([Trap()], dtype=object))
    state = {"bytes": arrays.stat().st_size, "sha256": file_hash(arrays)}
    about.write_text(json.dumps({**json.loads(about.read_text()), **state}))
    assert_made_anew(maker, tmp_path, "cannot be used (ValueError: Object arrays cannot be loaded")
    arrays.write_bytes(pickle.dumps(Trap()))
    state = {"bytes": arrays.stat().st_size, "sha256": file_hash(arrays)}
    about.write_text(json.dumps({**json.loads(about.read_text()), **state}))
    assert_made_anew(maker, tmp_path, "cannot be used (ValueError")
    assert not Trap.sprung
    with pytest.raises(TypeError, match="numbers are wanted, got objects in texts"):
        cached(tmp_path, "other", KEY, lambda: {"texts": np.array(["a", None])}, print)


def test_a_kill_while_writing_leaves_no_file_that_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()

    def die(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        maker.get(tmp_path)
    assert not list(tmp_path.glob("toy*"))
    monkeypatch.undo()
    maker.get(tmp_path)
    maker.get(tmp_path)
    assert maker.calls == 2


def test_ragged() -> None:
    ids, offsets = ragged([[3, 1], [], [2]])
    assert ids.tolist() == [3, 1, 2]
    assert offsets.tolist() == [0, 2, 2, 3]
