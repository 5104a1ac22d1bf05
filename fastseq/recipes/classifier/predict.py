"""Classifying text with a trained classifier, as the text arrives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastseq.recipes import checkpoint
from fastseq.recipes.arrival import as_they_arrive
from fastseq.recipes.classifier.recipe import Config, make_model
from fastseq.recipes.encoders import TextEncoder, make_encoder, padded


class Predictor:
    """A trained classifier.

    Args:
        path: a run directory, or a checkpoint in it.

    Raises:
        CheckpointError: it is not a classifier's, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        state = checkpoint.load_best(path, "classifier")
        config, artefacts = Config.model_validate(state["config"]), state["artefacts"]
        self.labels: list[str] = artefacts["labels"]
        self.encoder = TextEncoder(artefacts["tokenizer"], config.model.encoder.max_length)
        self.model = make_model(config.model, len(self.labels), make_encoder(artefacts["encoder"]))
        self.model.load_state_dict(state["model"])
        self.model.eval()

    def probabilities(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probability of each label for each text."""
        ids, mask = padded([np.array(row) for row in self.encoder(texts)])
        with torch.inference_mode():
            rows = self.model.logits(ids, mask).softmax(-1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]


def predict(path: Path, lines: Iterable[str], as_json: bool = False) -> Iterator[str]:
    """Classifies one text a line, in batches of whatever has arrived.

    Args:
        path: a run directory, or a checkpoint in it.
        lines: the texts.
        as_json: give a JSON object a text instead of its label: the label and the probabilities of all.

    Yields:
        For each text, in order, its output.
    """
    predictor = Predictor(path)
    for texts in as_they_arrive(lines):
        for found in predictor.probabilities([text.strip() for text in texts]):
            label = max(found, key=found.__getitem__)
            yield json.dumps({"label": label, "probabilities": found}, ensure_ascii=False) if as_json else label
