"""What the host needs around training: batches of like length, words as ids, what this CPU and build are. No torch.

_host_compiled.py does the work where its module was built; its twin _host_python.py gives the same results, bit for
bit, where it was not.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastseq import library

try:
    from fastseq import _host_compiled as _implementation
except ImportError:  # not built, and `fastseq info` says why
    from fastseq import _host_python as _implementation  # type: ignore[no-redef]

__all__ = [
    "EncodedSources",
    "EncodedTargets",
    "ExtendedVocabulary",
    "bucket_batches",
    "build_record",
    "cpu_features",
    "keep_memory",
    "multiplies_bf16",
    "padding_waste",
]

Int64s = npt.NDArray[np.int64]


def bucket_batches(
    lengths: npt.ArrayLike,
    batch_size: int | None = None,
    seed: int = 0,
    *,
    max_tokens: int | None = None,
    drop_last: bool = False,
    window: int | None = 100,
) -> list[Int64s]:
    """Plan batches of sequences of like length, in random order, so that little is computed on padding.

    The sequences are shuffled, cut into windows of `window` batches, sorted by length inside each window, and
    cut into batches; then the batches are shuffled. Equal arguments give equal plans on any machine; use
    another seed for each epoch. Every index is in exactly one batch, unless `drop_last`.

    A large window pads less, and a small one mixes lengths more. With `window=None` everything is sorted
    together, which is the least padding that batches of this size can have (the one batch that is not full is
    put where it pads least).

    Args:
        lengths: (N,) lengths of the sequences, integers, at least 0.
        batch_size: Sequences in a batch, at most. Without `max_tokens`, all batches but one are full.
        seed: From 0 to 2**64 - 1.
        max_tokens: The most that a batch may hold, padding included: its size times its longest sequence.
        drop_last: Leave out the N % batch_size sequences that do not fill a batch: a random choice, not the
            longest.
        window: Batches that are sorted together (hundreds of sequences, where `batch_size` is None); None for
            all.

    Returns:
        One int64 array of indices a batch.

    Raises:
        TypeError: An argument is not of the wanted kind.
        ValueError: An argument is out of range, or a sequence is longer than `max_tokens`.
    """
    array = _checked_lengths(lengths)
    _check_integer("seed", seed, 0, 2**64 - 1)
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("window", window)):
        if value is not None:
            _check_integer(name, value, 1, 2**31 - 1)
    drop_last = _flag("drop_last", drop_last)
    if batch_size is None and max_tokens is None:
        raise ValueError("batch_size: got None, wanted a number (or max_tokens)")
    if drop_last and (batch_size is None or max_tokens is not None):
        raise ValueError("drop_last: needs a batch_size, and no max_tokens: those batches differ in size")
    if max_tokens is not None and array.size and array.max() > max_tokens:
        raise ValueError(f"max_tokens: got {max_tokens}, wanted at least the longest sequence, {array.max()}")
    together = max(1, array.size) if window is None else window * (batch_size or 100)
    order, offsets = _implementation.bucket_plan(array, batch_size or 0, max_tokens or 0, seed, drop_last, together)
    return [order[i:j] for i, j in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def padding_waste(lengths: npt.ArrayLike, batches: Sequence[Int64s]) -> float:
    """The share of padding in batches that are padded to their longest sequence: from 0 to 1.

    Args:
        lengths: (N,) lengths of the sequences, integers, at least 0.
        batches: An array of indices a batch, none of them empty, as from `bucket_batches`.

    Raises:
        TypeError: An argument is not of the wanted kind.
        ValueError: An argument is out of range.
    """
    array = _checked_lengths(lengths)
    if not isinstance(batches, list | tuple):
        raise TypeError(f"batches: got {type(batches).__name__}, wanted a list of arrays of indices")
    chosen = [_checked_batch(batch, array) for batch in batches]
    padded = sum(int(each.max()) * len(each) for each in chosen)
    return 1 - sum(int(each.sum()) for each in chosen) / padded if padded else 0.0


class EncodedSources(NamedTuple):
    """A batch of B sources, padded to the S tokens of the longest.

    Attributes:
        ids: (B,S) int64 in the vocabulary.
        extended: (B,S) int64 in the extended vocabulary; -1 where there is no token.
        lengths: (B,) int64.
        oov: of each source, its words outside the vocabulary: word j has the extended id V + j.
    """

    ids: Int64s
    extended: Int64s
    lengths: Int64s
    oov: list[list[str]]


class EncodedTargets(NamedTuple):
    """A batch of B targets, padded to the T tokens of the longest.

    Attributes:
        ids: (B,T) int64 in the vocabulary.
        extended: (B,T) int64 in the extended vocabulary of the row's source; -100 where there is no token.
        lengths: (B,) int64.
    """

    ids: Int64s
    extended: Int64s
    lengths: Int64s


class ExtendedVocabulary:
    """Words as ids for a model that copies: a source's words outside the vocabulary get ids of their own.

    The vocabulary's V words have the ids 0 to V-1. In each source, words outside it are numbered in the order in
    which they come first, and have the ids V, V+1, ... in that source and its target alone. Any number of threads
    may encode at once: the compiled module releases the GIL for the look-ups.

    Args:
        words: the V words in the order of their ids; no word twice.
        unk: id that stands for unknown words where only the vocabulary's ids will do.
        padding: what ids hold where there is no token.

    Raises:
        TypeError: a word is not a string.
        ValueError: a word is there twice or has a surrogate in it, or `unk` is not an id.
    """

    def __init__(self, words: Sequence[str], unk: int = 1, *, padding: int = 0) -> None:
        if not isinstance(words, list | tuple):
            raise TypeError(f"words: got {type(words).__name__}, wanted a list of strings")
        _check_rows("words", [words])
        _check_integer("unk", unk, 0, max(0, len(words) - 1))
        _check_integer("padding", padding, -(2**63), 2**63 - 1)
        self.words, self.unk, self.padding = list(words), int(unk), int(padding)
        seen: dict[str, int] = {}
        for i, word in enumerate(self.words):
            if seen.setdefault(word, i) != i:
                raise ValueError(f"words: {word!r} is there twice, at {seen[word]} and {i}")
        self._encoder = _implementation.ExtendedVocabulary(self.words, self.unk)

    def __len__(self) -> int:
        return len(self.words)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_vocabulary, (self.words, self.unk, self.padding)

    def encode_sources(self, sources: Sequence[Sequence[str]]) -> EncodedSources:
        """Encodes a batch of lists of tokens.

        Raises:
            TypeError: something is not a list of strings.
            ValueError: a token has a surrogate in it: half a character, which no text file can hold.
        """
        return EncodedSources(*self._checked(self._encoder.encode_sources, {"sources": sources}, -1))

    def encode_targets(self, targets: Sequence[Sequence[str]], oov: Sequence[Sequence[str]]) -> EncodedTargets:
        """Encodes a batch of lists of tokens against the `oov` of `encode_sources`.

        A word neither in the vocabulary nor in its row of `oov` is `unk` in both ids.

        Raises:
            TypeError: something is not a list of strings.
            ValueError: as above, or there are not as many lists in `oov` as in `targets`.
        """
        for name, rows in (("targets", targets), ("oov", oov)):
            if not isinstance(rows, list | tuple):
                _check_rows(name, rows)
        if len(targets) != len(oov):
            raise ValueError(f"oov: got {len(oov)} lists, wanted one for each of the {len(targets)} targets")
        return EncodedTargets(*self._checked(self._encoder.encode_targets, {"targets": targets, "oov": oov}, -100))

    def _checked(self, encode: Callable[..., Any], batches: dict[str, Any], absent: int) -> Any:
        """Calls an encoder; looks for what is wrong, which takes a while, only where it fails."""
        try:
            return encode(*batches.values(), self.padding, absent)
        except (TypeError, ValueError):
            for name, rows in batches.items():
                _check_rows(name, rows)
            raise


def _unpickled_vocabulary(words: list[str], unk: int, padding: int) -> ExtendedVocabulary:
    return ExtendedVocabulary(words, unk, padding=padding)


def cpu_features() -> dict[str, Any]:
    """This CPU: architecture, model, those of its features that matter here, and the best variant for it."""
    return {"architecture": platform.machine(), **_implementation.cpu_features()}


def multiplies_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16.

    Args:
        device: "cpu", or "cuda" for the current GPU; without one, False.

    Raises:
        ValueError: Another device.
    """
    import torch

    if not isinstance(device, str) or device not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, wanted 'cpu' or 'cuda'")
    if device == "cuda":
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def build_record() -> dict[str, Any]:
    """What the build wrote down: versions, flags, what was left out and why."""
    return library.build_record()


