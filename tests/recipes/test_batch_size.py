"""A training that runs out of memory goes on, in smaller pieces and to the same end."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastseq.recipes import checkpoint
from fastseq.recipes.batch_size import Fitting, out_of_memory
from fastseq.recipes.config import TrainConfig
from fastseq.recipes.errors import RecipeError
from fastseq.recipes.loading import EpochBatches, Piece, Pieces, Shares
from fastseq.recipes.settings import make_accelerator
from fastseq.recipes.task import Task

JOBS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("jobs.py"))))
RUN = ["train.batch_size=12", "train.epochs=4", "train.accumulate=1", "train.eval_every=4", "train.save_every=1"]
FIND = "train.find_batch_size=true"


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "last.pt")


@pytest.mark.parametrize("recipe", ["summarizer", "regressor"])  # of words, and of rows with flat columns
def test_the_result_is_that_of_whole_batches(recipes: dict[str, list[str]], tmp_path: Path, recipe: str) -> None:
    config = [*recipes[recipe], *RUN]
    whole = JOBS.train(recipe, [*config, f"run_dir={tmp_path / 'whole'}"])
    pieces = JOBS.train(recipe, [*config, FIND, f"run_dir={tmp_path / 'pieces'}"], 0, {0: 4})
    assert pieces == pytest.approx(whole, abs=1e-3)
    one, other = last(tmp_path / "whole"), last(tmp_path / "pieces")
    assert (one["position"]["at_once"], other["position"]["at_once"]) == (None, 3)  # 12, 6, 3
    for name, value in one["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=0, atol=1e-5)


def test_a_resumed_run_knows_what_fits(recipes: dict[str, list[str]], tmp_path: Path) -> None:
    config = [*recipes["tagger"], *RUN, FIND, "model.dropout=0.3", "train.workers=1", "train.prefetch=2"]
    JOBS.train("tagger", [*config, f"run_dir={tmp_path / 'whole'}"], 0, {0: 5})
    stopped = [*config, f"run_dir={tmp_path / 'stopped'}"]
    JOBS.train("tagger", stopped, 5, {0: 5})
    assert last(tmp_path / "stopped")["position"]["at_once"] == 3
    JOBS.train("tagger", stopped)  # memory does not run out this time, and pieces stay as they were
    one, other = last(tmp_path / "whole")["model"], last(tmp_path / "stopped")["model"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_example_that_does_not_fit(recipes: dict[str, list[str]], tmp_path: Path) -> None:
    config = [*recipes["tagger"], *RUN, FIND, f"run_dir={tmp_path}"]
    with pytest.raises(RecipeError, match=r"train.find_batch_size: one example alone does not fit into memory"):
        JOBS.train("tagger", config, 0, {0: 0})
    assert last(tmp_path)["position"]["step"] == 2  # the last good one


def test_without_it_the_error_is_the_users(recipes: dict[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        JOBS.train("tagger", [*recipes["tagger"], *RUN, f"run_dir={tmp_path}"], 0, {0: 4})


def test_evaluation_in_smaller_batches(recipes: dict[str, list[str]], tmp_path: Path) -> None:
    sizes: list[int] = []
    fitting: list[int] = []  # of the evaluations once they fit: dev twice, and test

    def build(config: Any) -> Any:
        task = JOBS.get("tagger").build(config)
        answers = task.evaluate.answers
        dev, test = ([2] * (len(part) // 2) + [1] * (len(part) % 2) for part in (task.dev, task.test))
        fitting[:] = [*dev, *dev, *test]

        def remembering(model: torch.nn.Module, batch: Any) -> list[Any]:
            sizes.append(len(batch["tokens"]))
            if sizes[-1] > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
            found: list[Any] = answers(model, batch)
            return found

        task.evaluate.answers = remembering
        return task

    config = [*recipes["tagger"], *RUN, "train.eval_batch_size=5", "train.max_steps=5", f"run_dir={tmp_path}"]
    with pytest.raises(RuntimeError, match="allocate"):
        JOBS.run(JOBS.settings("tagger", [*config, f"run_dir={tmp_path / 'strict'}"]), build)
    sizes.clear()
    JOBS.run(JOBS.settings("tagger", [*config, FIND]), build)
    assert sizes == [5, 3, *fitting]  # the first evaluation has found out for all


def test_a_failed_try_leaves_no_trace() -> None:
    """Neither in gradients, nor in the statistics of batch normalisation."""
    model = torch.nn.BatchNorm1d(1)
    shares = Shares(EpochBatches(np.ones(4, dtype=np.int64), 4, 0, False), np.ones(4))
    pieces = Pieces(Task("", model, list(range(4)), [], [], collate, lambda _: 1, lambda *_: {}, ""))
    sizes = []

    def gradients(update: list[Piece]) -> torch.Tensor:
        for piece in update:
            sizes.append(len(piece.batch["x"]))
            model(piece.batch["x"]).square().sum().backward()
            if sizes[-1] > 2:
                raise torch.OutOfMemoryError
        return torch.tensor(1.0)

    fitting = Fitting(model, pieces, shares, make_accelerator(TrainConfig(device="cpu")))
    (share,) = next(iter(shares))
    assert fitting(gradients, pieces[[share]]) == 1
    assert sizes == [4, 2, 2]
    assert model.num_batches_tracked == 2
    assert model.weight.grad is not None
    assert abs(float(model.weight.grad[0]) - 8) < 1e-2  # twice the squares, of 4 examples and not of 8


def collate(examples: list[int]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(examples, dtype=torch.float32)[:, None]}


def test_what_an_error_says() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert out_of_memory(raised.value)
    with pytest.raises(MemoryError) as refused:
        np.empty(1 << 58, dtype=np.uint8)
    assert out_of_memory(refused.value)
    assert out_of_memory(RuntimeError("std::bad_alloc"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
