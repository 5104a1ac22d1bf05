"""The bugs that mutants.py plants in the kernels of the pointer-generator's distribution; see planted.py."""

from __future__ import annotations

from functools import partial

from planted import Mutant

_mutant = partial(Mutant, file="distribution.cuh", test="pointer_cuda_distribution_test", folder="pointer/cuda")

MUTANTS = [
    _mutant(
        "copies-barrier",
        "copies are added to outputs that are not yet written",
        old="__syncthreads(); // the copies come on top of what other threads have written",
        new="",
    ),
    _mutant(
        "ids-tile-barrier",
        "the next tile of ids is written while others still read this one",
        old="__syncthreads(); // the tile before has been read",
        new="",
    ),
    _mutant(
        "equal-ids",
        "equal ids get the same place in the order",
        old="rank += tile[j] < mine || (tile[j] == mine && begin + j < i);",
        new="rank += tile[j] < mine;",
    ),
    _mutant(
        "sums-of-two-shifts",
        "sums of two threads are added that are relative to different maxima",
        old="bring_down_to(greater), other.bring_down_to(greater);",
        new="bring_down_to(greater);",
    ),
    _mutant(
        "totals-barrier",
        "the warps' sums are added before all are there",
        old="__syncthreads(); Total<R> all{};",
        new="Total<R> all{};",
    ),
]
