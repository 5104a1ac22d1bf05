"""The framework of ``fastseq compare``: levers, variants that take turns, and what is made of their figures."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastseq.recipes.compare import comparison, levers
from fastseq.recipes.compare.comparison import Comparison
from fastseq.recipes.compare.cost import cost
from fastseq.recipes.compare.levers import Lever, Setup
from fastseq.recipes.compare.plot import draw
from fastseq.recipes.compare.show import show
from fastseq.recipes.compare.variant import Variant, matrix_products, take_turns
from fastseq.recipes.config import RecipeConfig, Section, TrainConfig
from fastseq.recipes.task import Batch, Evaluation, Task

CPU = torch.device("cpu")
WIDTH = 8


class Mean(nn.Module):
    """A model with layers to recompute and a convolution, whose loss says which examples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 1)
        self.convolution = nn.Conv2d(1, 1, 1)
        self.recomputes = False

    def gradient_checkpointing_enable(self) -> None:
        self.recomputes = True

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden: Any = self.embedding(ids)
        recompute = torch.utils.checkpoint.checkpoint
        hidden = recompute(torch.tanh, hidden, use_reentrant=False) if self.recomputes else torch.tanh(hidden)
        on = (ids > 0).unsqueeze(-1)
        hidden = (self.convolution(hidden.unsqueeze(1)).squeeze(1) * on).sum(1) / on.sum(1)
        loss: Tensor = (self.output(hidden).squeeze(-1) - targets).square().mean()
        return loss


def collate(examples: list[tuple[int, ...]]) -> Batch:
    ids = torch.zeros(len(examples), max(map(len, examples)), dtype=torch.int64)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example)] = torch.tensor(example)
    return {"ids": ids, "targets": torch.tensor([float(sum(example)) / 50 for example in examples])}


class Error(Evaluation):
    def answers(self, model: nn.Module, batch: Batch) -> list[Any]:
        return [model(**batch).item()] * len(batch["targets"])

    def metrics(self, answers: Any) -> dict[str, float]:
        return {"error": float(np.mean(answers))}


def make_task() -> Task:
    generator = np.random.default_rng(0)
    examples = [tuple(generator.integers(1, 50, generator.integers(1, 9)).tolist()) for _ in range(48)]
    torch.manual_seed(0)
    names = {"train": examples, "dev": examples[:8], "test": examples[:4]}
    return Task(
        "mean", Mean(), **names, collate=collate, length=len, evaluate=Error(), score="error", lower_is_better=True
    )


@pytest.fixture
def task() -> Task:
    return make_task()


TRAIN = TrainConfig(batch_size=4, epochs=1, precision="fp32", device="cpu", lr=0.1, threads=1)


@pytest.fixture
def setup(task: Task) -> Setup:
    return levers.plain_setup(task, TRAIN, partial(copy.deepcopy, task.model))


def trained(setup: Setup, task: Task) -> Variant:
    variant = Variant("", setup, task, 48, seed=0)
    take_turns([variant], list(range(48)), warm=8)
    return variant


def weights(variant: Variant) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in variant.model.parameters()])


# ---- variants --------------------------------------------------------------------------------------------------------


def test_plain_has_every_lever_off(task: Task) -> None:
    wanted = TrainConfig(
        buckets=True, fused=True, precision="bf16", tf32=True, channels_last=True, compile=True, clip=3
    )
    train = levers.plain_setup(task, wanted, lambda: task.model).train
    assert {name: getattr(train, name) for name in levers.PLAIN} == levers.PLAIN
    assert train.clip == 3


SAME: list[tuple[str, Callable[[Setup], Setup]]] = [
    ("fused optimizer", lambda s: s.but(fused=True)),
    ("zeroed in place", lambda s: replace(s, set_to_none=False)),
    ("blocking copies", lambda s: replace(s, non_blocking=False)),
    ("freed memory kept", lambda s: replace(s, keep_memory=True)),
    ("accumulated", lambda s: s.but(batch_size=2, accumulate=2)),
    ("recomputed", lambda s: s.but(gradient_checkpointing=True)),
    ("channels-last", lambda s: s.but(channels_last=True)),
    ("loaded", lambda s: replace(s, loading=True)),
    ("loaded by workers", lambda s: replace(s, loading=True).but(workers=1, prefetch=2)),
    ("workers anew", lambda s: replace(s, loading=True).but(workers=1, persistent_workers=False)),
]


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in SAME])
def test_levers_that_change_nothing_but_speed_give_the_same_weights(
    change: Callable[[Setup], Setup], setup: Setup, task: Task
) -> None:
    one, other = trained(setup, task), trained(change(setup), task)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(one), torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    assert one.examples == other.examples == 40
    assert other.rate > 0 < other.step_ms


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.but(batch_size=16),
        lambda s: s.but(buckets=True),
        lambda s: s.but(precision="bf16"),
    ],
)
def test_levers_that_change_more_train_on_the_same_examples(
    change: Callable[[Setup], Setup], setup: Setup, task: Task
) -> None:
    one, other = trained(setup, task), trained(change(setup), task)
    assert one.examples == other.examples
    assert not torch.equal(weights(one), weights(other))


