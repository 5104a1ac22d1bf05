"""Predicting numbers with a trained regressor, as the rows arrive."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastseq.recipes import checkpoint, table
from fastseq.recipes.arrival import as_they_arrive
from fastseq.recipes.encoders import TextEncoder, make_encoder
from fastseq.recipes.errors import DataError
from fastseq.recipes.regressor.data import Examples, collate
from fastseq.recipes.regressor.features import Features
from fastseq.recipes.regressor.recipe import Config, make_model


class Predictor:
    """A trained regressor.

    Args:
        path: a run directory, or a checkpoint in it.

    Raises:
        CheckpointError: it is not a regressor's, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        state = checkpoint.load_best(path, "regressor")
        config, artefacts = Config.model_validate(state["config"]), state["artefacts"]
        self.features = Features.from_plain(artefacts["features"])
        text, encoder = config.model.encoder, None
        self.encoder = TextEncoder(artefacts["tokenizer"], text.max_length) if text is not None else None
        if text is not None:
            encoder = make_encoder(artefacts["encoder"])
        self.model = make_model(config.model, self.features, encoder)
        self.model.load_state_dict(state["model"])
        self.model.eval()

    def predictions(self, rows: Sequence[table.Row]) -> list[float]:
        """The number for each row, on the scale of the target."""
        examples = Examples(self.features.arrays(rows, self.encoder), np.zeros(len(rows)))
        batch = collate([examples[i] for i in range(len(examples))])
        with torch.inference_mode():
            return [math.exp(value) for value in self.model(**{**batch, "targets": None}).tolist()]


def predict(path: Path, lines: Iterable[str], as_json: bool = False) -> Iterator[str]:
    """Predicts a number for each row, a JSON object a line, in batches of whatever has arrived.

    Args:
        path: a run directory, or a checkpoint in it.
        lines: the rows; all columns are wanted but the target. Blank lines are passed over.
        as_json: give a JSON object a row instead of the number alone: the target's name and the number.

    Yields:
        For each row, in order, its output.

    Raises:
        DataError: a line that is no row, or lacks a column; with its number.
    """
    predictor, number = Predictor(path), 0
    columns = predictor.features.columns
    for texts in as_they_arrive(lines):
        rows = []
        for line in texts:
            number += 1
            if not line.strip():
                continue
            try:
                row = table.parse(line)
                columns.check(row, target=False)
            except ValueError as error:
                raise DataError(f"line {number}: {error}") from None
            rows.append(row)
        for value in predictor.predictions(rows) if rows else []:
            yield json.dumps({columns.target: value}) if as_json else f"{value:.6g}"
