"""The regressor recipe, from the outside: train, predict, compare, the cache, and its errors."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastseq import cli
from fastseq.recipes import checkpoint, debian, get, metrics
from fastseq.recipes.config import ConfigError, load
from fastseq.recipes.regressor import data
from fastseq.recipes.regressor.features import FEWEST, Features
from fastseq.recipes.train import run

PACKAGE = "fastseq.recipes.regressor"
COLUMNS = data.Columns("size", ("name",), ("parts", "age"), ("kind",), ("needs", "name"))


def call(*arguments: str, text: str | None = None, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), list(arguments), input=text)
    assert result.exit_code == wanted, result.output
    return result.output


def rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Every column tells a part of the logarithm of the size."""
    found = []
    for _ in range(count):
        kind, parts, age = rng.choice("xyz"), rng.randint(0, 30), rng.choice([None, 2.0])
        name, need = rng.choice(["lib tool", "data", "the doc"]), rng.choice(["libc6", "perl"])
        size = math.exp({"x": 1, "y": 3, "z": 5}[kind] + parts / 10 + (name == "data") + 2 * (need == "perl"))
        row = {"name": name, "parts": parts, "age": age, "kind": kind, "needs": f"{need} base", "size": size}
        found.append(row)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two files of JSON lines and a CSV."""
    folder, rng = tmp_path_factory.mktemp("sizes"), random.Random(0)
    paths = {"train": folder / "train.jsonl", "dev": folder / "dev.jsonl", "test": folder / "test.csv"}
    for part, count in (("train", 240), ("dev", 32)):
        paths[part].write_text("".join(json.dumps(row) + "\n" for row in rows(rng, count)), "utf-8")
    with paths["test"].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["name", "parts", "age", "kind", "needs", "size"])
        writer.writeheader()
        writer.writerows(rows(rng, 32))
    return paths


@pytest.fixture(scope="module")
def settings(files: dict[str, Path], tiny_encoder: Path, quiet: list[str]) -> list[str]:
    """The settings of a run of two seconds."""
    relative = "relative_attention: true, position_buckets: 4, pos_att_type: [p2c, c2p], norm_rel_ebd: layer_norm"
    sizes = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24"
    return [
        "data.name=table",
        *[f"data.{part}={path}" for part, path in files.items()],
        "data.target=size",
        "data.text=[name]",
        "data.numeric=[parts, age]",
        "data.categorical=[kind]",
        "data.bags=[needs, name]",
        f"model.encoder={{tokenizer: {tiny_encoder}, max_length: 16, shape: {{model_type: deberta-v2, {sizes},"
        f" {relative}, share_att_key: true, max_position_embeddings: 32}}}}",
        "model.bag_size=64",
        "model.bag_dim=8",
        "model.hidden_size=32",
        "model.dropout=0.0",
        "train.epochs=12",
        "train.batch_size=16",
        "train.lr=0.02",
        "train.encoder_lr=0.005",
        "train.warmup_steps=5",
        *quiet,
    ]


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    output = call("train", "regressor", *settings, f"run_dir={folder / 'run'}", f"data.cache={folder / 'cache'}")
    assert "test: smape " in output
    return folder / "run"


def test_it_learns_and_keeps_the_lowest_error(trained: Path) -> None:
    assert json.loads((trained / "test.json").read_text())["smape"] < 40  # a constant has about 120
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["dev"]["smape"])
    assert checkpoint.load(trained / "best.pt")["step"] == best["step"]
    assert best["dev"]["smape"] < lines[0]["dev"]["smape"]


def test_predict(trained: Path) -> None:
    some = [{k: v for k, v in row.items() if k != "size"} for row in rows(random.Random(0), 3)]
    text = "".join(json.dumps(row) + "\n" for row in some)
    numbers = [float(line) for line in call("predict", "regressor", str(trained), text=text + "\n").splitlines()]
    found = [json.loads(line) for line in call("predict", "regressor", str(trained), "--json", text=text).splitlines()]
    assert [item["size"] for item in found] == pytest.approx(numbers, rel=1e-5)
    wanted = [row["size"] for row in rows(random.Random(0), 3)]
    assert metrics.smape(wanted, numbers)["smape"] < 60
    assert "line 2: not JSON" in call("predict", "regressor", str(trained), text=text[: text.index("\n") + 9], wanted=1)
    missing = call("predict", "regressor", str(trained), text='{"name": "data"}\n', wanted=1)
    assert "line 1: the column 'parts' is missing; there are name" in missing
    assert "best.pt of the recipe regressor" in call("predict", "regressor", str(trained / "last.pt"), wanted=1)


def test_the_cache_gives_the_same_weights_and_notices_other_data(
    settings: list[str], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(name: str, *more: str) -> dict[str, torch.Tensor]:
        short = [*settings, f"run_dir={tmp_path / name}", "train.max_steps=2", f"data.cache={tmp_path / 'cache'}"]
        config = load(get("regressor").Config, PACKAGE, None, [*short, *more])
        run(config, get("regressor").build)
        return dict(checkpoint.load(tmp_path / name / "best.pt")["model"])

    first, cached, uncached = weights("a"), weights("b"), weights("c", "data.cache=null")
    for other in (cached, uncached):
        assert all(torch.equal(first[name], value) for name, value in other.items())
    assert "feature cache" not in capsys.readouterr().out
    (torn,) = (tmp_path / "cache").glob("regressor-table-dev-*.npz")
    torn.write_bytes(torn.read_bytes()[:-1])
    less = tmp_path / "less.csv"
    less.write_text("".join(files["test"].read_text().splitlines(keepends=True)[:-1]))
    weights("d", f"data.test={less}")
    said = capsys.readouterr().out
    assert f"feature cache: {torn.name} has" in said
    assert "is stale: data: " in said
    assert said.count("making it anew") == 2


def test_without_text_or_with_switches_it_trains(settings: list[str], tmp_path: Path) -> None:
    columns = [*settings, "model.encoder=null", "train.max_steps=3", "model.loss=huber"]
    assert "test: smape" in call("train", "regressor", *columns, f"run_dir={tmp_path / 'a'}")
    line = json.dumps(rows(random.Random(1), 1)[0])
    assert float(call("predict", "regressor", str(tmp_path / "a"), text=line)) > 0
    text = ["data.numeric=[]", "data.categorical=[]", "data.bags=[]", "train.gradient_checkpointing=true"]
    more = [*text, "train.accumulate=2", "train.max_steps=3", "model.loss=l1", "train.precision=bf16"]
    assert "test: smape" in call("train", "regressor", *settings, *more, f"run_dir={tmp_path / 'b'}")
    no_encoder = call("compare", "regressor", *columns, wanted=1)
    assert "model.encoder: the comparison is of models that read a text, got null" in no_encoder


def test_compare(settings: list[str], tmp_path: Path) -> None:
    call("compare", "regressor", *settings, "--sentences", "32", "--json", str(tmp_path / "c.json"))
    figures = json.loads((tmp_path / "c.json").read_text())
    assert len(figures["levers"]) == 7
    (cached,) = (row for row in figures["around"] if row["name"] == "cached features")
    assert min(cached["before_seconds"], cached["after_seconds"]) > 0
    assert "DebertaV2Model" in figures["patched"][0]
    assert all(0 <= row["dev"]["smape"] <= 200 for row in figures["quality"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.loss=mse", r"model.loss: .*'smape', 'l1' or 'huber', got 'mse'"),
        ("model.bag_size=1", r"model.bag_size: .*greater than or equal to 2, got 1"),
        ("data.columns=[a]", r"data.columns: no such key; the keys here are name, train"),
        ("data.numeric=[1]", r"data.numeric.0: .*string, got 1"),
    ],
)
def test_configuration_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(get("regressor").Config, PACKAGE, None, [override])


def test_the_recipe_brings_one_without_an_encoder() -> None:
    fast = load(get("regressor").Config, PACKAGE, Path("fast"), [])
    assert fast.model.encoder is None  # type: ignore[attr-defined]
    assert fast.data.columns.target == "installed_size"  # type: ignore[attr-defined]


GOOD: dict[str, Any] = {"name": "a", "parts": 1, "age": None, "kind": "x", "needs": ["b"], "size": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": "many"}, "the column 'parts' with a number is wanted, got 'many'"),
        ({"parts": math.inf}, "the column 'parts' with a number is wanted, got inf"),
        ({"kind": ["x"]}, "the column 'kind' with one category is wanted"),
        ({"needs": [1]}, "the column 'needs' with a list of strings or a string is wanted"),
        ({"name": None}, "the column 'name' with a string is wanted, got None"),
        ({"size": 0}, "the column 'size' with a positive number is wanted, got 0.0"),
        ({"size": ""}, "the column 'size' with a positive number is wanted, got nan"),
    ],
)
def test_rows_that_cannot_be_used_say_why(change: dict[str, Any], message: str) -> None:
    COLUMNS.check(GOOD)
    with pytest.raises(ValueError, match=message):
        COLUMNS.check({**GOOD, **change})


def test_features() -> None:
    train = [{**GOOD, "parts": parts, "age": age} for parts, age in ((0, None), (math.e - 1, 5.0), (math.e - 1, ""))]
    train += [{**GOOD, "kind": "y"}] * FEWEST
    features = Features.fit(train, COLUMNS, bag_size=1000)
    assert features.categories == [["y"]]  # x is in too few rows
    numbers = features.numeric(train)
    raw = np.log1p([row["parts"] for row in train])
    np.testing.assert_allclose(numbers[:, 0], (raw - raw.mean()) / raw.std(), atol=1e-6)
    assert numbers[:3, 3].tolist() == [1, 0, 1]  # whether the age is missing
    assert numbers[0, 1] == 0
    assert features.category_ids([{**GOOD, "kind": k} for k in ("y", "x", "new")]).ravel().tolist() == [1, 0, 0]
    bags = features.bags([GOOD, {**GOOD, "needs": None}, {**GOOD, "needs": "B"}])
    assert [len(bag) for bag in bags] == [1, 3, 0, 3, 3, 3]
    assert bags[0][0] in bags[4]  # the word b
    assert bags[0] != bags[1][:1]  # the same string in another column is another value
    again = Features.from_plain(json.loads(json.dumps(features.to_plain())))
    assert again.to_plain() == features.to_plain()
    assert data.values({"n": ["libboost1.74", "libc"]}, "n") == ["libboost1.74", "libc", "libboost", "libc"]


def test_smape_is_the_formula() -> None:
    actual, predicted = [1.0, 10.0, 0.0, 4.0], [3.0, 10.0, 0.0, 0.0]
    wanted = (200 * 2 / 4 + 0 + 0 + 200) / 4
    assert metrics.smape(actual, predicted) == {"smape": wanted}
    assert metrics.smape([1e300], [1e-300])["smape"] == pytest.approx(200)


def test_debian_sizes() -> None:
    packages = [
        {"Package": "cat", "Source": "cats (1.2)", "Installed-Size": "40", "Description-md5": "1", "Section": "games"}
        | {"Architecture": "all", "Depends": "libc6 (>= 2.3), a | b [amd64],\n c:any", "Tag": "role::x, use::y"},
        {"Package": "small", "Installed-Size": "15", "Description-md5": "1"},
        {"Package": "silent", "Installed-Size": "99", "Description-md5": "2"},
    ]
    (row,) = debian.make_sizes(iter(packages), {"1": "a cat\n It\n purrs.\n .\n Loudly.", "2": "nothing more"})
    assert (row["package"], row["group"], row["installed_size"]) == ("cat", "cats", 40)
    assert (row["synopsis"], row["description"]) == ("a cat", "It purrs.\nLoudly.")
    assert row["depends"] == ["libc6", "a", "b", "c"]
    assert (row["n_depends"], row["n_suggests"], row["n_tags"], row["tags"]) == (4, 0, 2, ["role::x", "use::y"])
    config = load(get("regressor").Config, PACKAGE, None, [])
    config.data.columns.check(row)  # type: ignore[attr-defined]
    # Nothing is among them that only the finished package tells.
    wanted = {"package", "group", "synopsis", "description", *debian.PLAIN, *debian.RELATIONS, "tags", "n_tags"}
    assert set(row) == {*wanted, *(f"n_{name}" for name in debian.RELATIONS), "installed_size"}
