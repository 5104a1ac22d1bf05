"""IDX files, the format of MNIST and its relatives.

Letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastseq.recipes.errors import DataError
from fastseq.recipes.image.data import IGNORE, Images, Splits, checked, percentile

FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
"""What fashion-mnist's labels 0 to 9 stand for."""


def read_idx(folder: Path, names: Sequence[str] | None = None) -> Splits:
    """The four files of MNIST and its relatives; 5 % of the training images are dev, by a hash of their pixels.

    Args:
        folder: with the files, compressed by gzip or not: train-images-idx3-ubyte, train-labels-idx1-ubyte, and the
            same of t10k or test. Images of several channels are idx4, (N,H,W,C).
        names: of the labels; None calls them 0, 1, ...

    Raises:
        DataError: a file is missing, damaged, or does not fit the others; names it.
    """
    train, test = _idx_pair(folder, "train"), _idx_pair(folder, "t10k", "test")
    if train.shape != test.shape:
        shapes = f"{train.shape} and {test.shape}"
        raise DataError(f"{folder}: images of one shape are wanted, got {shapes} (height, width, channels)")
    names = names or [str(i) for i in range(int(train.labels.max()) + 1)]
    test.labels[test.labels >= len(names)] = IGNORE
    dev = np.array([percentile(image.tobytes()) < 5 for image in train.pixels])
    if dev.all() or not dev.any():
        raise DataError(f"{folder}: {len(dev)} training images are too few to part")
    return Splits(train.take(~dev), train.take(dev), test, checked(names, folder))


def _idx_pair(folder: Path, *names: str) -> Images:
    """The images and labels of a part, which has one of these names."""

    def find(what: str) -> Path:
        found = [file for name in names for file in sorted(folder.glob(f"*{name}-{what}[-.]idx?-ubyte*"))]
        if len(found) != 1:
            wanted = f"one file like {names[0]}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz is wanted"
            raise DataError(f"{folder}: {wanted}, got {', '.join(file.name for file in found) or 'none'}")
        return found[0]

    file = find("images")
    pixels, labels = idx_array(file), idx_array(find("labels"))
    if pixels.ndim not in (3, 4) or labels.shape != pixels.shape[:1] or not pixels.size:
        shapes = f"{pixels.shape} with labels of {labels.shape}"
        raise DataError(f"{file}: (N,H,W) or (N,H,W,C) with N labels are wanted, got {shapes}")
    return Images(pixels.reshape(*pixels.shape[:3], -1), labels.astype(np.int64))


def idx_array(file: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file (two zeros, type, dimensions, big-endian sizes, values).

    Raises:
        DataError: it holds something else, or less or more than it says.
    """
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{file}: an IDX file of unsigned bytes is wanted (00 00 08 ...), got {data[:4].hex(' ')}")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
    if len(data) != 4 + 4 * data[3] + math.prod(shape):
        raise DataError(f"{file}: {math.prod(shape)} values of {shape} are wanted, got {len(data) - 4 - 4 * data[3]}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
