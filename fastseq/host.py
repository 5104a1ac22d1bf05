"""What the host needs around training: batches of like length, words as ids, what this CPU and build are. No torch.

The compiled module `fastseq._host` does the work where it was built; the twins in this file give the same
results, bit for bit, where it was not.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastseq import library

try:
    from fastseq import _host_functions as _host
except ImportError:  # not built, and `fastseq info` says why
    _host = None  # type: ignore[assignment]

__all__ = [
    "EncodedSources",
    "EncodedTargets",
    "ExtendedVocabulary",
    "bucket_batches",
    "build_record",
    "cpu_features",
    "keep_memory",
    "padding_waste",
]

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


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
    if batch_size is None and max_tokens is None:
        raise ValueError("batch_size: got None, wanted a number (or max_tokens)")
    if drop_last and (batch_size is None or max_tokens is not None):
        raise ValueError("drop_last: needs a batch_size, and no max_tokens: those batches differ in size")
    if max_tokens is not None and array.size and array.max() > max_tokens:
        raise ValueError(f"max_tokens: got {max_tokens}, wanted at least the longest sequence, {array.max()}")
    together = max(1, array.size) if window is None else window * (batch_size or 100)
    plan = _bucket_plan if _host is None else _host.bucket_plan
    order, offsets = plan(array, batch_size or 0, max_tokens or 0, seed, bool(drop_last), together)
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
        self._ids: dict[str, int] = {}
        for i, word in enumerate(self.words):
            if self._ids.setdefault(word, i) != i:
                raise ValueError(f"words: {word!r} is there twice, at {self._ids[word]} and {i}")
        self._compiled = None if _host is None else _host.ExtendedVocabulary(self.words, self.unk)

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
        encode = _encode_sources if self._compiled is None else type(self._compiled).encode_sources
        return EncodedSources(*self._checked(encode, {"sources": sources}, -1))

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
        encode = _encode_targets if self._compiled is None else type(self._compiled).encode_targets
        return EncodedTargets(*self._checked(encode, {"targets": targets, "oov": oov}, -100))

    def _checked(self, encode: Any, batches: dict[str, Any], absent: int) -> Any:
        """Calls an encoder; looks for what is wrong, which takes a while, only where it fails."""
        try:
            return encode(self if self._compiled is None else self._compiled, *batches.values(), self.padding, absent)
        except (TypeError, ValueError):
            for name, rows in batches.items():
                _check_rows(name, rows)
            raise


def _unpickled_vocabulary(words: list[str], unk: int, padding: int) -> ExtendedVocabulary:
    return ExtendedVocabulary(words, unk, padding=padding)


def cpu_features() -> dict[str, Any]:
    """This CPU: architecture, model, those of its features that matter here, and the best variant for it."""
    found = _cpu_features() if _host is None else _host.cpu_features()
    return {"architecture": platform.machine(), **found}


def multiplies_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16.

    Args:
        device: "cpu", or "cuda" for the current GPU.
    """
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
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


# ---- the twins of csrc/host/extended_vocabulary.cpp ---------------------------------------------------------


