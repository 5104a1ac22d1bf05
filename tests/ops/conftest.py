"""What the tests of ops share: the backends in turn, and random batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.registry import OPS
from fastseq.testing import backend_of

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced; skips what this machine does not have."""
    reason = backend_of(OPS["crf_nll"], request.param).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(request.param):
        yield request.param


def _random_case(b: int, t: int, k: int, *, scale: float = 1.0) -> Case:
    """Float32, ragged on the right, the first row full."""
    lengths = torch.randint((t + 1) // 2, t + 1, (b, 1))
    lengths[0] = t
    tensors = [torch.randn(shape) * scale for shape in ((b, t, k), (k, k), (k,), (k,))]
    return tensors[0], torch.randint(k, (b, t)), torch.arange(t) < lengths, *tensors[1:]  # type: ignore[return-value]


@pytest.fixture
def random_case() -> Callable[..., Case]:
    """A function of (b, t, k, scale=1) that makes a float32 batch, ragged on the right."""
    return _random_case
