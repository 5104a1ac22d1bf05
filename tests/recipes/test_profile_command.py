"""``fastseq profile``, from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastseq import cli


def call(*arguments: str, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), ["profile", *arguments])
    assert result.exit_code == wanted, result.output
    return result.output


def written(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The settings of data that has these rows in all its parts."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.{part}={file}" for part in ("train", "dev", "test")]


def test_tagger(tiny: list[str], tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "p.json"), "--trace", str(tmp_path / "t.json")]
    output = call("tagger", *tiny, "--steps", "3", "train.clip=1.0", *files)
    assert "fastseq profile tagger" in output
    figures = json.loads((tmp_path / "p.json").read_text())
    assert "decoder (CRF)" in {phase["name"] for phase in figures["phases"]}
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
    settings = [
        f"run_dir={tmp_path / 'run'}",
        "data.name=table",
        *written(tmp_path, rows),
        f"model.encoder.checkpoint={tiny_encoder}",
        "model.encoder.max_length=16",
        "train.batch_size=8",
        *quiet,
    ]
    output = call("classifier", *plain, *settings, "--steps", "2")
    assert "layer.*" in output or "text" in output  # as deep as the time is worth
    assert ("of a batch's positions are padding" in output.replace("\n", " ")) == bool(plain)
    assert ("fastseq.patch(model)" in output) == bool(plain)


def test_summarizer(tmp_path: Path, quiet: list[str]) -> None:
    rows = [{"source": f"x{i} is a tool for you", "target": f"tool x{i}"} for i in range(32)]
    files = written(tmp_path, rows)
    settings = ["data.name=jsonl", *files, "model.embedding_dim=8", "model.hidden_size=8", "train.batch_size=8", *quiet]
    output = call("summarizer", f"run_dir={tmp_path / 'run'}", *settings, "--steps", "2")
    assert "decoder (PointerGeneratorDecoder)" in output


def test_regressor(tmp_path: Path, tiny_encoder: Path, quiet: list[str]) -> None:
    rows = [{"name": "lib tool", "parts": i % 7, "size": 1 + i} for i in range(64)]
    sizes = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24"
    settings = [
        "data.name=table",
        *written(tmp_path, rows),
        *["data.target=size", "data.text=[name]", "data.numeric=[parts]", "data.categorical=[]", "data.bags=[]"],
        f"model.encoder={{tokenizer: {tiny_encoder}, max_length: 16, shape: {{model_type: deberta-v2, {sizes}}}}}",
        "train.batch_size=8",
        *quiet,
    ]
    output = call("regressor", f"run_dir={tmp_path / 'run'}", *settings, "--steps", "2", "--plain").replace("\n", " ")
    assert "(transformers.models.deberta_v2.modeling_deberta_v2.DebertaV2Model): " in output


def test_image(tmp_path: Path, quiet: list[str]) -> None:
    for i in range(40):
        folder = tmp_path / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), i).save(folder / f"{i}.png")
    shape = "model.shape={embedding_size: 8, hidden_sizes: [8, 8], depths: [1, 1]}"
    settings = ["data.name=folder", f"data.folder={tmp_path / 'pictures'}", shape, "train.batch_size=8", *quiet]
    output = call("image", f"run_dir={tmp_path / 'run'}", *settings, "--steps", "2")
    assert "Conv" in output


def test_errors_are_one_line(tiny: list[str]) -> None:
    assert "recipe: one of tagger" in call("parser", wanted=1)
    output = call("tagger", *tiny, "--trace", "/no/such/folder/t.json", wanted=1)
    assert output == "fastseq: --trace: a file in a folder that exists is wanted, got '/no/such/folder/t.json'\n"