def _padded(rows: list[list[int]], padding: int) -> Int64s:
    out = np.full((len(rows), max(map(len, rows), default=0)), padding, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _raise_unless_utf8(row: Any) -> None:
    if not isinstance(row, list | tuple):
        raise TypeError
    "".join(row).encode("utf-8")


def _encode_sources(vocabulary: ExtendedVocabulary, sources: Any, padding: int, absent: int) -> tuple[Any, ...]:
    known, size, unk = vocabulary._ids, len(vocabulary), vocabulary.unk
    ids, extended, oov = [], [], []
    for row in sources:
        _raise_unless_utf8(row)
        own: dict[str, int] = {}
        extended.append(
            [i if (i := known.get(word)) is not None else own.setdefault(word, size + len(own)) for word in row]
        )
        ids.append([i if i < size else unk for i in extended[-1]])
        oov.append(list(own))
    return _padded(ids, padding), _padded(extended, absent), np.array([*map(len, ids)], dtype=np.int64), oov


def _encode_targets(
    vocabulary: ExtendedVocabulary, targets: Any, oov: Any, padding: int, absent: int
) -> tuple[Any, ...]:
    known, size, unk = vocabulary._ids, len(vocabulary), vocabulary.unk
    ids, extended = [], []
    for row, words in zip(targets, oov, strict=True):
        _raise_unless_utf8(row)
        _raise_unless_utf8(words)
        own: dict[str, int] = {}
        for j, word in enumerate(words):
            own.setdefault(word, size + j)  # of equal words, the first is found
        ids.append([known.get(word, unk) for word in row])
        extended.append([i if (i := known.get(word)) is not None else own.get(word, unk) for word in row])
    return _padded(ids, padding), _padded(extended, absent), np.array([*map(len, ids)], dtype=np.int64)


# ---- the twins of csrc/host/buckets.cpp, which has the same steps in the same order ------------------------

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: UInt64s) -> UInt64s:
    """splitmix64's output function, on arrays (whose arithmetic wraps around without a warning)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: UInt64s = z ^ (z >> np.uint64(31))
    return result


def _shuffled(n: int, seed: int, stream: int) -> Int64s:
    start = _mix(np.array([seed], np.uint64) + np.array([stream + 1], np.uint64) * _GAMMA)
    keys = _mix(start + np.arange(1, n + 1, dtype=np.uint64) * _GAMMA)
    return np.argsort(keys, kind="stable")


def _place_of_remainder(ascending: Int64s, batch_size: int) -> int:
    """Where the one batch that is not full goes: the place, in full batches before it, that pads least."""
    full, rest = divmod(len(ascending), batch_size)
    begin = np.arange(full) * batch_size
    # Moving it one place up turns [rest][batch] into [batch][rest]: only these two batches' longest change.
    end = ascending[begin + batch_size + rest - 1]
    first, last = ascending[begin + rest - 1], ascending[begin + batch_size - 1]
    cost = np.concatenate([[0], np.cumsum(batch_size * (last - end) + rest * (end - first))])
    return int(np.argmin(cost))


def _cut_by_count(ascending: Int64s, batch_size: int) -> list[int]:
    full, rest = divmod(len(ascending), batch_size)
    sizes = [batch_size] * full
    if rest:
        sizes.insert(_place_of_remainder(ascending, batch_size), rest)
    return sizes


def _cut_by_tokens(ascending: Int64s, batch_size: int, max_tokens: int) -> list[int]:
    sizes, size = [], 0
    for length in ascending.tolist():
        if size and (size == batch_size or (size + 1) * length > max_tokens):
            sizes.append(size)
            size = 0
        size += 1
    return [*sizes, size] if size else sizes


def _bucket_plan(
    lengths: Int64s, batch_size: int, max_tokens: int, seed: int, drop_last: bool, window: int
) -> tuple[Int64s, Int64s]:
    order = _shuffled(len(lengths), seed, 0)
    if drop_last:
        order = order[: len(order) - len(order) % batch_size]
    sizes: list[int] = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        order[begin : begin + window] = part
        if max_tokens:
            sizes += _cut_by_tokens(lengths[part], batch_size, max_tokens)
        else:
            sizes += _cut_by_count(lengths[part], batch_size)
    batches = np.split(order, np.cumsum(sizes)[:-1]) if sizes else []
    chosen = [batches[j] for j in _shuffled(len(sizes), seed, 1).tolist()]
    offsets = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
    return np.concatenate([order[:0], *chosen]), offsets


_LINUX_FEATURES = {
    "sse4.2": "sse4_2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512f",
    "avx512bw": "avx512bw", "avx512vl": "avx512vl", "avx512dq": "avx512dq", "avx512cd": "avx512cd",
    "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16",
}  # fmt: skip
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}


def _cpu_features() -> dict[str, Any]:
    """The twin of csrc/common/cpu_features.cpp, from Linux's /proc/cpuinfo; elsewhere nothing is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    found = [ours for ours, linux in _LINUX_FEATURES.items() if linux in flags]
    isa = "avx512" if set(found) >= _AVX512 else "avx2" if set(found) >= _AVX2 else "baseline"
    return {"model": fields.get("model name", ""), "features": found, "isa": isa}


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
