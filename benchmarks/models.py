"""The benchmarks of models: a training step of each of the five systems, plain against fastseq. Shapes only.

    tagger         a BiLSTM-CRF: pytorch-crf against fastseq
    classifier     DistilBERT: transformers against the same on real tokens only
    summarizer     a pointer-generator: the published step loop against fastseq (22.4 M parameters: V=47,500)
    image          a ResNet: float32 as PyTorch lays images out, against channels last
    regressor      DeBERTa-v2 and a table's columns: transformers against the same on real tokens only
    bert           BERT-base padded to 512, the same texts packed, and DistilBERT in its place; by name only

A step is forward, backward and AdamW on random weights and data; "bf16" is autocast. What is checked is the loss and
its gradients, without dropout, against the usual network in float64. What each lever of a system brings on real data
is measured by `fastseq compare`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastseq_benchmarks import encoder_models, image_models, pointer_models, tagger_models
from fastseq_benchmarks.common import HALF, cases_of, gradient_error
from fastseq_benchmarks.runner import Case, Rival, Shape, Suite
from fastseq_benchmarks.training import relative_norm

__all__ = ["SUITES", "TABLES"]

TOLERANCE = 1e-4
OURS = "fastseq"


@dataclasses.dataclass(frozen=True)
class _System:
    """One suite: its inputs, rivals and truth, and its shapes.

    Attributes:
        make_inputs: `make_inputs(shape, dtype, device, seed)`.
        rivals: See Case.
        truth: See Case.
        letters: See Suite.
        shapes: See Suite.
        quick: See Suite.
        check: See Case.
        goals: The speed-ups aimed at, by shape.
        by_name: See Suite.
        missing: Why it cannot be made, or nothing.
    """

    make_inputs: Callable[..., Any]
    rivals: Callable[[Any], list[Rival]]
    truth: Callable[[Any], Any]
    letters: str
    shapes: Sequence[Shape]
    quick: Shape
    check: Callable[[Any, Any], float] = relative_norm
    goals: Mapping[Shape, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    by_name: bool = False
    missing: Callable[[], str] = encoder_models.no_transformers

    def suite(self, name: str) -> Suite:
        """What the command runs."""
        return Suite(
            functools.partial(self._cases, name), self.letters, self.shapes, quick=[self.quick], by_name=self.by_name
        )

    def _cases(self, name: str, shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> list[Case]:
        if dtype != torch.float32:
            raise ValueError(f"--dtype: got {str(dtype).removeprefix('torch.')}, wanted float32, beside which bf16 is")
        if missing := self.missing():
            raise ValueError(f"--suite: {name} needs transformers, which is {missing}")
        return cases_of(
            shapes,
            dtype,
            device,
            family="models",
            suite=name,
            letters=self.letters,
            make_inputs=self.make_inputs,
            rivals=self.rivals,
            truth=self.truth,
            check=self.check,
            tolerance=TOLERANCE,
            goals=lambda shape: self.goals.get(shape, {}),
        )


def _classifier(encoder: str, shape: Shape, quick: Shape, goals: dict[str, float], *, by_name: bool = False) -> _System:
    return _System(
        functools.partial(encoder_models.make_inputs, encoder),
        encoder_models.rivals,
        encoder_models.loss_and_gradients,
        "B,S,mean",
        [shape],
        quick,
        goals={shape: goals},
        by_name=by_name,
    )


def _nothing() -> str:
    return ""


SYSTEMS = {
    "tagger": _System(
        tagger_models.make_inputs,
        tagger_models.rivals,
        tagger_models.loss_and_gradients,
        "B,T,K",
        [(32, 64, 9), (32, 64, 45)],
        (8, 32, 9),
        missing=_nothing,
    ),
    "classifier": _classifier("distilbert", (8, 128, 40), (4, 64, 20), {OURS + HALF: 8.0}),
    "summarizer": _System(
        functools.partial(pointer_models.make_inputs, True),
        pointer_models.model_rivals,
        pointer_models.loss_and_gradients,
        "B,S,T,V",
        [(1, 768, 192, 47_500)],
        (1, 200, 50, 10_000),
        check=gradient_error,
        goals={(1, 768, 192, 47_500): {OURS: 15.0}, (4, 768, 192, 47_500): {OURS: 12.0}},
        missing=_nothing,
    ),
    "image": _System(
        image_models.make_inputs,
        image_models.rivals,
        image_models.loss_and_gradients,
        "B,side",
        [(128, 28)],
        (16, 28),
        goals={(128, 28): {OURS + HALF: 2.0}},
    ),
    "regressor": _System(
        encoder_models.make_regressor_inputs,
        encoder_models.rivals,
        encoder_models.regressor_loss_and_gradients,
        "B,S,mean",
        [(8, 128, 40)],
        (4, 64, 20),
        goals={(8, 128, 40): {OURS: 3.0}},
    ),
    "bert": _classifier("bert", (8, 512, 40), (4, 64, 20), {encoder_models.DISTILBERT: 60.0}, by_name=True),
}
SUITES = {name: system.suite(name) for name, system in SYSTEMS.items()}
TABLES: dict[str, Any] = {}