def test_buckets_put_like_lengths_together(setup: Setup, task: Task) -> None:
    def padding(setup: Setup) -> int:
        variant = Variant("", setup, task, 48, seed=0)
        plan = variant.plan(list(range(48)), 0)
        assert sorted(i for batch in plan for i in batch) == list(range(48))
        return sum(batch["ids"].eq(0).sum().item() for batch in variant.made(plan))  # type: ignore[misc]

    assert padding(setup.but(buckets=True)) < padding(setup) / 2


def test_what_a_configuration_asks_of_products_is_taken_back() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    with matrix_products(TrainConfig(tf32=True, cudnn_benchmark=True)):
        assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (True, True, True)
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == before


def test_cost_is_of_forward_and_backward(setup: Setup, task: Task) -> None:
    plan = [[0, 1, 2, 3]]
    plain, compiled = (Variant("", s, task, 48, 0) for s in (setup, setup.but(compile=True)))
    found, more = (cost(plain, each) for each in (plan, [list(range(40))]))
    assert (found["ops"] or 0) > 10
    assert (more["peak_bytes"] or 0) > (found["peak_bytes"] or 0) > 0
    assert cost(compiled, plan) == {"ops": None, "peak_bytes": None}
    assert all(parameter.grad is None for parameter in plain.model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiled_model_gives_the_same_weights(setup: Setup, task: Task) -> None:
    one, other = trained(setup, task), trained(setup.but(compile=True), task)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)
    assert other.model._compiled_call_impl is not None


# ---- levers ----------------------------------------------------------------------------------------------------------


def reasons(found: list[Lever]) -> dict[str, str | None]:
    return {lever.name: lever.why_not for lever in found}