def _checked_lengths(lengths: npt.ArrayLike) -> Int64s:
    try:
        array = np.asarray(lengths)
    except (RuntimeError, TypeError, ValueError):  # a ragged list, a tensor that is not on the host
        raise TypeError(f"lengths: got {type(lengths).__name__}, wanted a list of integers") from None
    if array.ndim != 1:
        raise ValueError(f"lengths: got shape {array.shape}, wanted (N,)")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"lengths: got dtype {array.dtype}, wanted integers")
    if array.size and array.min() < 0:
        raise ValueError(f"lengths: got {array.min()}, wanted at least 0")
    return np.ascontiguousarray(array, dtype=np.int64)


def _checked_batch(batch: Int64s, lengths: Int64s) -> Int64s:
    """The lengths of the sequences in a batch."""
    indices = np.asarray(batch)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not indices.size:
        raise TypeError(f"batches: got {batch!r}, wanted arrays (n,) of integers, n at least 1")
    if indices.min() < 0 or indices.max() >= len(lengths):
        wanted = f"0 to {len(lengths) - 1}"
        raise ValueError(f"batches: got indices from {indices.min()} to {indices.max()}, wanted {wanted}")
    return lengths[indices]


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, wanted {low} to {high}")


def _flag(name: str, value: Any) -> bool:
    try:
        return bool(value)
    except (RuntimeError, ValueError):  # a tensor or an array of several
        raise TypeError(f"{name}: got {type(value).__name__}, wanted True or False") from None


