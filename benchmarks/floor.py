"""The floor under a kernel's time: the multiply-adds it cannot do without, at this machine's measured rate.

The rate is that of `torch.mm` on square matrices of side 1024 (2**30 multiply-adds, 12 MiB in float32), which
the BLAS runs near the peak of the cores' FMA units, with as many threads as the rivals have. It is measured
inside the same interleaved rounds as the rivals, so that another load on the machine, or a lower clock, hits
both alike; a sample is the fastest of three products. It is a measured rate, and not one off a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["SIDE", "fma_sampler"]

SIDE = 1024
BEST_OF = 3


def fma_sampler(device: str, dtype: torch.dtype, sync: Callable[[], None]) -> Callable[[], float]:
    """Return a function that measures once the seconds of one multiply-add, on all threads together.

    Half types are measured in float32: that is what the ops' arithmetic is in.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (torch.rand(SIDE, SIDE, device=device, dtype=wide) for _ in range(2))
    product = torch.empty_like(a)

    def once() -> float:
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        sync()
        return time.perf_counter() - start

    def sample() -> float:
        return min(once() for _ in range(BEST_OF)) / SIDE**3

    once()  # the first call sets the library up
    return sample