def test_reasons_are_words(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(levers.numerics(TRAIN, CPU, "bf16 x")) == {
        "TF32": "needs a GPU of compute capability 8.0",
        "bf16 x": "train.precision=fp32 asks for fp32",
        "fused optimizer": None,
        "freed memory kept": None,
    }
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert reasons(levers.numerics(TRAIN, CPU))["freed memory kept"] == "needs glibc"
    monkeypatch.setattr(levers, "wants_bf16", lambda train: train.precision == "bf16")
    auto, asked = (TRAIN.model_copy(update={"precision": precision}) for precision in ("auto", "bf16"))
    assert reasons(levers.numerics(auto, CPU))["bf16"] == "this hardware does not multiply bf16"
    assert reasons(levers.numerics(asked, CPU))["bf16"] is None
    assert levers.buckets(TRAIN.model_copy(update={"batch_size": 1})).why_not == "a batch is one example"
    assert reasons(levers.batch_levers(TRAIN.model_copy(update={"batch_size": 3})))["2 batches of 1 an update"]
    assert reasons(levers.convolutions(task.model, CPU)) == {"channels-last": None, "cuDNN benchmark": "needs a GPU"}
    assert set(reasons(levers.convolutions(nn.Linear(1, 1), CPU)).values()) == {"the model has no 2-d convolution"}
    assert reasons(levers.loop_levers(nn.Linear(1, 1), TRAIN, CPU))["gradient checkpointing"]
    assert reasons(levers.loop_levers(task.model, TRAIN, CPU))["gradient checkpointing"] is None
    on = TRAIN.model_copy(update={"gradient_checkpointing": True})  # it may be what makes the model fit
    assert "it is on" in (reasons(levers.loop_levers(task.model, on, CPU))["gradient checkpointing"] or "")
    assert levers.plain_setup(task, on, lambda: task.model).train.gradient_checkpointing


def test_compiling_waits_until_it_is_asked_for(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(**changes: Any) -> str | None:
        return reasons(levers.loop_levers(task.model, TRAIN.model_copy(update=changes), CPU))["torch.compile"]

    monkeypatch.setenv("CXX", "c++")
    assert why_not() == "compiling takes minutes: train.compile=true tries it"
    assert why_not(compile=True) is None
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert why_not(compile=True) == "needs a C++ compiler"


def test_older_gpus_are_told_from_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert levers.needs_gpu(gpu, (8, 0)) == "needs compute capability 8.0, and this GPU has 7.5"
    assert levers.needs_gpu(gpu, (7, 0)) is None
    assert levers.needs_gpu(gpu) is None


def test_shorter_examples_and_smaller_models(setup: Setup, task: Task) -> None:
    shorter = levers.shorter(lambda example, length: example[:length], task)
    median = int(np.median([len(example) for example in task.train]))
    assert (shorter.name, shorter.changes) == (f"sequences cut at {median}", "data")
    seen = shorter.switch(setup).examples
    assert len(seen) == len(task.train)
    assert list(seen) == [example[:median] for example in task.train] == seen[:]

    def shrink(model: nn.Module) -> nn.Module:
        model.output = nn.Linear(WIDTH, 1, bias=False)
        return model

    smaller = levers.smaller("no bias", shrink).switch(setup).model()
    assert sum(p.numel() for p in smaller.parameters()) == sum(p.numel() for p in task.model.parameters()) - 1


# ---- the whole -------------------------------------------------------------------------------------------------------


class Data(Section):
    name: str = "numbers"


class Config(RecipeConfig):
    data: Data = Data()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Of a task whose second lever is a sleep, and gives nothing."""
    for name, value in (("PLAIN_SECONDS", 0.05), ("ALONE_SECONDS", 0.1), ("QUALITY_SECONDS", 0.05)):
        monkeypatch.setattr(comparison, name, value)
    config = Config(run_dir=tmp_path, train=TRAIN)
    return Comparison("mean", config, lambda _: make_task(), 16, unit="numbers", plain="a model")


def slow(setup: Setup) -> Setup:
    def sleepy(examples: list[Any]) -> Batch:
        time.sleep(0.01)
        return setup.collate(examples)

    return replace(setup, collate=sleepy, loading=True)


def too_large(setup: Setup) -> Setup:
    def huge(examples: list[Any]) -> Batch:
        raise torch.OutOfMemoryError

    return replace(setup, collate=huge)


def test_a_lever_that_gave_nothing_is_left_out_and_said(run: Comparison, tmp_path: Path) -> None:
    task = run.task
    first = levers.plain_setup(task, run.config.train, partial(copy.deepcopy, task.model))
    kept = run.waterfall(
        first,
        [
            Lever("slow loader", slow),
            Lever("what others build on", slow, base=True),
            Lever("impossible", slow, why_not="needs the sea"),
        ],
    )
    assert run.figures["kept"] == {"slow loader": False}
    assert kept.loading  # the base lever stays
    rows = run.figures["levers"]
    assert [row["name"] for row in rows] == [
        "plain",
        "plain again (control)",
        "+ slow loader",
        "+ what others build on",
    ]
    assert rows[2]["gain"] == rows[2]["speedup"] < 0.9
    assert rows[3]["gain"] == rows[3]["examples_per_s"] / rows[2]["examples_per_s"]
    wider = levers.setting("batch of 8", "batch", batch_size=8)
    run.alone(first, [Lever("too large", too_large), wider], [levers.setting("2 loader workers", workers=2)])
    control, alone, loaded, _ = run.figures["alone"]
    assert control["name"] == "kept, twice"
    assert loaded["name"] == "kept, with a loader"
    assert (alone["name"], alone["changes"]) == ("batch of 8", "batch")
    assert alone["gain"] == alone["examples_per_s"] / control["examples_per_s"]
    run.evaluation(run.quality(first, first, test=True))
    assert [row["name"] for row in run.around] == [
        "larger validation batch",
        "half the evaluations",
        "workers that persist",
    ]
    for row in run.around:
        rest = row["epoch_seconds"] - row["before_seconds"]
        assert row["epoch_gain"] == pytest.approx(row["epoch_seconds"] / (rest + row["after_seconds"]))
    figures = json.loads(json.dumps(run.finish()))
    assert figures["not_tried"] == [
        {"name": "impossible", "why": "needs the sea"},
        {"name": "too large", "why": "out of memory"},
    ]
    with run.console.capture() as captured:
        show(figures, run.console)
    said = captured.get()
    for words in ("Left out below, since it gave nothing here: slow loader", "Not tried: impossible: needs the sea."):
        assert words in said
    for name in ("c.png", "c.svg"):
        draw(figures, tmp_path / name)
    drawn = (tmp_path / "c.svg").read_text("utf-8")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert drawn.count("url(#") >= 2  # hatched
    (tmp_path / "compare-mean.json").write_text(json.dumps(figures), "utf-8")
    page = guide(tmp_path, "mean")
    assert "| + slow loader | " in page
    assert "two runs of it disagree by" in page
    assert "- Not tried: impossible: needs the sea." in page
    assert guide(tmp_path, "median") == "Not measured yet: `fastseq compare median`."


def guide(results: Path, recipe: str) -> str:
    """What the documentation makes of a folder of figures."""
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "hooks.py"))
    hooks["guide"].__globals__["RESULTS"] = results
    return str(hooks["guide"](recipe))


def test_the_same_examples_for_everybody(run: Comparison) -> None:
    assert run.order(60)[:48] != run.order(60)[12:]
    assert sorted(run.order(96)) == sorted(2 * list(range(48)))
    assert run.order(30) == run.order(60)[:30]
    assert run.dev(4) == run.dev(4)
    assert len(run.dev(4)) == 4
    assert run.dev(None) == run.task.dev
