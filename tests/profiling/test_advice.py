"""Advice from figures that are made up: what a CPU never measures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq.gpu_watch import Sample
from fastseq.profiling import Profile
from fastseq.profiling.advice import Evidence, advice, of_trial
from fastseq.profiling.inputs import Inputs, real_positions
from fastseq.profiling.marks import Marks
from fastseq.profiling.record import Costs
from fastseq.profiling.timeline import Key, Reading, Total
from fastseq.profiling.tree import build, rows
from fastseq.profiling.trial import Trial

GIB = 2**30


@pytest.fixture
def found() -> Evidence:
    """Two steps of 10 ms, with a GPU."""
    marks = Marks(nn.ModuleDict({"crf": nn.Identity(), "lstm": nn.Identity()}))
    reading = Reading(steps=2, us=20_000, waits=2)
    reading.totals[Key(("ModuleDict", "crf"), False, False)] = Total(us=12_000, gpu_us=4000, launches=20, calls=10)
    reading.totals[Key(("ModuleDict", "lstm"), True, False)] = Total(us=8_000, gpu_us=3000, launches=6, calls=2)
    tree = build(reading, {}, marks.modules, 10.0, Costs(0.0, 0.0))
    gpu = Sample(40.0, 10 * GIB, 80 * GIB)
    return Evidence(tree, tree.whole, reading, marks, Inputs(marks.modules), 10.0, torch.device("cuda"), gpu)


def test_a_gpu_that_waits(found: Evidence) -> None:
    said = advice(found)
    assert said[0].startswith("GPU 40 % 10.0/80.0 GiB: it waits for work")
    assert said[1].startswith("The host waits for the GPU 1 times a step")
    found.reading.waits = 0
    for busy in (Sample(90.0, 10 * GIB, 80 * GIB), Sample(40.0, 70 * GIB, 80 * GIB), Sample(None, GIB, 80 * GIB), None):
        assert advice(dataclasses.replace(found, gpu=busy)) == []


def test_what_a_trial_says(found: Evidence) -> None:
    root, trial = ("ModuleDict",), Trial([("crf", "torchcrf.CRF")], 10.0, 6.25)
    assert of_trial(trial, root, found.tree) == (
        "crf (torchcrf.CRF): 60% of the step. fastseq.patch(model) would give 1.60x: 10.00 to 6.25 ms a step, timed in "
        "turns."
    )
    trial = Trial([("(root)", "M")], 10.0, 10.1)
    assert "M): 100% of the step. fastseq.patch(model) would give next to nothing here (0.99x)" in of_trial(
        trial, root, found.tree
    )
    many = Trial([("crf", "C"), ("lstm", "L"), ("lstm.a", "A"), ("lstm.b", "B")], 10.0, 5.0)
    assert of_trial(many, root, found.tree).startswith("crf (C), lstm (L), lstm.a (A) and 1 more: 100% of the step.")


def test_the_table_of_a_gpu(found: Evidence) -> None:
    profile = Profile(10.0, 12.0, rows(found.tree), 6.0, 0.0, 1_000_000, None, 13.0, 1.0, found.gpu, "a GPU", ["None."])
    heading, *lines, sums = str(profile).split("\n\n")[0].splitlines()
    assert heading.split()[-2:] == ["ms", "launches"]
    assert sums.split()[-2:] == ["3.50", "13"]
    assert any(line.split()[-2:] == ["2.00", "10"] for line in lines)
    assert "13 launches and 1 waits for the GPU a step." in str(profile)
    assert "GPU 40 % 10.0/80.0 GiB" in str(profile)
    assert "live at the peak" not in str(profile)


class Reader(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, lengths: Tensor | None = None) -> None: ...


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, (3, 6)),
        ({"attention_mask": torch.tensor([[True, True]])}, (2, 2)),
        ({"lengths": torch.tensor([4, 1])}, (5, 8)),
        ({"attention_mask": torch.zeros(2, 1, 4, 4)}, None),  # a bias, not a mask of positions
        ({"attention_mask": torch.tensor([[0.0, -1e9]])}, None),
        ({}, None),
        ({"other": 1}, None),
    ],
)
def test_real_positions(given: dict[str, Any], wanted: tuple[int, int] | None) -> None:
    assert real_positions(Reader(), (torch.zeros(2, 4, 8),), given) == wanted
