"""Folders of image files: which there are, their pixels by Pillow, and a cache of those.

Letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fastseq.recipes.errors import DataError
from fastseq.recipes.feature_cache import MAPPED, Arrays, cached
from fastseq.recipes.image.data import IGNORE, Images, Splits, checked, percentile

Mode = Literal["grey", "rgb"]


def load_image(file: Path, mode: Mode, size: tuple[int, int] | None) -> np.ndarray:
    """The pixels of an image file, (H,W,C) uint8.

    Args:
        file: of any kind that Pillow reads; it is turned as its camera says.
        mode: one channel or three.
        size: height and width: the middle of the image in that proportion is brought to it (Pillow's
            ``ImageOps.fit``, bilinear, over all the pixels that a new one covers); None leaves it as it is.

    Raises:
        DataError: there is no such file, or it is damaged or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("L" if mode == "grey" else "RGB")
        if size is not None and image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
    except Exception as error:  # its decoders have no error in common
        raise DataError(f"{file}: not an image that can be read ({error})") from None
    return np.asarray(image).reshape(image.height, image.width, -1)


class Files(NamedTuple):
    """The image files of a folder.

    Attributes:
        paths: of all the images.
        parts: of each, "train", "dev" or "test".
        labels: (N,) int64.
        names: of the labels.
    """

    paths: list[Path]
    parts: list[str]
    labels: np.ndarray
    names: list[str]


def list_files(folder: Path) -> Files:
    """The images of a folder with a sub-folder for each class, or with train (and dev, and test) that have those.

    Hidden files and those whose name does not end like an image's are passed over.

    Raises:
        DataError: no folder, fewer than two classes, or a class without an image; names it.
    """
    from PIL import Image

    if not folder.is_dir():
        raise DataError(f"data.folder: no folder at {folder}")
    endings = Image.registered_extensions()
    inner = [part for part in ("train", "dev", "test") if (folder / part).is_dir()]
    roots = {part: folder / part for part in inner} if "train" in inner else {"train": folder}
    names = checked([path.name for path in _visible(roots["train"]) if path.is_dir()], folder)
    ids = {name: i for i, name in enumerate(names)}
    paths, parts, labels = list[Path](), list[str](), list[int]()
    for part, root in roots.items():
        for group in (path for path in _visible(root) if path.is_dir()):
            files = [path for path in _visible(group) if path.suffix.lower() in endings]
            if not files:
                raise DataError(f"{group}: a class's images are wanted, got none")
            paths += files
            parts += [part] * len(files)
            labels += [ids.get(group.name, IGNORE)] * len(files)
    return Files(paths, parts, np.array(labels, dtype=np.int64), names)


def read_folder(
    folder: Path,
    mode: Mode,
    size: tuple[int, int] | None,
    cache: Path | None,
    say: Callable[[str], object] = print,
) -> Splits:
    """The images of `list_files`, decoded once: where there is a cache, the next run reads them from there.

    Where there is no test folder, 10 % of the training images are test; where there is no dev folder, 5 % are dev: by
    a hash of the file.

    Args:
        folder: of the images.
        mode: as of `load_image`.
        size: as of `load_image`; None wants images that are all of one size.
        cache: the folder of the decoded images, or None.
        say: gets a line where a cache could not be used.

    Raises:
        DataError: as of `list_files`, or an image that cannot be read; names it.
    """
    import PIL

    files = list_files(folder)
    key = {"files": _stamp(folder, files.paths), "mode": mode, "size": size, "pillow": PIL.__version__}
    arrays = cached(cache, "images", key, lambda: _decoded(files.paths, mode, size, cache), say)
    parts, by_hash = np.array(files.parts), arrays["percentiles"]
    pool = parts == "train"
    for part, first, end in (("test", 0, 10), ("dev", 10, 15)):
        if part not in files.parts:
            parts[pool & (first <= by_hash) & (by_hash < end)] = part
    images = Images(arrays["pixels"], files.labels, files.paths)
    missing = [part for part in ("train", "dev", "test") if part not in parts]
    if missing:
        raise DataError(f"{folder}: {len(files.paths)} images are too few to part; a folder {missing[0]} is wanted")
    train, dev, test = (images.take(parts == part) for part in ("train", "dev", "test"))
    return Splits(train, dev, test, files.names)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _stamp(folder: Path, paths: list[Path]) -> str:
    """Changes with the files' names, sizes and times; to read all of them would take as long as what it saves."""
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _room(shape: tuple[int, ...], cache: Path | None) -> np.ndarray:
    """An array of bytes; one that may not fit into memory is in a file without a name where the cache is."""
    if cache is None or math.prod(shape) < MAPPED:
        return np.empty(shape, np.uint8)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))  # a full disk is an error now, else a crash later
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _decoded(paths: list[Path], mode: Mode, size: tuple[int, int] | None, cache: Path | None) -> Arrays:
    """The pixels (N,H,W,C) of files, and the percentile of each; threads, since Pillow's decoders run side by side."""

    def one(path: Path) -> tuple[np.ndarray, int]:
        return load_image(path, mode, size), percentile(path.read_bytes())

    pixels, percentiles = np.empty(0, np.uint8), np.empty(len(paths), np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, (image, percentiles[i]) in enumerate(pool.map(one, paths)):
            if i == 0:
                pixels = _room((len(paths), *image.shape), cache)
            if image.shape != pixels.shape[1:]:
                apart = f"{image.shape[:2]} and {paths[0]} has {pixels.shape[1:3]}"
                raise DataError(f"{paths[i]}: it has {apart} (height, width); data.size brings all to one size")
            pixels[i] = image
    return {"pixels": pixels, "percentiles": percentiles}
