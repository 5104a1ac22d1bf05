"""The summarizer recipe: its settings, its scores, and a training from the outside."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastseq import cli
from fastseq.recipes import checkpoint, get, metrics
from fastseq.recipes.config import ConfigError, TrainConfig, load
from fastseq.recipes.loading import evaluation_batches, evaluation_sample
from fastseq.recipes.summarizer import data
from fastseq.recipes.summarizer.recipe import Config, Evaluate
from fastseq.recipes.task import Task
from fastseq.recipes.train import run

PACKAGE = "fastseq.recipes.summarizer"
CPU = torch.device("cpu")


def config(name: str | None = None, *overrides: str) -> Config:
    return load(Config, PACKAGE, None if name is None else Path(name), overrides)


# ---- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "bbc", "seed", "conservative", "aggressive"])
def test_every_preset_is_a_whole_configuration(name: str | None) -> None:
    found = config(name)
    assert found.run_dir == Path("runs") / ("summarizer" if name is None else f"summarizer-{name}")
    assert found.data.max_target <= found.data.max_source


def test_the_seeds_settings_and_its_plans() -> None:
    seed, conservative, aggressive = (config(name) for name in ("seed", "conservative", "aggressive"))
    assert (seed.model.embedding_dim, seed.model.hidden_size, seed.data.max_vocab) == (128, 256, 47500)
    assert (seed.model.chunk, seed.data.max_source, seed.data.max_target) == (128, 6 * 128, 192)
    assert (seed.train.batch_size, seed.train.accumulate) == (1, 16)
    assert (conservative.data, conservative.model) == (seed.data, seed.model)
    assert conservative.train.epochs < seed.train.epochs
    assert aggressive.data.max_source < seed.data.max_source
    assert aggressive.data.max_target < seed.data.max_target
    assert aggressive.data.max_vocab is not None
    assert aggressive.data.max_vocab < 47500


def test_a_run_has_a_name() -> None:
    named = config(None, "run_name=first")
    assert named.run_dir == Path("runs/first")
    assert Config.model_validate(named.model_dump(mode="json")) == named
    with pytest.raises(ConfigError, match=r"run_name: a name without slashes is wanted, got 'a/b'"):
        config(None, "run_name=a/b")
    with pytest.raises(ConfigError, match=r"run_name: .*string, got 3"):
        config(None, "run_name=3")


def test_evaluation_on_a_part_of_dev() -> None:
    examples = list(range(100))
    settings = TrainConfig(eval_batch_size=8, max_eval_batches=3)
    part = evaluation_sample(examples, settings, 0)
    assert len(part) == len(set(part)) == 24
    assert part == evaluation_sample(examples, settings, 0) != evaluation_sample(examples, settings, 1)
    assert evaluation_sample(examples, TrainConfig(), 0) is examples
    assert evaluation_sample(examples[:20], settings, 0) == examples[:20]


# ---- scores -----------------------------------------------------------------------------------------------------


def test_rouge() -> None:
    scores = metrics.rouge(["a small wild cat", "dogs"], ["the wild cats", "dog"])
    # Stems, so that "cats" is "cat": 2 of 3 words are in the reference's 4, and 1 of 2 pairs in its 3.
    assert scores == pytest.approx({"rouge1": (400 / 7 + 100) / 2, "rouge2": 20, "rougeL": (400 / 7 + 100) / 2})
    assert metrics.rouge([], []) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


class Told(torch.nn.Module):
    """Writes what it is told to, by the first word of the source."""

    def __init__(self, answers: dict[int, list[int]]) -> None:
        super().__init__()
        self.answers, self.settings = answers, []  # type: ignore[var-annotated]

    def summarize(self, ids: torch.Tensor, extended: torch.Tensor, lengths: torch.Tensor, **settings: Any) -> Any:
        self.settings.append(settings)
        return SimpleNamespace(ids=[self.answers[row[0]] for row in extended.tolist()])


def test_evaluation_matches_summaries_with_their_examples() -> None:
    encoder = data.Encoder([*data.SPECIAL, "the", "cat", "dog", "sees"], 9, 9)  # 8 words
    pairs = [
        data.Pair("the ocelot sees the lynx", "ocelot sees lynx"),  # 8 is ocelot, 9 is lynx
        data.Pair("cat sees it", "cat bites"),
        data.Pair("dog sees gnu and emu", "gnu"),
    ]
    examples = encoder.examples(pairs)
    task = Task(
        name="",
        model=torch.nn.Module(),
        train=[],
        dev=examples,
        test=[],
        collate=data.collate,
        length=lambda example: len(example.source),
        evaluate=Evaluate(encoder, examples, config(None, "decoding.min_steps=2"), 3),
        score="",
        collate_evaluation=data.collate_indexed,
    )
    model = Told({4: [8, 7, 9], 5: [5], 6: [9, 6]})
    found = task.evaluate(model, evaluation_batches(task, examples, CPU, 2))
    # The words that could be copied: ocelot, lynx and gnu; two are. Of 6 words written, 3 are not in the vocabulary.
    assert found["oov_copy_rate"] == pytest.approx(200 / 3)
    assert found["oov_share"] == pytest.approx(50)
    assert found["rouge1"] == pytest.approx((100 + 200 / 3 + 0) / 3)
    assert len(model.settings) == 2
    wanted = {"beam_size": 3, "max_steps": 20, "min_steps": 2, "length_penalty": 1.0, "no_repeat_ngram": 3}
    wanted["early_stopping"] = True
    assert model.settings[0] == wanted


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sentences whose summary is a name that no vocabulary has, and what it is the name of."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    settings = ["data.name=jsonl"]
    for part, count in (("train", 200), ("dev", 30), ("test", 30)):
        path, lines = folder / f"{part}.jsonl", []
        for _ in range(count):
            name = "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(4))
            kind = rng.choice(["library", "game", "tool"])
            text = {"source": f"{name} is a {kind} for you.", "target": f"{kind} {name}"}
            lines.append(json.dumps(text) + "\n")
        path.write_text("".join(lines), "utf-8")
        settings.append(f"data.{part}={path}")
    return settings


TINY = [
    "data.min_count=2",
    "data.max_target=5",
    "model.embedding_dim=12",
    "model.hidden_size=12",
    "model.dropout=0.1",
    "train.batch_size=8",
    "train.accumulate=2",
    "train.warmup_steps=2",
    "train.clip=1.0",
    "train.precision=fp32",
    "train.threads=1",
    "train.tensorboard=false",
    "train.progress=false",
]


def test_it_learns_to_copy(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quick = [
        "train.epochs=14",
        "train.lr=0.03",
        "train.accumulate=1",
        "train.eval_every=175",
        "train.max_eval_batches=1",
    ]
    command = ["train", "summarizer", f"run_dir={folder}", *files, *TINY, *quick]
    result = CliRunner().invoke(cli.app(), command)
    assert result.exit_code == 0, result.output
    scores = json.loads((folder / "test.json").read_text())
    assert scores["oov_copy_rate"] > 90
    assert scores["rouge2"] > 90
    text = "rabamimo is a game for you.\n\n"
    result = CliRunner().invoke(cli.app(), ["predict", "summarizer", str(folder)], input=text)
    assert result.output == "game rabamimo\n\n"


def test_a_stopped_run_goes_on_bit_for_bit(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism is the loop's, and test_resume.py kills it; here it is this recipe's state that must come back."""

    def train(folder: str) -> dict[str, Any]:
        settings = [f"run_dir={tmp_path / folder}", *files, *TINY, "train.epochs=2", "train.save_every=3"]
        run(config(None, *settings, "train.eval_every=9", "train.max_eval_batches=1"), get("summarizer").build)
        return checkpoint.load(tmp_path / folder / "last.pt")

    whole, save, count = train("whole"), checkpoint.save, 0

    def save_and_stop(*arguments: Any, **options: Any) -> None:
        nonlocal count
        save(*arguments, **options)
        count += 1
        if count in (2, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    stopped = train("stopped")
    assert stopped["position"] == whole["position"]
    for name, value in whole["model"].items():
        assert torch.equal(stopped["model"][name], value), name
    results = [(tmp_path / folder / "test.json").read_text() for folder in ("whole", "stopped")]
    assert results[0] == results[1]
