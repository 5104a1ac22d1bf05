"""Classifying images with a trained model, as the names of their files arrive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastseq.recipes import checkpoint
from fastseq.recipes.arrival import as_they_arrive
from fastseq.recipes.encoders import make_encoder
from fastseq.recipes.image.data import Example, collate
from fastseq.recipes.image.folder import Mode, load_image
from fastseq.recipes.image.recipe import Config, make_model


class Predictor:
    """A trained image classifier.

    Args:
        path: a run directory, or a checkpoint in it.

    Raises:
        CheckpointError: it is not an image classifier's, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        state = checkpoint.load_best(path, "image")
        config, artefacts = Config.model_validate(state["config"]), state["artefacts"]
        self.labels: list[str] = artefacts["labels"]
        self.shape: tuple[int, int, int] = tuple(artefacts["shape"])
        self.model = make_model(config.model, artefacts, make_encoder(artefacts["encoder"]))
        self.model.load_state_dict(state["model"])
        self.model.eval()

    def probabilities(self, files: Sequence[Path]) -> list[dict[str, float]]:
        """The probability of each label for each image, which is brought to the size that training had.

        Raises:
            DataError: a file that is no image; names it.
        """
        height, width, channels = self.shape
        mode: Mode = "grey" if channels == 1 else "rgb"
        batch = collate([Example(load_image(file, mode, (height, width)), 0) for file in files])
        with torch.inference_mode():
            rows = self.model.logits(batch["pixels"]).softmax(-1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]


def predict(path: Path, lines: Iterable[str], as_json: bool = False) -> Iterator[str]:
    """Classifies one image file a line, in batches of whatever has arrived. Blank lines are passed over.

    Args:
        path: a run directory, or a checkpoint in it.
        lines: the files' names.
        as_json: give a JSON object an image instead of its label: the label and the probabilities of all.

    Yields:
        For each image, in order, its output.

    Raises:
        DataError: a file that is no image; names it.
    """
    predictor = Predictor(path)
    for batch in as_they_arrive(lines):
        files = [Path(line.strip()) for line in batch if line.strip()]
        for found in predictor.probabilities(files) if files else []:
            label = max(found, key=found.__getitem__)
            yield json.dumps({"label": label, "probabilities": found}, ensure_ascii=False) if as_json else label
