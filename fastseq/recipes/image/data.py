"""The image system's data: arrays of bytes, decoded once, that a batch is stacked of.

Letters: N images, B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from fastseq.recipes.errors import DataError
from fastseq.recipes.task import Batch

IGNORE = -100
"""The label of an image whose class training has not seen: it counts as wrong."""


class Example(NamedTuple):
    """An image, (H,W,C) uint8, and the id of its label."""

    pixels: np.ndarray
    label: int


class Images:
    """Some rows of an array of decoded images, and their labels; read by index.

    Args:
        pixels: (N,H,W,C) uint8; may be mapped into memory, and is never copied.
        labels: (N,) int64.
        files: where each comes from, if each is a file.
        rows: which of them; None is all.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        files: Sequence[Path] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.pixels, self.labels, self.files = pixels, labels, files
        self.rows = np.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        row = self.rows[i]
        return Example(self.pixels[row], int(self.labels[row]))

    def file(self, i: int) -> Path | None:
        """Where an image comes from, if it was a file."""
        return None if self.files is None else self.files[self.rows[i]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return cast(tuple[int, int, int], self.pixels.shape[1:])

    def take(self, which: np.ndarray) -> Images:
        """Those of a mask, (N,) bool."""
        return Images(self.pixels, self.labels, self.files, self.rows[which])


class Splits(NamedTuple):
    """The images, and the names of their labels in the order of the ids."""

    train: Images
    dev: Images
    test: Images
    names: list[str]


def collate(batch: Sequence[Example]) -> Batch:
    """Stacks examples: pixels (B,C,H,W) uint8, which lie in memory as (B,H,W,C), and labels (B,)."""
    pixels = torch.from_numpy(np.stack([example.pixels for example in batch]))
    return {"pixels": pixels.permute(0, 3, 1, 2), "labels": torch.tensor([example.label for example in batch])}


def statistics(images: Images) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each channel, of enough of the images to know them."""
    every = max(1, len(images) * math.prod(images.shape) >> 24)
    sample = images.pixels[images.rows[::every]].astype(np.float32)
    mean, std = sample.mean((0, 1, 2), dtype=np.float64), sample.std((0, 1, 2), dtype=np.float64)
    return mean.tolist(), np.maximum(std, 1).tolist()  # of a channel that is always the same, the deviation is 0


def percentile(data: bytes) -> int:
    """0 to 99 by the sha1 of an image: equal images are never parted."""
    return int(hashlib.sha1(data).hexdigest(), 16) % 100


def checked(names: Sequence[str], folder: Path) -> list[str]:
    """The names of the labels.

    Raises:
        DataError: fewer than two.
    """
    if len(names) < 2:
        raise DataError(f"{folder}: two classes or more are wanted, got {', '.join(names) or 'none'}")
    return list(names)