def _check_rows(name: str, rows: Any) -> None:
    """Says where something is not a list of strings that UTF-8 can hold."""
    if not isinstance(rows, list | tuple):
        raise TypeError(f"{name}: got {type(rows).__name__}, wanted a list of lists of tokens")
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise TypeError(f"{name}[{i}]: got {type(row).__name__}, wanted a list of tokens")
        for j, token in enumerate(row):
            if not isinstance(token, str):
                raise TypeError(f"{name}[{i}][{j}]: got {type(token).__name__}, wanted str")
            if any("\ud800" <= character <= "\udfff" for character in token):
                raise ValueError(f"{name}[{i}][{j}]: got {token!r}, wanted no surrogate in it (half a character)")


def keep_memory(on: bool = True) -> bool:
    """Have this process keep the memory that it frees, for its next allocation, from now on.

    By default glibc gives large blocks back to the system at once, and gets them anew, page by page and zeroed, in the
    next training step. A model of 66 million parameters pays that for a gradient of each. The price is that the process
    stays as large as it once was. The same from outside, without the call::

        MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 python ...

    Args:
        on: False gives it back, and has what glibc itself ends up with as large blocks are freed.

    Returns:
        Whether the C library took it: False if that is not glibc, or not a Linux.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    mmap_from, trim_from = (1 << 30, 2**31 - 1) if on else (1 << 25, 1 << 26)
    taken = bool(libc.mallopt(mmap_threshold, mmap_from)) and bool(libc.mallopt(trim_threshold, trim_from))
    if not on:
        libc.malloc_trim(0)
    return taken
