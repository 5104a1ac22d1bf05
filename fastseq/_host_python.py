"""The twin of _host_compiled.py without the compiled module: the same functions, and the same results bit for bit.

The functions take what host.py has checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ExtendedVocabulary", "bucket_plan", "cpu_features"]

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


# ---- csrc/host/extended_vocabulary.cpp ------------------------------------------------------------------------------


class ExtendedVocabulary:
    """What fastseq.host.ExtendedVocabulary looks words up in."""

    def __init__(self, words: list[str], unknown: int) -> None:
        self._ids, self._unknown = {word: i for i, word in enumerate(words)}, unknown

    def encode_sources(self, sources: Any, padding: int, absent: int) -> tuple[Int64s, Int64s, Int64s, list[list[str]]]:
        """Ids, extended ids, lengths, and each source's words outside the vocabulary."""
        known, size = self._ids, len(self._ids)
        ids, extended, oov = [], [], []
        for row in sources:
            _raise_unless_utf8(row)
            own: dict[str, int] = {}
            extended.append(
                [i if (i := known.get(word)) is not None else own.setdefault(word, size + len(own)) for word in row]
            )
            ids.append([i if i < size else self._unknown for i in extended[-1]])
            oov.append(list(own))
        return _padded(ids, padding), _padded(extended, absent), _lengths(ids), oov

    def encode_targets(self, targets: Any, oov: Any, padding: int, absent: int) -> tuple[Int64s, Int64s, Int64s]:
        """Ids, extended ids, lengths."""
        known, size, unknown = self._ids, len(self._ids), self._unknown
        ids, extended = [], []
        for row, words in zip(targets, oov, strict=True):
            _raise_unless_utf8(row)
            _raise_unless_utf8(words)
            own: dict[str, int] = {}
            for j, word in enumerate(words):
                own.setdefault(word, size + j)  # of equal words, the first is found
            ids.append([known.get(word, unknown) for word in row])
            extended.append([i if (i := known.get(word)) is not None else own.get(word, unknown) for word in row])
        return _padded(ids, padding), _padded(extended, absent), _lengths(ids)


def _padded(rows: list[list[int]], padding: int) -> Int64s:
    out = np.full((len(rows), max(map(len, rows), default=0)), padding, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _raise_unless_utf8(row: Any) -> None:
    if not isinstance(row, list | tuple):
        raise TypeError
    "".join(row).encode("utf-8")


def _lengths(rows: list[list[int]]) -> Int64s:
    return np.array([len(row) for row in rows], dtype=np.int64)


# ---- csrc/host/buckets.cpp, which has the same steps in the same order ----------------------------------------------

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


def bucket_plan(
    lengths: Int64s, batch_size: int, max_tokens: int, seed: int, drop_last: bool, window: int
) -> tuple[Int64s, Int64s]:
    """The order of the sequences, and where in it each batch begins; 0 is no limit."""
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


# ---- csrc/common/cpu_features.cpp -----------------------------------------------------------------------------------

_LINUX_FEATURES = {
    "sse4.2": "sse4_2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512f",
    "avx512bw": "avx512bw", "avx512vl": "avx512vl", "avx512dq": "avx512dq", "avx512cd": "avx512cd",
    "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16",
}  # fmt: skip
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}


def cpu_features() -> dict[str, Any]:
    """The CPU's model, features and best variant, from Linux's /proc/cpuinfo; elsewhere nothing is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    found = [ours for ours, linux in _LINUX_FEATURES.items() if linux in flags]
    isa = "avx512" if set(found) >= _AVX512 else "avx2" if set(found) >= _AVX2 else "baseline"
    return {"model": fields.get("model name", ""), "features": found, "isa": isa}
