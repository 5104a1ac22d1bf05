"""What the tests of ops share: the backends in turn, each on its devices, and random batches.

The CUDA kernels are here twice: as the backend cuda, for which a GPU is needed, and as the backend emulator, which is
the same source compiled for the CPU and registered for these tests alone; nothing chooses it unless forced.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops import crf
from fastseq.ops.pointer import decoder, distribution
from fastseq.reasons import needs
from fastseq.registry import OPS, Backend, value_errors
from fastseq.testing import backend_of

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
EMULATED = {  # the types and sizes that a kernel can do, as its op says it of the backend cuda
    **dict.fromkeys(("crf_nll", "crf_nll_grad", "crf_viterbi"), (crf.FLOATS, crf.at_most(crf.CUDA_TAGS))),
    **dict.fromkeys(
        ("pointer_distribution", "pointer_distribution_grad"), (distribution.FLOATS, distribution.countable)
    ),
    **dict.fromkeys(("pointer_decoder", "pointer_decoder_grad"), (decoder.FLOATS, decoder.at_most(decoder.CUDA_SIZES))),
}


def _register_emulator() -> None:
    """Add the backend `emulator`; its library is built and loaded when a test first asks for it."""
    spec = importlib.util.spec_from_file_location("fastseq_emulator", Path(__file__).with_name("emulator.py"))
    assert spec is not None
    assert spec.loader is not None
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)

    def run(name: str) -> Callable[..., Any]:
        return lambda *args: value_errors(getattr(torch.ops.fastseq_emulator, name).default)(*args)

    for name, (dtypes, limits) in EMULATED.items():
        fits = needs(device="cpu", dtype=dtypes, limits=limits)
        OPS[name].register(Backend("emulator", run(name), fits, emulator.load, automatic=False, device="cpu"))


_register_emulator()


def _targets() -> list[Any]:
    """(backend, device) for each backend but the reference and each device that it is for."""
    return [
        pytest.param((b.name, device), id=f"{b.name}-{device}", marks=[pytest.mark.gpu] * (device == "cuda"))
        for b in OPS["crf_nll"].backends
        if b.name != "reference"
        for device in ([b.device] if b.device else ["cpu", "cuda"])
    ]


@pytest.fixture(params=_targets())
def _target(request: pytest.FixtureRequest) -> tuple[str, str]:
    target: tuple[str, str] = request.param
    return target


@pytest.fixture
def device(_target: tuple[str, str]) -> str:
    """The device that goes with `backend`."""
    return _target[1]


@pytest.fixture
def backend(_target: tuple[str, str]) -> Iterator[str]:
    """Each backend in turn, forced; skips what this machine does not have."""
    reason = backend_of(OPS["crf_nll"], _target[0]).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(_target[0]):
        yield _target[0]


@pytest.fixture
def has(backend: str) -> Callable[[str], bool]:
    """A function of an op's name: whether the forced backend has that op."""
    return lambda name: any(b.name == backend and b.available() is None for b in OPS[name].backends)


@pytest.fixture
def random_case(request: pytest.FixtureRequest) -> Callable[..., Case]:
    """A function of (b, t, k, scale=1): a float32 batch, ragged on the right, the first row full; on `device`."""
    place = request.getfixturevalue("device") if "_target" in request.fixturenames else "cpu"

    def random_case(b: int, t: int, k: int, *, scale: float = 1.0) -> Case:
        lengths = torch.randint((t + 1) // 2, t + 1, (b, 1))
        lengths[0] = t
        x, *parameters = [torch.randn(shape) * scale for shape in ((b, t, k), (k, k), (k,), (k,))]
        tags, mask = torch.randint(k, (b, t)), torch.arange(t) < lengths
        return tuple(v.to(place) for v in (x, tags, mask, *parameters))  # type: ignore[return-value]

    return random_case
