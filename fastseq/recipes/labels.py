"""How the recipes that give one label to an example are judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastseq.recipes import metrics
from fastseq.recipes.task import Batch, Evaluation


class LabelEvaluation(Evaluation):
    """Accuracy and macro F1 of a model whose `predict` takes the batch without its labels, and gives (B,) classes."""

    def answers(self, model: Any, batch: Batch) -> list[tuple[int, int]]:
        """Of each example, its label and what was predicted."""
        predicted = model.predict(**{name: x for name, x in batch.items() if name != "labels"})
        return list(zip(batch["labels"].tolist(), predicted.tolist(), strict=True))

    def metrics(self, answers: Sequence[tuple[int, int]]) -> dict[str, float]:
        """See `metrics.label_scores`."""
        return metrics.label_scores([label for label, _ in answers], [predicted for _, predicted in answers])
