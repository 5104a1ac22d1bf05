"""``fastseq profile``, from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastseq import cli


def call(*arguments: str, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), ["profile", *arguments])
    assert result.exit_code == wanted, result.output
    return result.output


def test_tagger(tiny: list[str], tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "p.json"), "--trace", str(tmp_path / "t.json")]
    output = call("tagger", *tiny, "--steps", "3", "train.clip=1.0", *files)
    assert "fastseq profile tagger" in output
    figures = json.loads((tmp_path / "p.json").read_text())
    names = [phase["name"] for phase in figures["phases"]]
    assert names[0] == "data loading"
    assert {"decoder (CRF)", "gradient clipping", "optimizer"} <= set(names)
    assert sum(phase["ms"] for phase in figures["phases"]) == pytest.approx(figures["step_ms"])
    assert not any("fastseq.patch" in said for said in figures["advice"])  # there is nothing left to patch
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event["name"] == "Tagger (Tagger)" for event in events) == 2 * 3  # two batches an update, three updates
    assert not (tmp_path / "run").exists()


def test_plain_tagger_is_told_of_its_crf(tiny: list[str]) -> None:
    output = call("tagger", "--plain", *tiny, "--steps", "2", "train.batch_size=8").replace("\n", " ")
    assert "fastseq profile tagger --plain" in output
    assert "decoder (torchcrf.CRF): " in output
    assert "of a batch's positions are padding" in output


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_classifier(tmp_path: Path, tiny_encoder: Path, quiet: list[str], plain: list[str]) -> None:
    rows = [{"text": "good film " * (1 + 6 * (i % 2)), "label": "ab"[i // 2 % 2]} for i in range(40)]
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"run_dir={tmp_path / 'run'}",
        "data.name=table",
        *[f"data.{part}={tmp_path / part}.jsonl" for part in ("train", "dev", "test")],
        f"model.encoder.checkpoint={tiny_encoder}",
        "model.encoder.max_length=16",
        "train.batch_size=8",
        *quiet,
    ]
    output = call("classifier", *plain, *settings, "--steps", "2")
    assert "layer.*" in output or "text" in output  # as deep as the time is worth
    assert ("of a batch's positions are padding" in output.replace("\n", " ")) == bool(plain)
    assert ("fastseq.patch(model)" in output) == bool(plain)


def test_errors_are_one_line(tiny: list[str]) -> None:
    assert "recipe: one of tagger" in call("parser", wanted=1)
    output = call("tagger", *tiny, "--trace", "/no/such/folder/t.json", wanted=1)
    assert output == "fastseq: --trace: a file in a folder that exists is wanted, got '/no/such/folder/t.json'\n"
