"""What only a GPU can show: graphs, streams, devices, waits, memory, launches. Values are tested in tests/ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops import crf
from fastseq.testing import to_device

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
LONG_SLEEP = 50_000_000  # clock cycles of a GPU, some 30 ms


def train(x: Tensor, tags: Tensor, mask: Tensor, a: Tensor, s: Tensor, e: Tensor) -> list[Tensor]:
    """The loss and its gradients, through autograd."""
    leaves = [v.detach().requires_grad_() for v in (x, a, s, e)]
    loss = -crf.log_likelihood(leaves[0], tags, mask, *leaves[1:], None, 1.0)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def search(x: Tensor, tags: Tensor, mask: Tensor, a: Tensor, s: Tensor, e: Tensor) -> list[Tensor]:
    return list(crf.viterbi(x, mask, a, s, e))


both = pytest.mark.parametrize("call", [train, search])
Call = Callable[..., Sequence[Tensor]]


def same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """To the last bit: no kernel may depend on the order in which blocks run."""
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.cpu(), w.cpu(), rtol=0, atol=0, equal_nan=True)


@both
def test_runs_are_bitwise_equal(backend: str, call: Call, case: Any) -> None:
    args = to_device(case(0), "cuda")
    first = call(*args)
    for _ in range(4):
        same(call(*args), first)


@both
def test_a_captured_graph_is_replayed_with_new_data(backend: str, call: Call, case: Any) -> None:
    """Captured on one batch, replayed on others of the same shape and other lengths."""
    static = to_device(case(0), "cuda")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch's documentation asks: set-up work must not be captured
        for _ in range(3):
            call(*static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*static)
    for seed in (1, 2, 0):
        for buffer, value in zip(static, case(seed), strict=True):
            buffer.copy_(value)
        graph.replay()
        same(captured, call(*to_device(case(seed), "cuda")))


@both
def test_runs_on_the_current_stream(backend: str, call: Call, case: Any) -> None:
    """The inputs are ready only after a long sleep on a stream of their own: another stream would see zeros."""
    args = to_device(case(0), "cuda")
    wanted = call(*args)
    late = [torch.zeros_like(v) for v in args]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_SLEEP)
        for buffer, value in zip(late, args, strict=True):
            buffer.copy_(value)
        got = call(*late)
    assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    same(got, wanted)


@both
def test_runs_on_the_device_of_the_tensors(backend: str, call: Call, case: Any) -> None:
    """The current device is another one, and stays it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    wanted = call(*to_device(case(0), "cuda:0"))
    with torch.cuda.device(0):
        got = call(*to_device(case(0), "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {v.device for v in got} == {torch.device("cuda", 1)}
    for g, w in zip(got, wanted, strict=True):  # the two GPUs may be of two kinds
        torch.testing.assert_close(g.cpu(), w.cpu(), rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@both
def test_the_host_never_waits(backend: str, call: Call, case: Any) -> None:
    args = to_device(case(0), "cuda")
    call(*args)  # compiles, where the backend does that
    with _no_waiting():
        call(*args)


def test_memory_does_not_grow(backend: str, case: Any) -> None:
    """100 calls leave no byte allocated, and ask the driver for no more memory than the first did."""
    args = to_device(case(0), "cuda")
    for _ in range(3):
        train(*args), search(*args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        train(*args), search(*args)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def work_on_the_device(call: Callable[[], Any]) -> list[str]:
    """The names of all kernels, copies and fills that a call puts on the device; skips where nothing records them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one sets the profiler up, and may miss what comes meanwhile
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    if not names:
        pytest.skip("torch.profiler records no kernels here")
    return names


@pytest.mark.parametrize(("name", "limit"), [("nll", 4), ("nll_grad", 4), ("viterbi", 2)])
def test_a_call_is_few_launches(backend: str, name: str, limit: int, case: Any) -> None:
    x, tags, mask, *model = to_device(case(0), "cuda")
    calls = {
        "nll": lambda: crf.nll.run(x, tags, mask, *model),
        "nll_grad": lambda: crf.nll_grad.run(x, tags, mask, *model, None, 1.0),
        "viterbi": lambda: crf.viterbi.run(x, mask, *model),
    }
    names = work_on_the_device(calls[name])
    assert len(names) <= limit, names


def test_a_training_step_is_few_launches(backend: str, case: Any) -> None:
    """Through autograd come torch's own, to negate the loss and to scale the gradients: as many at every shape."""
    args = to_device(case(0), "cuda")
    names = work_on_the_device(lambda: train(*args))
    assert len(names) <= 4 + 8, names


def test_backward_runs_on_the_forced_backend(backend: str, case: Any, chosen: list[str]) -> None:
    """Autograd has a thread for each GPU, which `use` does not reach by itself."""
    x, tags, mask, *model = to_device(case(0), "cuda")
    chosen.clear()
    crf.nll(x.requires_grad_(), tags, mask, *model).sum().backward()
    with fastseq.use("eager"):
        crf.nll(x, tags, mask, *model).sum().backward()
    assert chosen == [backend, backend, "eager", "eager"]
