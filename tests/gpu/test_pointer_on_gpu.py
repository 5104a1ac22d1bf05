"""The decoder's CUDA kernels on a GPU: sizes that the contract tests have no time for, graphs, streams, launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops.pointer import decoder
from fastseq.registry import OPS
from fastseq.testing import backend_of, to_device

pytestmark = pytest.mark.gpu

SIZES = [(4, 12, 400, 256, 128, 512, 512), (3, 40, 33, 17, 9, 33, 70), (2, 2, 6000, 8, 8, 12, 12)]  # B,T,S,H,E,M,A
LONG_SLEEP = 50_000_000  # clock cycles of a GPU, some 30 ms


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    """The compiled kernels; skips where they cannot run."""
    reason = backend_of(OPS["pointer_decoder"], "cuda").available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use("cuda"):
        yield


@pytest.fixture(params=SIZES, ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    result: tuple[int, ...] = request.param
    return result


def arguments(size: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The op's arguments on the CPU; sums of products stay near 1, so that no gate saturates."""
    b, t, s, h, e, m, a = size
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    mask = torch.arange(s) < torch.randint(1, s + 1, (b, 1), generator=g)
    state = normal(b, h), normal(b, h), normal(b, m), normal(b, s).abs()
    by = (h + e) ** -0.5
    weights = normal(e, m, scale=m**-0.5), normal(4 * h, e, scale=by), normal(4 * h, h, scale=by), normal(4 * h)
    attention = normal(a, 2 * h, scale=by), normal(a), normal(a), normal(a)
    return [normal(b, t, e), normal(b, s, m), normal(b, s, a), mask, *state, *weights, *attention]


def run(args: list[Any]) -> list[Tensor]:
    """All outputs, and the gradients of their weighted sum by all inputs."""
    leaves = [v.detach().requires_grad_() if v.is_floating_point() else v for v in args]
    outputs = decoder.decoder(*leaves)
    grads = [torch.linspace(-1, 1, o.numel(), device=o.device, dtype=o.dtype).view_as(o) for o in outputs]
    floats = [v for v in leaves if v.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, floats, grads)]


def kernels(args: list[Any]) -> list[Tensor]:
    """Both ops without autograd, whose sums of weights on a GPU are torch's."""
    outputs = decoder.decoder.run(*args)
    return [*outputs, *decoder.decoder_grad.run(*outputs, *args, *outputs[:5])]


def same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.cpu(), w.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
def test_values_are_those_of_the_cpu(size: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    args = arguments(size, 0, dtype)
    got = run(to_device(args, "cuda"))
    with fastseq.use("eager"):
        wanted = run([a.double() if a.is_floating_point() else a for a in args])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=tolerance, atol=tolerance * float(w.abs().max()))


def test_runs_are_bitwise_equal(size: tuple[int, ...]) -> None:
    args = to_device(arguments(size, 0), "cuda")
    first = kernels(args)
    for _ in range(4):
        same(kernels(args), first)


def test_a_captured_graph_is_replayed_with_new_data(size: tuple[int, ...]) -> None:
    static = to_device(arguments(size, 0), "cuda")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch's documentation asks: set-up work must not be captured
        kernels(static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels(static)
    for seed in (1, 0):
        for buffer, value in zip(static, arguments(size, seed), strict=True):
            buffer.copy_(value)
        graph.replay()
        same(captured, kernels(to_device(arguments(size, seed), "cuda")))


def test_runs_on_the_current_stream(size: tuple[int, ...]) -> None:
    """The inputs are ready only after a long sleep on a stream of their own: another stream would see zeros."""
    args = to_device(arguments(size, 0), "cuda")
    wanted = kernels(args)
    late = [torch.zeros_like(v) for v in args]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_SLEEP)
        for buffer, value in zip(late, args, strict=True):
            buffer.copy_(value)
        got = kernels(late)
    assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    same(got, wanted)


def test_all_steps_are_five_launches(size: tuple[int, ...]) -> None:
    args = to_device(arguments(size, 0), "cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one sets the profiler up, and may miss what comes meanwhile
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            kernels(args)
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    if not names:
        pytest.skip("torch.profiler records no kernels here")
    assert len(names) == 1 + 4, names
