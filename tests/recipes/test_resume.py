"""A killed run, started again, ends with the same weights as one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import random
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastseq.recipes import checkpoint, get
from fastseq.recipes.config import ConfigError, load
from fastseq.recipes.errors import CheckpointError
from fastseq.recipes.train import run

CHILD = Path(__file__).with_name("child.py")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastseq.recipes.tagger", "fastseq.recipes.train", "torch._dynamo"])


def settings(overrides: list[str]) -> Any:
    return load(get("tagger").Config, "fastseq.recipes.tagger", None, overrides)


def start(overrides: list[str], die_at_rename: int = 0) -> Any:
    """Trains in a process of its own; it kills itself before its n-th rename, if asked to."""
    values = {"overrides": overrides, "die_at_rename": die_at_rename}
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
    start(tiny_settings_of(conll, folder / "warm")).join()  # the first pays for the fork server's imports
    started = time.perf_counter()
    process = start(tiny_settings_of(conll, folder / "run"))
    process.join()
    assert process.exitcode == 0
    return folder / "run", time.perf_counter() - started


def test_killed_at_random_moments(tiny: list[str], tmp_path: Path, reference: tuple[Path, float]) -> None:
    folder, seconds = reference
    rng, kills = random.Random(1), 0
    while not (tmp_path / "run" / "test.json").exists():
        process = start(tiny)
        process.join(timeout=rng.uniform(0.2, 0.9) * seconds if kills < 4 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
    assert kills
    assert_same_run(folder, tmp_path / "run")


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

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]
