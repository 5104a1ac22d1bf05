"""The kernels on a GPU: each fused backend in turn, forced; parity with the reference is in tests/ops, marked gpu."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.registry import OPS
from fastseq.testing import backend_of, to_device

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that is made of kernels; skips what this machine does not have."""
    reason = backend_of(OPS["crf_nll"], request.param).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(request.param):
        yield request.param


@pytest.fixture(params=[(32, 64, 9), (5, 33, 16), (8, 50, 25), (7, 40, 64), (3, 21, 128), (3, 12, 160)], ids=str)
def case(request: pytest.FixtureRequest, backend: str) -> Callable[[int], Case]:
    """A function of a seed: a float32 batch on the CPU, the shapes one for each way that kernels lay a sequence out."""
    b, t, k = request.param

    def make(seed: int) -> Case:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, t + 1, (b, 1), generator=g)
        x, a, s, e = (torch.randn(shape, generator=g) for shape in ((b, t, k), (k, k), (k,), (k,)))
        return x, torch.randint(k, (b, t), generator=g), torch.arange(t) < lengths, a, s, e

    reason = backend_of(OPS["crf_nll"], backend).why_not(*to_device(make(0), "cuda"))
    if reason is not None:
        pytest.skip(reason)
    return make
