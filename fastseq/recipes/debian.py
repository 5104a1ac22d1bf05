"""Descriptions of packages from Debian's index, by apt-get: no root, and nothing of the system's own is touched.

apt-get brings the index of the archives that this machine is set up for, and checks it against their signatures. What
is in a suite changes with time, so that there is no fixed hash to compare with: which suite of which date it was, and
the hash of the file made of it, is written beside the file.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastseq.recipes.errors import FetchError

TARGET = (
    "created_by",
    "filename",
    "origin",
    "label",
    "component",
    "trusted",
    "codename",
    "suite",
    "version",
    "metakey",
)
CAT = Path("/usr/lib/apt/apt-helper")
"""Reads what apt has downloaded, whatever it is compressed with."""


def descriptions(lists: Path) -> tuple[bytes, dict[str, Any]]:
    """Brings the index, and makes pairs of a package's long description and its one-line synopsis.

    Args:
        lists: a folder for apt-get's files.

    Returns:
        JSON lines with the keys source, target and group (the source package), each pair once; and what they come
        from, as plain values.

    Raises:
        FetchError: no apt-get, no network, or no signed archive of Debian among those that apt-get knows.
    """
    if shutil.which("apt-get") is None or not CAT.exists():
        raise FetchError("debian-synopsis: apt-get is wanted, of a Debian machine or container; there is none here")
    with tempfile.TemporaryDirectory() as cache:
        _update(lists, Path(cache))
    packages, translations = _targets(lists)
    synopses = {
        stanza["Description-md5"]: stanza["Description-en"]
        for stanza in stanzas(_cat(translations["filename"]))
        if "Description-en" in stanza and "Description-md5" in stanza
    }
    pairs = make_pairs(stanzas(_cat(packages["filename"])), synopses)
    if not pairs:
        raise FetchError(f"debian-synopsis: no description in {packages['filename']}")
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    origin = {key: packages[key] for key in ("origin", "codename", "suite", "version", "component")}
    return text.encode("utf-8"), {**origin, "date": _release_date(packages), "pairs": len(pairs)}


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The paragraphs of an index as fields; the lines of a long one are parted by line ends."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t") and key:
                fields[key] += "\n" + line[1:]
            elif ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


def make_pairs(packages: Iterator[dict[str, str]], descriptions: dict[str, str]) -> list[dict[str, str]]:
    """Each description with its synopsis, once, in the order of the packages."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for package in packages:
        synopsis, _, body = descriptions.get(package.get("Description-md5", ""), "").partition("\n")
        source, target = _paragraphs(body), synopsis.strip()
        if source and target:
            group = package.get("Source", package["Package"]).split()[0]
            pairs.setdefault((source, target), {"source": source, "target": target, "group": group})
    return list(pairs.values())


def _paragraphs(body: str) -> str:
    """A description's body without its markup: paragraphs end at a dot alone, and are joined to a line each."""
    paragraphs = re.split(r"(?m)^\s*\.\s*$", body)
    return "\n".join(text for paragraph in paragraphs if (text := " ".join(paragraph.split())))


def _apt(command: list[str], lists: Path, *options: str) -> str:
    settings = ["Acquire::Languages=en", f"Dir::State::lists={lists}", *options]
    line = [command[0], *(part for setting in settings for part in ("-o", setting)), *command[1:]]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    if result.returncode:
        raise FetchError(f"debian-synopsis: {' '.join(command[:2])} failed; is there a network?\n{_end(result.stderr)}")
    return result.stdout


def _update(lists: Path, cache: Path) -> None:
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    _apt(["apt-get", "update", "--quiet"], lists, f"Dir::Cache={cache}")


def _targets(lists: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The first of Debian's own archives that apt-get has: its packages and their English descriptions."""
    output = _apt(["apt-get", "indextargets", "--format", "\t".join(f"$({key.upper()})" for key in TARGET)], lists)
    found = [dict(zip(TARGET, line.split("\t"), strict=False)) for line in output.splitlines()]
    found = [t for t in found if (t.get("origin"), t.get("label"), t.get("component")) == ("Debian", "Debian", "main")]
    for packages in found:
        for other in found:
            kinds = (packages["created_by"], other["created_by"])
            if kinds == ("Packages", "Translations") and packages["codename"] == other["codename"]:
                if {packages["trusted"], other["trusted"]} != {"yes"}:
                    raise FetchError(f"debian-synopsis: apt-get could not verify {packages['codename']}'s signature")
                return packages, other
    raise FetchError(
        "debian-synopsis: apt-get brought no index of Debian (origin Debian, component main) with English "
        "descriptions; is there a network, and is an archive of Debian among its sources?"
    )


def _cat(file: str) -> str:
    result = subprocess.run([str(CAT), "cat-file", file], capture_output=True, check=False)
    if result.returncode:
        raise FetchError(f"debian-synopsis: {file} could not be read\n{_end(result.stderr.decode(errors='replace'))}")
    return result.stdout.decode("utf-8", "replace")


def _release_date(packages: dict[str, str]) -> str:
    """The date that the archive's signed Release file gives, which apt keeps beside what it lists."""
    file = Path(packages["filename"])
    prefix = file.name.partition("_" + packages["metakey"].replace("/", "_"))[0]
    for name in ("InRelease", "Release"):
        release = file.with_name(f"{prefix}_{name}")
        if release.exists():
            found = re.search(r"(?m)^Date:\s*(.+)$", release.read_text("utf-8", "replace"))
            if found:
                return found[1].strip()
    return "unknown"


def _end(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-6:])
