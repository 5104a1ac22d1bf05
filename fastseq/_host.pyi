"""Types of the compiled module of csrc/host/module.cpp."""

from typing import Any

import numpy as np
import numpy.typing as npt

def cpu_features() -> dict[str, Any]: ...
def build_record() -> dict[str, Any]: ...
def bucket_plan(
    lengths: npt.NDArray[np.int64], batch_size: int, max_tokens: int, seed: int, drop_last: bool, window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
