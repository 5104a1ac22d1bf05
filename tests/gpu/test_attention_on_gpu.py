"""Attention's Triton kernels on a GPU: sizes that the contract tests have no time for, graphs, streams, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops.attention import disentangled, dot_product
from fastseq.registry import OPS
from fastseq.testing import backend_of, to_device

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # compilation alone is a minute for all features

LONG_SLEEP = 50_000_000  # clock cycles of a GPU, some 30 ms
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
DEFAULTS: dict[str, Any] = {
    "bias": None, "slopes": None, "cu_q": None, "cu_k": None, "key_lengths": None, "seed": None, "max_q": 0, "max_k": 0,
    "scale": 0.125, "causal": False, "window_left": -1, "window_right": -1, "softcap": 0.0, "dropout": 0.0,
}  # fmt: skip
Make = Callable[[int, torch.dtype], list[Any]]


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    """The Triton kernels; skips where they cannot run."""
    reason = backend_of(OPS["attention"], "triton").available()
    if reason is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels are for sm_80 and later")
    with fastseq.use("triton"):
        yield


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(seed: int, dtype: torch.dtype, sq: int = 300, sk: int = 300, d: int = 64, **options: Any) -> list[Any]:
    """Three sequences, four heads of queries and two of keys; a bias by its shape."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, s, h, d, generator=g).to(dtype) for s, h in ((sq, 4), (sk, 2), (sk, 2)))
    chosen = DEFAULTS | {"max_q": sq, "max_k": sk} | options
    if chosen["bias"] is not None:
        chosen["bias"] = torch.randn(chosen["bias"], generator=g).to(dtype)
    if chosen["dropout"]:
        chosen["seed"] = torch.randint(2**62, (1,), generator=g)
    return [q, k, v, *chosen.values()]


def packed(seed: int, dtype: torch.dtype) -> list[Any]:
    """Five sequences, one of them empty, with tokens of no sequence on both sides, and everything else."""
    options = {"bias": (1, 4, 1, 300), "slopes": torch.linspace(0.1, 0.4, 4), "causal": True, "window_left": 150}
    case = dense(seed, dtype, dropout=0.2, softcap=3.0, **options)
    case[:3] = [x.reshape(1, 900, *x.shape[2:]) for x in case[:3]]
    case[5] = case[6] = integers(2, 130, 130, 400, 500, 790)
    case[7] = integers(128, 0, 200, 100, 290)
    return case


def positions(seed: int, dtype: torch.dtype) -> list[Any]:
    """Disentangled attention's arguments."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 300, 2, 64, generator=g).to(dtype) for _ in range(3))
    tables = (torch.randn(64, 2, 64, generator=g).to(dtype) for _ in range(2))
    distances = torch.arange(-310, 311)
    slots = (distances.sign() * (distances.abs() + 1.0).log2().mul(4).floor() + 32).clamp(0, 63).int()
    seed_of_dropout = torch.randint(2**62, (1,), generator=g)
    return [q, k, v, *tables, slots, None, integers(300, 123, 0), seed_of_dropout, 300, 0.07, 0.1]


CASES: dict[str, Make] = {
    "plain": dense,
    "causal": lambda s, t: dense(s, t, sk=430, causal=True),
    "some see nothing": lambda s, t: dense(s, t, sq=430, causal=True),
    "d 80": lambda s, t: dense(s, t, d=80, window_left=100, window_right=20),
    "d 256": lambda s, t: dense(s, t, d=256, causal=True, bias=(3, 4, 300, 300)),
    "key lengths": lambda s, t: dense(s, t, bias=(3, 1, 1, 300), key_lengths=integers(300, 77, 0)),
    "everything": packed,
    "positions": positions,
}


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Make:
    return CASES[request.param]


def kernels(args: list[Any]) -> list[Tensor]:
    """Both ops, without autograd: outputs, and the gradients for a gradient that is made of them."""
    if len(args) == 12:
        out, lse = disentangled.attend.run(*args)
        return [out, lse, *disentangled.attend_grad.run(out.flip(1), None, out, lse, *args)]
    out, lse = dot_product.attention.run(*args)
    return [out, lse, *dot_product.attention_grad.run(out.flip(1), None, out, lse, *args, True)]


def same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.cpu(), w.cpu(), rtol=0, atol=0)


def exact(args: list[Any], results: list[Tensor]) -> list[Tensor]:
    """What `kernels` should have found: eager's, in float64, with the same gradients coming in."""
    args = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    came = results[0].flip(1).double()
    with fastseq.use("eager"):
        if len(args) == 12:
            out, lse = disentangled.attend.run(*args)
            return [out, lse, *disentangled.attend_grad.run(came, None, out, lse, *args)]
        out, lse = dot_product.attention.run(*args)
        return [out, lse, *dot_product.attention_grad.run(came, None, out, lse, *args, True)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_are_those_of_float64(make: Make, dtype: torch.dtype) -> None:
    args = list(to_device(make(0, dtype), "cuda"))
    got = kernels(args)
    for g, w in zip(got, exact(args, got), strict=True):
        limit = TOLERANCES[dtype]
        scale = float(w.masked_fill(w.isinf(), 0).abs().max()) if w.numel() else 0.0
        torch.testing.assert_close(g.double(), w, rtol=limit, atol=limit * max(scale, 1.0))


def test_runs_are_bitwise_equal(make: Make) -> None:
    args = list(to_device(make(0, torch.bfloat16), "cuda"))
    first = kernels(args)
    for _ in range(4):
        same(kernels(args), first)


def test_a_captured_graph_is_replayed_with_new_data(make: Make) -> None:
    static = list(to_device(make(0, torch.bfloat16), "cuda"))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch's documentation asks: set-up work must not be captured
        kernels(static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels(static)
    for seed in (1, 0):
        later = make(seed, torch.bfloat16)
        for buffer, value in zip(static, later, strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
        graph.replay()
        same(captured, kernels(list(to_device(later, "cuda"))))


def test_runs_on_the_current_stream(make: Make) -> None:
    """The inputs are ready only after a long sleep on a stream of their own: another stream would see zeros."""
    args = list(to_device(make(0, torch.bfloat16), "cuda"))
    wanted = kernels(args)
    late = [torch.zeros_like(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_SLEEP)
        for buffer, value in zip(late, args, strict=True):
            if isinstance(value, Tensor) and value.is_floating_point():
                buffer.copy_(value)
        got = kernels(late)
    assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    same(got, wanted)


def test_forward_is_one_launch_and_backward_three() -> None:
    args = list(to_device(dense(0, torch.bfloat16), "cuda"))
    grad = torch.randn_like(args[0])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one sets the profiler up, and may miss what comes meanwhile
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            out, lse = dot_product.attention.run(*args)
            dot_product.attention_grad.run(grad, None, out, lse, *args, False)
            torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    if not names:
        pytest.skip("torch.profiler records no kernels here")
    assert [n for n in names if "Sync" not in n] == ["forward", "delta", "key_gradient", "query_gradient"]


def test_no_tensor_of_all_scores_is_made() -> None:
    """Forward and backward of 8192 positions take no more than a few tensors of the size of q."""
    args = list(to_device(dense(0, torch.bfloat16, sq=8192, sk=8192, causal=True), "cuda"))
    kernels(args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels(args)
    torch.cuda.synchronize()
    size = args[0].numel() * args[0].element_size()
    assert torch.cuda.max_memory_allocated() - before < 8 * size
