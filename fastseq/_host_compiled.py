"""The compiled functions behind fastseq/host.py, with arrays where the module `fastseq._host` has bytes.

Importing it raises ImportError where that module was not built. The functions take what host.py has checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastseq import _host
from fastseq._host import cpu_features

__all__ = ["ExtendedVocabulary", "bucket_plan", "cpu_features"]

Int64s = npt.NDArray[np.int64]


def bucket_plan(
    lengths: Int64s, batch_size: int, max_tokens: int, seed: int, drop_last: bool, window: int
) -> tuple[Int64s, Int64s]:
    """The order of the sequences, and where in it each batch begins; 0 is no limit."""
    order, offsets = _host.bucket_plan(lengths.tobytes(), batch_size, max_tokens, seed, drop_last, window)
    return np.frombuffer(order, np.int64), np.frombuffer(offsets, np.int64)


class ExtendedVocabulary:
    """What fastseq.host.ExtendedVocabulary looks words up in."""

    def __init__(self, words: list[str], unknown: int) -> None:
        self._made = _host.make_vocabulary(words, unknown)

    def encode_sources(self, sources: Any, padding: int, absent: int) -> tuple[Int64s, Int64s, Int64s, list[list[str]]]:
        """Ids, extended ids, lengths, and each source's words outside the vocabulary."""
        *numbers, oov = _host.encode_sources(self._made, sources, padding, absent)
        return *_arrays(*numbers), oov

    def encode_targets(self, targets: Any, oov: Any, padding: int, absent: int) -> tuple[Int64s, Int64s, Int64s]:
        """Ids, extended ids, lengths."""
        return _arrays(*_host.encode_targets(self._made, targets, oov, padding, absent))


def _arrays(ids: bytearray, extended: bytearray, lengths: bytearray) -> tuple[Int64s, Int64s, Int64s]:
    """The two of a number a token have a row for each sequence."""
    rows = np.frombuffer(lengths, np.int64)
    shape = (rows.size, rows.max(initial=0))
    return np.frombuffer(ids, np.int64).reshape(shape), np.frombuffer(extended, np.int64).reshape(shape), rows
