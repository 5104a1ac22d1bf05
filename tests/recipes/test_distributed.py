"""Several processes train what one trains: the same gradients, data and checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fastseq.recipes import checkpoint
from fastseq.recipes.config import ConfigError, TrainConfig
from fastseq.recipes.distributed import check, collected, share
from fastseq.recipes.loading import EpochBatches, Shares

JOBS = Path(__file__).with_name("jobs.py")
HERE = SimpleNamespace(**runpy.run_path(str(JOBS)))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastseq.recipes.train", "torch._dynamo", "transformers.models.bert.modeling_bert"])

Job = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Two processes of a group: ``pair(job, *arguments)`` gives what each has, with a traceback where it failed."""
    meeting, pipes, processes = tmp_path_factory.mktemp("group") / "store", [], []
    for rank in range(2):
        ours, theirs = CONTEXT.Pipe()
        values = {"place": (rank, 2, str(meeting)), "pipe": theirs}
        process = CONTEXT.Process(target=runpy.run_path, args=(str(JOBS), values), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def do(name: str, *arguments: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((name, arguments))
        answers = []
        for pipe in pipes:
            assert pipe.poll(120), "no answer"
            answers.append(pipe.recv())
        return answers

    yield do
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(20)
        process.kill()


def results(answers: list[Any]) -> list[Any]:
    """What both gave, if neither failed."""
    assert not any(trace for _, trace in answers), answers
    return [value for value, _ in answers]


NAMES = ["tagger", "summarizer", "classifier", "regressor", "image"]


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Tensors or arrays by name, each to so much of its largest value, or of 1 where that is less."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        wanted = np.asarray(value)
        bound = tolerance * max(1.0, float(abs(wanted).max(initial=0)))
        np.testing.assert_allclose(np.asarray(other[name]), wanted, rtol=0, atol=bound, err_msg=name)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", NAMES)
def test_two_processes_give_the_gradients_of_one(pair: Job, recipes: dict[str, list[str]], recipe: str) -> None:
    config = [*recipes[recipe], "run_dir=unused"]
    one = HERE.gradients(recipe, config)
    sizes = [len(batch) for batch in EpochBatches(np.ones(13, dtype=np.int64), 4, 0, True).plan(0)]
    assert sorted(sizes) == [1, 4, 4, 4]  # so that a process goes without an example
    kinds = [[], ["train.fsdp=true"]] if recipe in ("classifier", "regressor") else [[]]
    for kind in kinds:
        for two in results(pair("gradients", recipe, [*config, *kind])):
            assert len(two) == len(one) == 2
            for mine, theirs in zip(one, two, strict=True):
                assert_close(mine, theirs, 1e-6)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(recipes: dict[str, list[str]]) -> None:
    """Also where a batch has more words than another."""
    config = [*recipes["summarizer"], "run_dir=unused", "train.buckets=false"]
    small = HERE.gradients("summarizer", config)
    large = HERE.gradients("summarizer", [*config, "train.batch_size=8", "train.accumulate=1"])
    for one, other in zip(small, large, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("recipe", NAMES)
def test_two_processes_share_an_evaluation(pair: Job, recipes: dict[str, list[str]], recipe: str) -> None:
    config = [*recipes[recipe], "run_dir=unused", "train.eval_batch_size=2"]
    alone, every = HERE.evaluation(recipe, config)
    kinds = [[], ["train.fsdp=true"]] if recipe in ("classifier", "regressor") else [[]]
    for kind in kinds:
        for metrics, given in results(pair("evaluation", recipe, [*config, *kind])):
            assert metrics == pytest.approx(alone, rel=1e-6)
            assert given == -(-every // 2) < every


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7, 8])
def test_what_is_dealt_out_comes_back_in_order(count: int) -> None:
    places = [SimpleNamespace(process_index=rank, num_processes=3) for rank in range(3)]
    shares = [share(place, range(count)) for place in places]
    assert {len(mine) for mine in shares} == {-(-count // 3)}

    def gather(into: list[Any], _: Any) -> None:
        into[:] = [[10 * item for item in mine] for mine in shares]

    with mock.patch("torch.distributed.all_gather_object", gather):
        assert [collected(place, [], count) for place in places] == [[10 * i for i in range(count)]] * 3


# ---- the data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_batches_are_dealt_out_evenly(buckets: bool, processes: int) -> None:
    rng = np.random.default_rng(0)
    lengths, weights = rng.integers(1, 60, 1003), rng.integers(1, 9, 1003).astype(float)
    batches = EpochBatches(lengths, 32, 3, buckets)
    every = [list(Shares(batches, weights, 2, rank, processes)) for rank in range(processes)]
    plan, cost = batches.plan(0), np.zeros(processes)
    for number, batch in enumerate(plan):
        shares = [mine[number][0] for mine in every]
        assert sorted(np.concatenate([s.indices for s in shares if s.part])) == sorted(batch)
        sizes = [len(share.indices) if share.part else 0 for share in shares]
        assert max(sizes) - min(sizes) <= 1
        cost += [len(share.indices) * lengths[share.indices].max() for share in shares]
        update = np.concatenate(plan[number - number % 2 : number - number % 2 + 2])
        assert sum(s.part for s in shares) == pytest.approx(weights[batch].sum() / weights[update].sum())
    even = 32 % processes == 0 and buckets
    assert cost.max() / cost.min() < (1.05 if even else 1.25)  # what each pays for, padding included
    padded = sum(len(batch) * lengths[batch].max() for batch in plan)
    assert cost.sum() <= padded * 1.02


def test_a_share_is_cut_into_equal_pieces() -> None:
    batches = EpochBatches(np.arange(1, 24), 23, 0, False)
    shares = Shares(batches, np.arange(23.0) + 1)
    (whole,) = next(iter(shares))
    assert whole.part == 1
    shares.at_once = 6
    pieces = next(iter(shares))
    assert [len(piece.indices) for piece in pieces] == [6, 6, 6, 5]
    assert np.concatenate([piece.indices for piece in pieces]).tolist() == whole.indices.tolist()
    assert sum(piece.part for piece in pieces) == pytest.approx(1)
    assert pieces[0].part == pytest.approx((pieces[0].indices + 1).sum() / (23 * 24 / 2))


# ---- runs ------------------------------------------------------------------------------------------------------------


RUN = ["train.epochs=3", "train.eval_every=3", "train.save_every=2", "train.accumulate=1"]  # 12 updates


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(folder / name)["model"]
    return found


def log(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], round(line["train_loss"], 4)) for line in lines]


@pytest.mark.parametrize("recipe", ["tagger", "classifier"])
def test_a_run_goes_on_with_another_number_of_processes(
    pair: Job, recipes: dict[str, list[str]], tmp_path: Path, recipe: str
) -> None:
    def config(name: str) -> list[str]:
        return [*recipes[recipe], *RUN, f"run_dir={tmp_path / name}"]

    alone = HERE.train(recipe, config("alone"))
    assert results(pair("train", recipe, config("more"), 6)) == [None, None]
    HERE.train(recipe, config("more"), 10)
    found = results(pair("train", recipe, config("more")))
    assert found == [alone, alone]
    assert_close(weights(tmp_path / "alone"), weights(tmp_path / "more"), 1e-5)
    assert [step for step, _ in log(tmp_path / "more")] == [3, 6, 9, 12]
    again = results(pair("train", recipe, config("more")))
    assert again[0] == again[1] == {**alone, "best_step": again[0]["best_step"]}  # as the run directory has it


def test_a_resumed_pair_ends_with_the_same_bits(pair: Job, recipes: dict[str, list[str]], tmp_path: Path) -> None:
    """With dropout: each process draws its own numbers, and after a checkpoint the same ones again."""
    config = [*recipes["tagger"], *RUN, "model.dropout=0.4"]
    results(pair("train", "tagger", [*config, f"run_dir={tmp_path / 'whole'}"]))
    stopped = [*config, f"run_dir={tmp_path / 'stopped'}"]
    for step in (5, 0):  # the checkpoint is of update 4
        results(pair("train", "tagger", stopped, step))
    one, other = (weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sharded_runs_leave_the_same_files(pair: Job, recipes: dict[str, list[str]], tmp_path: Path) -> None:
    def config(name: str, *more: str) -> list[str]:
        return [*recipes["classifier"], *RUN, f"run_dir={tmp_path / name}", "train.clip=0.5", *more]

    alone = HERE.train("classifier", config("alone"))
    sharded = config("sharded", "train.fsdp=true")
    results(pair("train", "classifier", sharded, 4))
    results(pair("train", "classifier", sharded, 8))
    kept = checkpoint.load(tmp_path / "sharded" / "last.pt")
    assert HERE.train("classifier", config("sharded")) == alone  # by one process, and without the setting
    whole = checkpoint.load(tmp_path / "alone" / "last.pt")
    for index, state in whole["optimizer"]["state"].items():
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in kept["optimizer"]["state"][index].items()
        }
    for name in ("last.pt", "best.pt"):
        assert_close(weights(tmp_path / "alone", name), weights(tmp_path / "sharded", name), 1e-5)


def test_the_pair_agrees_on_what_fits_into_memory(pair: Job, recipes: dict[str, list[str]], tmp_path: Path) -> None:
    """One of them has less, of which it finds out in the middle of the run."""
    config = [*recipes["summarizer"], *RUN, "train.batch_size=12", "train.find_batch_size=true"]
    alone = HERE.train("summarizer", [*config, f"run_dir={tmp_path / 'alone'}"])
    found = results(pair("train", "summarizer", [*config, f"run_dir={tmp_path / 'pair'}"], 0, {1: 3}))
    assert found == [alone, alone]
    assert_close(weights(tmp_path / "alone"), weights(tmp_path / "pair"), 1e-5)
    assert checkpoint.load(tmp_path / "pair" / "last.pt")["position"]["at_once"] == 3


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_first_process_ends_all(pair: Job, recipes: dict[str, list[str]], tmp_path: Path) -> None:
    config = [*recipes["tagger"], *RUN, f"run_dir={tmp_path}"]
    results(pair("train", "tagger", config, 2))
    first, second = (answer for answer, _ in pair("train", "tagger", [*config, "train.lr=0.5"]))
    assert "train.lr: 0.01 -> 0.5" in first
    assert second == "SystemExit: 1"


def test_settings_that_processes_cannot_have(pair: Job, recipes: dict[str, list[str]]) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size: .* each of the 8 is wanted, got 4"):
        check(TrainConfig(batch_size=4), 8)
    with pytest.raises(ConfigError, match=r"train.find_batch_size: not together with train.fsdp"):
        check(TrainConfig(find_batch_size=True, fsdp=True), 2)
    for answer, _ in pair("gradients", "tagger", [*recipes["tagger"], "run_dir=unused", "train.fsdp=true"]):
        assert answer.startswith("ConfigError: train.fsdp: it shards the layers of a text encoder")


def test_the_command_under_torchrun(recipes: dict[str, list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastseq.cli", "train", "tagger", *recipes["tagger"], "train.epochs=1", f"run_dir={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test: ") == 1  # of two processes, one speaks
    assert set(weights(tmp_path)) == set(weights(tmp_path, "best.pt"))
    assert "Traceback" not in done.stderr
