"""What the shared loop knows of a system: one object, made by the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Tensors by the names of the model's forward arguments."""


class Evaluation(ABC):
    """How a model is judged: by what it answers to each example, which processes can share, and by all answers."""

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Any]:
        """What a model in evaluation mode makes of a batch: for each example, in order, plain values."""

    @abstractmethod
    def metrics(self, answers: Sequence[Any]) -> dict[str, float]:
        """Named metrics of the answers to all examples."""

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The metrics of a model on batches."""
        return self.metrics([answer for batch in batches for answer in self.answers(model, batch)])


@dataclass
class Task:
    """A model, its data and how it is judged.

    Attributes:
        name: of the recipe.
        model: ``model(**batch)`` is the loss to minimise, a scalar.
        train: examples, in any form that `collate` takes; read by index.
        dev: examples that choose the best weights.
        test: examples that are read once, at the end.
        collate: makes a batch of a list of examples.
        length: the length of an example, which the length buckets sort by.
        evaluate: judges a model, which is in evaluation mode and under autocast.
        score: the metric of `evaluate` that chooses the best weights.
        weight: how much an example counts in the model's loss, which is a mean: its words, where that is a mean over
            words; None where each example counts the same. Processes and parts of a batch are averaged by it.
        lower_is_better: of `score`; else the highest is the best.
        artefacts: plain values that prediction needs besides the weights, such as the vocabulary.
        collate_evaluation: the same for evaluation, where a batch holds more than the model takes; None where not.
        evaluate_test: the same for the test examples, where that is another; None where it is not.
    """

    name: str
    model: nn.Module
    train: Sequence[Any]
    dev: Sequence[Any]
    test: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    length: Callable[[Any], int]
    evaluate: Evaluation
    score: str
    weight: Callable[[Any], int] | None = None
    lower_is_better: bool = False
    artefacts: dict[str, Any] = field(default_factory=dict)
    collate_evaluation: Callable[[list[Any]], Batch] | None = None
    evaluate_test: Evaluation | None = None
