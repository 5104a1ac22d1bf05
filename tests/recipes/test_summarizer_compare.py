"""The published loop is the same network, and the command that compares it with fastseq's."""

from __future__ import annotations

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastseq import cli
from fastseq.models import PointerGeneratorSummarizer
from fastseq.models.summarizer import ABSENT, IGNORE, PAD, START, STOP, UNK
from fastseq.recipes.checkpoint import save
from fastseq.recipes.compare.comparison import Comparison
from fastseq.recipes.compare.levers import plain_setup
from fastseq.recipes.config import load
from fastseq.recipes.summarizer.comparison import _trained
from fastseq.recipes.summarizer.phases import PHASES, Clock
from fastseq.recipes.summarizer.plain import PlainSummarizer
from fastseq.recipes.summarizer.recipe import Config, build

V = 20


def model(**options: Any) -> PointerGeneratorSummarizer:
    torch.manual_seed(0)
    return PointerGeneratorSummarizer(V, embedding_dim=6, hidden_size=5, **options)


def batch() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([11, 4, 1, 7])
    off = torch.arange(11) >= lengths[:, None]
    extended = torch.randint(4, V + 3, (4, 11)).masked_fill(off, ABSENT)
    targets = torch.cat([extended[:, :1], torch.randint(4, V, (4, 3)), torch.full((4, 1), STOP)], 1)
    targets[1, 2:] = IGNORE
    inputs = torch.cat([torch.full((4, 1), START), targets[:, :-1]], 1)
    return {
        "source_ids": torch.where(extended >= V, UNK, extended).masked_fill(off, PAD),
        "source_extended": extended,
        "source_lengths": lengths,
        "target_inputs": torch.where(inputs >= V, UNK, inputs).masked_fill(inputs < 0, PAD),
        "targets": targets,
    }


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"coverage": False}, {"label_smoothing": 0.1}])
def test_the_published_loop_is_the_same_network(options: dict[str, Any]) -> None:
    ours, b = model(**options).double(), batch()
    plain = PlainSummarizer(ours)
    losses = [module(**b) for module in (ours, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in ("embedding", "reduce_cell", "output", "combine", "gate", "query", "memory_projection"):
        one = ours.get_submodule(name if name in ("embedding", "reduce_cell") else f"decoder.{name}")
        for p, q in zip(one.parameters(), plain.get_submodule(name).parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(ours.decoder.score.grad, plain.score.weight.grad.flatten())  # type: ignore[union-attr]
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())


def test_the_published_search_finds_what_a_greedy_search_finds() -> None:
    ours, b = model().double().eval(), batch()
    plain = PlainSummarizer(ours).eval()
    for parameter in (ours.decoder.output.bias, plain.output.bias):  # it may write what ours never does
        parameter.data[:3] = -60
    sources = b["source_ids"], b["source_extended"], b["source_lengths"]
    found = plain.summarize(*sources, beam_size=1, max_steps=8)
    assert found == ours.summarize(*sources, beam_size=1, max_steps=8).ids
    wider = plain.summarize(*sources, beam_size=3, max_steps=8)
    assert [len(row) > 0 for row in wider] == [True] * 4


def test_a_model_that_does_not_copy_has_no_published_loop() -> None:
    with pytest.raises(ValueError, match="copy=False"):
        PlainSummarizer(model(copy=False))


def test_the_clock_is_in_one_phase_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    inner, outer = torch.nn.Identity(), torch.nn.Sequential()
    outer.append(inner)
    clock.watch(inner, "attention")
    clock.watch(outer, "decoder")
    clock.switch("loss")
    outer(torch.zeros(1))
    clock.switch(None)
    wanted = {"loss": 2, "decoder": 2, "attention": 1}
    assert clock.seconds == {**dict.fromkeys(PHASES, 0.0), **wanted}
    clock.reset()
    assert sum(clock.seconds.values()) == 0


# ---- the commands ---------------------------------------------------------------------------------------------------

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu") for b in ("ra", "si", "to")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of a run of a second on texts whose summary is in them: ``... called NAME ... does THING``."""
    folder, rng = tmp_path_factory.mktemp("summarizer"), random.Random(0)
    files = {}
    for part, count in (("train", 60), ("dev", 8), ("test", 8)):
        files[part] = folder / f"{part}.jsonl"
        with files[part].open("w", encoding="utf-8") as file:
            for i in range(count):
                name, thing = f"{rng.choice(WORDS)}{part}{i}", rng.choice(WORDS)
                filler = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
                source = f"{filler} called {name} it does {thing}"
                file.write(json.dumps({"source": source, "target": f"{name} does {thing}"}) + "\n")
    return [
        f"run_dir={folder / 'run'}",
        "data.name=jsonl",
        *[f"data.{part}={path}" for part, path in files.items()],
        "data.min_count=2",
        "data.max_target=5",
        "model.embedding_dim=8",
        "model.hidden_size=8",
        "train.batch_size=4",
        "train.epochs=1",
        "train.warmup_steps=2",
        "train.max_eval_batches=1",
        "train.precision=fp32",
        "train.threads=1",
        "train.tensorboard=false",
        "train.progress=false",
    ]


def call(*arguments: str, text: str | None = None, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), list(arguments), input=text)
    assert result.exit_code == wanted, result.output
    return result.output


def test_compare(tiny: list[str], tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    output = call("compare", "summarizer", *tiny, "--sentences", "24", *files)
    figures = json.loads((tmp_path / "c.json").read_text())
    names = [lever["name"] for lever in figures["levers"]]
    assert names[2:4] == ["+ fused decoder and loss", "+ length buckets"]
    assert names[4:] == ["+ fused optimizer", "+ freed memory kept"]
    assert all(lever["examples_per_s"] > 0 and lever["peak_bytes"] > 0 for lever in figures["levers"])
    assert figures["levers"][2]["ops"] < figures["levers"][0]["ops"] / 2
    plain, fast = figures["breakdown"]["plain"], figures["breakdown"]["fastseq"]
    assert list(plain) == list(fast) == list(PHASES)
    assert all(value > 0 for value in plain.values())
    assert [name for name, value in fast.items() if value is None] == ["attention", "pointer"]
    assert all(value is None or value > 0 for value in fast.values())
    assert figures["beam"]["texts"] == 8
    assert figures["beam"]["weights"].startswith("after ")
    assert figures["beam"]["rows"][0]["name"] == "published, one text at a time"
    assert all(row["seconds"] > 0 and 0 <= row["rouge1"] <= 100 for row in figures["beam"]["rows"])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "with decoder" in output
    assert "model.copying" in call("compare", "summarizer", *tiny, "model.copying=false", wanted=1)


def test_predict(tiny: list[str], tmp_path: Path) -> None:
    call("train", "summarizer", *tiny)
    folder = tiny[0].partition("=")[2]
    text = "kara called lotoxyz it does misi\n\nlosi called neraq it does puto\n"
    lines = call("predict", "summarizer", folder, text=text).split("\n")
    assert len(lines) == 4
    assert lines[0]
    assert lines[1] == ""
    found = [json.loads(line) for line in call("predict", "summarizer", folder, "--json", text=text).splitlines()]
    assert [item["summary"] for item in found] == lines[:3]
    assert found[1] == {"summary": "", "tokens": [], "copied": [], "source": []}
    assert found[0]["source"] == ["kara", "called", "lotoxyz", "it", "does", "misi"]
    for item in found:
        for copied in item["copied"]:
            assert item["source"][copied["source"]] == item["tokens"][copied["token"]] == copied["word"]
    config = load(Config, "fastseq.recipes.summarizer", None, tiny)
    compared = Comparison("summarizer", config, build, 12, unit="texts", plain="")
    ours = plain_setup(compared.task, config.train, partial(copy.deepcopy, compared.task.model))
    variant, weights = _trained(compared, config, ours)
    assert weights == f"of {folder}/best.pt"
    best = torch.load(Path(folder) / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, best[name]) for name, value in variant.model.state_dict().items())
    save(tmp_path / "best.pt", {"recipe": "tagger"})
    assert "best.pt of the recipe summarizer" in call("predict", "summarizer", str(tmp_path), wanted=1)
