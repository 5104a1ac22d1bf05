"""The two statistics a benchmark needs: a median with its confidence interval, and ratios paired by round."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

__all__ = ["Estimate", "estimate", "paired_ratio"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A median, and the interval that holds the true one with 95 % confidence."""

    median: float
    low: float
    high: float


def estimate(samples: Sequence[float]) -> Estimate:
    """The median and its distribution-free 95 % interval, from order statistics.

    The number X of samples below the true median is Binomial(n, 1/2), whatever their distribution, so the
    interval from the k-th smallest to the k-th largest misses it with probability 2 P(X < k). The largest k
    for which that is at most 5 % is taken. Under 6 samples there is none: the interval is the whole range.
    """
    if not samples:
        raise ValueError("samples: got none, wanted at least one")
    ordered, n = sorted(samples), len(samples)
    k, missed = 0, 2 * 0.5**n
    while missed <= 0.05:  # missed = 2 P(X <= k): what the interval from the (k+1)-th would miss
        k += 1
        missed += 2 * math.comb(n, k) * 0.5**n
    k = max(k - 1, 0)
    return Estimate(statistics.median(ordered), ordered[k], ordered[n - 1 - k])


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of two tracks, taken round by round: what slows a whole round down cancels out."""
    return estimate([a / b for a, b in zip(numerators, denominators, strict=True)])
