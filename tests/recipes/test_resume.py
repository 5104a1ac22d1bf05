"""A killed run, started again, ends with the same weights as one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastseq.recipes import RECIPES, checkpoint, get
from fastseq.recipes.config import ConfigError, load
from fastseq.recipes.errors import CheckpointError, WriteError
from fastseq.recipes.train import run

CHILD = Path(__file__).with_name("child.py")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [*(f"{package}.recipe" for package in RECIPES.values()), "fastseq.recipes.train", "torch._dynamo"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "deberta_v2", "resnet")]
    + ["fastseq.integrations.transformers", "rouge_score.rouge_scorer", "seqeval.metrics", "PIL.PngImagePlugin"]
)
OTHERS = [name for name in RECIPES if name != "tagger"]


def settings(overrides: list[str]) -> Any:
    return load(get("tagger").Config, "fastseq.recipes.tagger", None, overrides)


def start(overrides: list[str], die_at_rename: int = 0, recipe: str = "tagger", file_limit: int | None = None) -> Any:
    """Trains in a process of its own, as child.py has it."""
    values = {"recipe": recipe, "overrides": overrides, "die_at_rename": die_at_rename, "file_limit": file_limit}
    process = CONTEXT.Process(target=runpy.run_path, args=(str(CHILD), values))
    process.start()
    return process


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """All that the runs left: last weights, optimizer, generators, best weights, test metrics, dev scores."""
    last = [checkpoint.load(folder / "last.pt") for folder in (a, b)]
    assert_same(*last)
    best = [checkpoint.load(folder / "best.pt") for folder in (a, b)]
    assert_same(best[0]["model"], best[1]["model"])
    assert (a / "test.json").read_text() == (b / "test.json").read_text()
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert [(line["step"], line["dev"]) for line in logs[0]] == [(line["step"], line["dev"]) for line in logs[1]]


@pytest.fixture(scope="module")
def reference(
    conll: dict[str, Path], tiny_settings_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """A run that was left alone, and how long it took."""
    folder = tmp_path_factory.mktemp("reference")
    return folder / "run", left_alone("tagger", tiny_settings_of(conll, folder / "run"))


def kill_and_resume(recipe: str, overrides: list[str], run_dir: Path, seconds: float, kills: int, seed: int) -> int:
    """Runs to the end, killed up to so many times on the way; how many times it was."""
    rng, killed = random.Random(seed), 0
    while not (run_dir / "test.json").exists():
        process = start(overrides, recipe=recipe)
        process.join(timeout=rng.uniform(0.2, 0.9) * seconds if killed < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
    return killed


def left_alone(recipe: str, overrides: list[str]) -> float:
    """Runs to the end, and tells how long that took."""
    start(overrides, die_at_rename=1, recipe=recipe).join()  # the first pays for the fork server's imports
    started = time.perf_counter()
    process = start(overrides, recipe=recipe)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def test_killed_at_random_moments(tiny: list[str], tmp_path: Path, reference: tuple[Path, float]) -> None:
    folder, seconds = reference
    assert kill_and_resume("tagger", tiny, tmp_path / "run", seconds, kills=4, seed=1)
    assert_same_run(folder, tmp_path / "run")


@pytest.mark.parametrize("recipe", OTHERS)
def test_every_recipe_survives_a_kill(recipe: str, small_run: Any, tmp_path: Path) -> None:
    seconds = left_alone(recipe, small_run(recipe, tmp_path / "whole"))
    overrides = small_run(recipe, tmp_path / "run")
    start(
        overrides, die_at_rename=14, recipe=recipe
    ).join()  # in the midst of its checkpoints, however slow the machine
    kill_and_resume(recipe, overrides, tmp_path / "run", seconds, kills=1, seed=2)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_kills(recipe: str, small_run: Any, tmp_path: Path) -> None:
    """A run is through after some kills; then another one begins, until there were twenty."""
    seconds = left_alone(recipe, small_run(recipe, tmp_path / "whole"))
    kills = number = 0
    while kills < 20:
        run_dir = tmp_path / str(number)
        kills += kill_and_resume(recipe, small_run(recipe, run_dir), run_dir, seconds, 20 - kills, seed=number)
        assert_same_run(tmp_path / "whole", run_dir)
        number += 1


def test_killed_at_every_kind_of_rename(tiny: list[str], tmp_path: Path, reference: tuple[Path, float]) -> None:
    for rename in (1, 3, 4, 5, 2):  # of the config, of last to previous, of last, of best
        process = start(tiny, die_at_rename=rename)
        process.join()
        assert process.exitcode == -9 or (tmp_path / "run" / "test.json").exists()
    process = start(tiny)
    process.join()
    assert process.exitcode == 0
    assert_same_run(reference[0], tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tiny: list[str], tmp_path: Path, reference: tuple[Path, float]
) -> None:
    start(tiny, die_at_rename=8).join()  # with last.pt and the one before it there
    last = tmp_path / "run" / "last.pt"
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    said: list[str] = []
    checkpoint.load_latest(last, said.append)
    assert any("going back to previous-last.pt" in line for line in said)
    # In a process of its own, as the reference: bits depend on processor modes that other tests' libraries may set.
    process = start(tiny)
    process.join()
    assert process.exitcode == 0
    assert_same_run(reference[0], tmp_path / "run")


def test_a_finished_run_says_so_and_another_configuration_is_refused(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*tiny, "train.max_steps=4"]
    first = run(settings(quick), get("tagger").build)
    capsys.readouterr()
    again = run(settings([*quick, "train.progress=false"]), get("tagger").build)
    assert again["f1"] == first["f1"]
    assert "complete" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"train.lr: 0.02 -> 0.5"):
        run(settings([*quick, "train.lr=0.5"]), get("tagger").build)


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert checkpoint.load_latest(path, print) is None
    for step in (1, 2):
        checkpoint.save(path, {"step": step, "weight": torch.arange(100.0)}, keep_previous=True)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(100.0).numpy().tobytes()) + 7] ^= 1  # one bit of one weight
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)
    warnings: list[str] = []
    state = checkpoint.load_latest(path, warnings.append)
    assert state is not None
    assert state["step"] == 1
    assert "previous-last.pt" in warnings[0]
    checkpoint.previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last.pt.*previous-last.pt"):
        checkpoint.load_latest(path, warnings.append)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"step": 1})

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(WriteError, match=r"best\.pt: could not be written \(disk full\)"):
        checkpoint.write_atomically(path, fail)
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(recipe: str, small_run: Any, tmp_path: Path) -> None:
    """No file may be larger than half of the first checkpoint; after that, the disk has room again."""
    overrides, run_dir = small_run(recipe, tmp_path / "run"), tmp_path / "run"
    start(overrides, die_at_rename=12, recipe=recipe).join()  # after its features are kept, and some checkpoints
    last = run_dir / "last.pt"
    before = last.read_bytes()
    process = start(overrides, recipe=recipe, file_limit=len(before) // 2)
    process.join()
    assert process.exitcode == 1
    error = (tmp_path / "run-error.txt").read_text()
    assert re.match(r"WriteError: .*\.pt: could not be written \(File too large\).*Free some space", error)
    assert last.read_bytes() == before
    assert checkpoint.load(last)["position"]["step"] > 0
    process = start(overrides, recipe=recipe)
    process.join()
    assert process.exitcode == 0


def test_a_run_directory_that_cannot_be_made(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, where the folder should be")
    with pytest.raises(WriteError, match=r"run: could not be written \(File exists\)"):
        run(settings(tiny), get("tagger").build)


def test_a_run_directory_of_something_else(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for text in ("epochs: [", "- 1", "model: {a: 1}", "\x00"):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(
            ConfigError, match=r"run_dir: .*config\.yaml is not a configuration that this version knows"
        ):
            run(settings(tiny), get("tagger").build)
