"""IDX files: MNIST's four, whatever they are called and packed, their errors, and fashion-mnist's package."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastseq.recipes import debian, fetch
from fastseq.recipes.errors import DataError, FetchError
from fastseq.recipes.image.idx import FASHION, idx_array, read_idx
from fastseq.recipes.sources import SOURCES, DebianSource

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def save(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, packed: bool = True) -> None:
    for what, array in (("images", images), ("labels", labels)):
        name, data = f"{part}-{what}-idx{array.ndim}-ubyte", idx(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    images = RNG.integers(0, 256, (200, 5, 4), dtype=np.uint8)
    images[50:60] = images[40]  # the same image ten times more
    save(tmp_path, "train", images, np.arange(200) % 3)
    save(tmp_path, "t10k", images[:8] // 2, np.arange(8), packed=False)
    return tmp_path


def test_the_files_of_mnist(mnist: Path) -> None:
    splits = read_idx(mnist)
    assert splits.names == ["0", "1", "2"]
    assert [example.label for example in splits.test] == [0, 1, 2] + [-100] * 5  # classes that training has not seen
    assert splits.train.shape == (5, 4, 1)
    assert len(splits.train) + len(splits.dev) == 200
    assert 1 <= len(splits.dev) <= 30
    train, dev, again = ([example.pixels.tobytes() for example in part] for part in (*splits[:2], read_idx(mnist).dev))
    assert not {*train} & {*dev}
    assert dev == again


def test_colours_and_other_names(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
    save(tmp_path, "emnist-letters-train", images, np.arange(100) % 2)
    save(tmp_path, "emnist-letters-test", images[:4], np.arange(4) % 2)
    splits = read_idx(tmp_path, FASHION)
    np.testing.assert_array_equal([example.pixels for example in splits.test], images[:4])
    assert splits.names == list(FASHION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-3], "24 values of .* are wanted, got 2"),
        (lambda data: data + b"x", "24 values of .* are wanted, got 2"),
        (lambda data: b"\0\0\x0d" + data[3:], "an IDX file of unsigned bytes is wanted .*got 00 00 0d 03"),
        (lambda data: b"", "an IDX file of unsigned bytes is wanted"),
        (lambda data: data[:9], "an IDX file of unsigned bytes is wanted"),
        (lambda data: gzip.compress(data)[:-9], "cannot be read"),
        (lambda data: gzip.compress(data)[:12] + b"x" * 40, "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(change(idx(np.zeros((2, 3, 4)))))
    with pytest.raises(DataError, match=f"{path}: {message}"):
        idx_array(path)


def test_files_that_do_not_fit(mnist: Path) -> None:
    with pytest.raises(DataError, match=r"one file like train-images-idx3-ubyte.gz is wanted, got none"):
        read_idx(mnist / "none")
    save(mnist, "t10k", np.zeros((4, 5, 5)), np.zeros(4), packed=False)
    with pytest.raises(DataError, match=r"images of one shape are wanted, got \(5, 4, 1\) and \(5, 5, 1\)"):
        read_idx(mnist)
    save(mnist, "t10k", np.zeros((4, 5, 4)), np.zeros(3), packed=False)
    with pytest.raises(DataError, match=r"with N labels are wanted, got \(4, 5, 4\) with labels of \(3,\)"):
        read_idx(mnist)
    save(mnist, "t10k", np.zeros((4, 5, 4)), np.zeros(4))
    with pytest.raises(DataError, match=r"wanted, got t10k-images-idx3-ubyte, t10k-images-idx3-ubyte.gz"):
        read_idx(mnist)
    (mnist / "t10k-images-idx3-ubyte.gz").unlink()
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    save(mnist, "train", np.zeros((4, 5, 4)), np.arange(4))
    with pytest.raises(DataError, match="4 training images are too few to part"):
        read_idx(mnist)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of Debian with two files, of which one is wanted; returns it."""
    if shutil.which("dpkg-deb") is None or not debian.CAT.exists():
        pytest.skip("needs Debian's tools")
    tree = tmp_path / "tree"
    inside = tree / "usr" / "share" / "toy-images"
    inside.mkdir(parents=True)
    (inside / "a.txt").write_text("a")
    (inside / "b.txt").write_text("b")
    (tree / "DEBIAN").mkdir()
    fields = "Package: toy-images\nVersion: 1\nArchitecture: all\nMaintainer: M <m@example.org>\nDescription: a toy\n"
    (tree / "DEBIAN" / "control").write_text(fields)
    package = tmp_path / "toy-images_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(package)], check=True, capture_output=True)
    shutil.rmtree(tree)
    files = {"a.txt": hashlib.sha256(b"a").hexdigest()}
    source = DebianSource("toy-images", "toy", "usr/share/toy-images", files, "a toy")
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(SOURCES, "toy", source)
    return package


def test_files_of_a_package_of_debian(toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = list[list[str]]()

    def apt(command: list[str], lists: Path, *options: str, into: Path | None = None) -> str:
        commands.append(command)
        if command[1] == "download":
            assert into is not None
            shutil.copy(toy, into)
        return ""

    monkeypatch.setattr(debian, "_apt", apt)
    folder = fetch.fetch("toy")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a.txt": "a"}
    assert fetch.fetch("toy") == folder
    assert [command[1] for command in commands] == ["update", "download"]  # once
    (folder / "a.txt").write_text("x")
    with pytest.raises(FetchError, match=r"a.txt \(delete it to fetch it again\): sha256"):
        fetch.fetch("toy")
    (folder / "a.txt").unlink()
    toy.write_bytes(b"no package")
    with pytest.raises(FetchError, match="toy-images: dpkg-deb could not open it"):
        fetch.fetch("toy")


def test_an_installed_package_is_used(toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "installed"
    inside.mkdir()
    (inside / "a.txt").write_text("a")
    source = SOURCES["toy"]
    assert isinstance(source, DebianSource)
    place = str(inside).lstrip("/")
    monkeypatch.setitem(SOURCES, "toy", DebianSource("toy-images", "toy", place, source.files, "a toy"))
    assert fetch.fetch("toy") == inside
