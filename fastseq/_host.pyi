"""Types of the compiled module of csrc/host/module.cpp."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def cpu_features() -> dict[str, Any]: ...
def build_record() -> dict[str, Any]: ...
def bucket_plan(
    lengths: npt.NDArray[np.int64], batch_size: int, max_tokens: int, seed: int, drop_last: bool, window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...

class ExtendedVocabulary:
    def __init__(self, words: list[str], unknown: int) -> None: ...
    def encode_sources(
        self, sources: Sequence[Sequence[str]], padding: int, absent: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], list[list[str]]]: ...
    def encode_targets(
        self, targets: Sequence[Sequence[str]], oov: Sequence[Sequence[str]], padding: int, absent: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
