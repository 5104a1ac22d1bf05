"""Data of Debian's packages and of their index, by apt-get: no root, and nothing of the system's own is touched.

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
from collections.abc import Callable, Iterator
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


Make = Callable[[Iterator[dict[str, str]], dict[str, str]], list[dict[str, Any]]]
"""Rows of the packages' fields and of the descriptions by their MD5."""


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
    return _made(lists, make_pairs, "pairs")


def sizes(lists: Path) -> tuple[bytes, dict[str, Any]]:
    """Brings the index, and makes rows of what is known of a package and of the space that it takes when installed.

    Args:
        lists: a folder for apt-get's files.

    Returns:
        JSON lines with the keys of `make_sizes`; and what they come from, as plain values.

    Raises:
        FetchError: as of `descriptions`.
    """
    return _made(lists, make_sizes, "rows")


def download(package: str, folder: Path) -> Path:
    """Brings a package, which apt-get checks against the index that it brings first; installs nothing.

    Args:
        package: its name.
        folder: for apt-get's files, and the result.

    Returns:
        The tar archive of the package's files.

    Raises:
        FetchError: no apt-get, no network, or no such package.
    """
    _check()
    lists, cache = folder / "lists", folder / "cache"
    _update(lists, cache)
    _apt(["apt-get", "download", package], lists, f"Dir::Cache={cache}", into=folder)
    archive = folder / f"{package}.tar"
    with archive.open("wb") as file:
        found = sorted(folder.glob(f"{package}_*.deb"))
        result = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", *map(str, found)], stdout=file, stderr=subprocess.PIPE, check=False
        )
    if result.returncode:
        raise FetchError(f"{package}: dpkg-deb could not open it\n{_end(result.stderr.decode(errors='replace'))}")
    return archive


def _check() -> None:
    if shutil.which("apt-get") is None or not CAT.exists():
        raise FetchError("Debian's index: apt-get is wanted, of a Debian machine or container; there is none here")


def _made(lists: Path, make: Make, count: str) -> tuple[bytes, dict[str, Any]]:
    _check()
    with tempfile.TemporaryDirectory() as cache:
        _update(lists, Path(cache))
    packages, translations = _targets(lists)
    texts = {
        stanza["Description-md5"]: stanza["Description-en"]
        for stanza in stanzas(_cat(translations["filename"]))
        if "Description-en" in stanza and "Description-md5" in stanza
    }
    rows = make(stanzas(_cat(packages["filename"])), texts)
    if not rows:
        raise FetchError(f"Debian's index: no description in {packages['filename']}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    origin = {key: packages[key] for key in ("origin", "codename", "suite", "version", "component")}
    return text.encode("utf-8"), {**origin, "date": _release_date(packages), count: len(rows)}


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


RELATIONS = {
    "depends": "Depends",
    "pre_depends": "Pre-Depends",
    "recommends": "Recommends",
    "suggests": "Suggests",
    "enhances": "Enhances",
    "provides": "Provides",
    "breaks": "Breaks",
    "replaces": "Replaces",
    "conflicts": "Conflicts",
}
"""The fields of a package that list others, by their names in the rows of `make_sizes`."""

SMALLEST = 16
"""KiB; what is smaller holds no more than a changelog and a copyright file."""


def make_sizes(packages: Iterator[dict[str, str]], descriptions: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each package of 16 KiB or more that has a description: what its maintainers wrote of it, and its size.

    Returns:
        Of each: package, group (the source package), synopsis, description, section, priority, architecture,
        multi_arch, maintainer and version; the names that each field of `RELATIONS` lists, and tags; the counts of
        these as n_depends and so on; and installed_size in KiB. Neither the size of the archive file nor anything
        else that is known only of a built package is among them.
    """
    rows = []
    for package in packages:
        synopsis, _, body = descriptions.get(package.get("Description-md5", ""), "").partition("\n")
        description, size = _paragraphs(body), int(package.get("Installed-Size", "0"))
        if not description or size < SMALLEST:
            continue
        lists = {key: _names(package.get(field, "")) for key, field in RELATIONS.items()}
        lists["tags"] = [tag.strip() for tag in package.get("Tag", "").split(",") if tag.strip()]
        rows.append(
            {
                "package": package["Package"],
                "group": package.get("Source", package["Package"]).split()[0],
                "synopsis": synopsis.strip(),
                "description": description,
                **{key: package.get(key.replace("_", "-").title(), "") for key in PLAIN},
                **lists,
                **{f"n_{key}": len(names) for key, names in lists.items()},
                "installed_size": size,
            }
        )
    return rows


PLAIN = ("section", "priority", "architecture", "multi_arch", "maintainer", "version")


def _names(field: str) -> list[str]:
    """The names in a list of relations: each alternative counts, versions and architectures do not."""
    parts = (re.split(r"[\s(:\[]", part.strip())[0] for part in re.split(r"[,|]", field))
    return [name for name in parts if name]


def _paragraphs(body: str) -> str:
    """A description's body without its markup: paragraphs end at a dot alone, and are joined to a line each."""
    paragraphs = re.split(r"(?m)^\s*\.\s*$", body)
    return "\n".join(text for paragraph in paragraphs if (text := " ".join(paragraph.split())))


def _apt(command: list[str], lists: Path, *options: str, into: Path | None = None) -> str:
    settings = ["Acquire::Languages=en", f"Dir::State::lists={lists}", *options]
    line = [command[0], *(part for setting in settings for part in ("-o", setting)), *command[1:]]
    result = subprocess.run(line, capture_output=True, text=True, check=False, cwd=into)
    if result.returncode:
        raise FetchError(f"Debian's index: {' '.join(command[:2])} failed; is there a network?\n{_end(result.stderr)}")
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
                    raise FetchError(f"Debian's index: apt-get could not verify {packages['codename']}'s signature")
                return packages, other
    raise FetchError(
        "Debian's index: apt-get brought no index of Debian (origin Debian, component main) with English "
        "descriptions; is there a network, and is an archive of Debian among its sources?"
    )


def _cat(file: str) -> str:
    result = subprocess.run([str(CAT), "cat-file", file], capture_output=True, check=False)
    if result.returncode:
        raise FetchError(f"Debian's index: {file} could not be read\n{_end(result.stderr.decode(errors='replace'))}")
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
