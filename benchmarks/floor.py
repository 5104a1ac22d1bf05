"""The floors under a kernel's time, at rates measured on this machine: multiply-adds, and bytes on a GPU.

Multiply-adds: the rate is that of `torch.mm` on square matrices, of side 1024 on a CPU (2**30 multiply-adds, 12 MiB in
float32) and 4096 on a GPU, which the BLAS runs near the peak of the FMA units, with as many threads as the rivals have.
Bytes: the rate is that of a copy within the GPU's memory, 256 MiB read and as many written.

Both are measured inside the same interleaved rounds as the rivals, so that another load on the machine, or a lower
clock, hits all alike; a sample is the fastest of three. They are measured rates, and not those of a data sheet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastseq_benchmarks.clock import Clock

__all__ = ["COPY_BYTES", "SIDE", "copy_sampler", "fma_sampler"]

SIDE = {"cpu": 1024, "cuda": 4096}
COPY_BYTES = 2**28  # far more than a GPU's cache holds
BEST_OF = 3


def fma_sampler(device: str, dtype: torch.dtype, clock: Clock) -> Callable[[], float]:
    """Return a function that measures once the seconds of one multiply-add, on the whole device.

    Half types are measured in float32: that is what the ops' arithmetic is in.
    """
    wide, side = torch.float64 if dtype == torch.float64 else torch.float32, SIDE[device]
    a, b = (torch.rand(side, side, device=device, dtype=wide) for _ in range(2))
    product = torch.empty_like(a)
    return _best(lambda: torch.mm(a, b, out=product), side**3, clock)


def copy_sampler(device: str, clock: Clock) -> Callable[[], float]:
    """Return a function that measures once the seconds of one byte moved; a byte copied is two: read, and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), 2 * COPY_BYTES, clock)


def _best(call: Callable[[], object], units: int, clock: Clock) -> Callable[[], float]:
    """A function that takes a sample of `call`, in seconds a unit."""

    def once() -> float:
        clock.start()
        call()
        return clock.stop()

    def sample() -> float:
        return min(once() for _ in range(BEST_OF)) / units

    once()  # the first call sets the library up
    return sample
