"""The image system's data: arrays of bytes, decoded once, that a batch is stacked of.

Letters: N images, B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    """Images in one array, decoded, and their labels; read by index.

    Args:
        pixels: (N,H,W,C) uint8.
        labels: (N,) int64.
        files: where each comes from, if each is a file.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, files: Sequence[Path] | None = None) -> None:
        self.pixels, self.labels, self.files = pixels, labels, files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Example:
        return Example(self.pixels[i], int(self.labels[i]))

    def take(self, which: np.ndarray) -> Images:
        """Those of a mask, (N,) bool."""
        files = None if self.files is None else [self.files[i] for i in np.flatnonzero(which).tolist()]
        return Images(self.pixels[which], self.labels[which], files)


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
    sample = images.pixels[:: max(1, images.pixels.size >> 24)].astype(np.float32)
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
