"""The dispatch: who is chosen, who refuses and why, and what forcing does."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import library, reasons
from fastseq.ops import crf
from fastseq.reasons import needs
from fastseq.registry import OPS, Backend, BackendError, Op, value_errors


def _samples(device: Any, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    yield torch.ones(3, dtype=dtype, device=device), 2.0


def _made_by(name: str) -> Any:
    """An implementation whose output says who made it: x * factor + len(name)."""
    return lambda x, factor: x * factor + len(name)


@pytest.fixture(scope="module")
def toy() -> Iterator[Op]:
    op = Op(
        "toy_scale(Tensor x, float factor) -> Tensor",
        reference=_made_by("reference"),
        eager=_made_by("eager"),
        fake=lambda x, factor: torch.empty_like(x),
        samples=_samples,
    )
    small = needs(device="cpu", dtype=(torch.float32,), limits=lambda x, factor: "too long" if len(x) > 4 else None)
    op.register(Backend("cpu", _made_by("cpu"), small))
    op.lazy("triton", "fastseq.nowhere:scale", needs(device="cuda"), lambda: "there is no triton here")
    yield op
    del OPS["toy_scale"]


def _maker(output: Tensor) -> str:
    return {3: "cpu", 5: "eager", 9: "reference"}[int(output[0])]


def test_the_first_backend_that_can_is_chosen(toy: Op) -> None:
    assert [b.name for b in toy.backends] == ["cpu", "triton", "eager", "reference"]
    assert _maker(toy(torch.zeros(3), 1.0)) == "cpu"
    assert _maker(toy(torch.zeros(5), 1.0)) == "eager"
    assert _maker(toy(torch.zeros(3, dtype=torch.float64), 1.0)) == "eager"
    assert _maker(torch.ops.fastseq.toy_scale(torch.zeros(3), 1.0)) == "cpu"


def test_backends_from_outside_are_tried_where_they_are_put(toy: Op) -> None:
    before = list(toy.backends)
    try:
        toy.register(Backend("fpga", _made_by("fpga"), lambda *_: None), before="cpu")
        toy.register(Backend("late", _made_by("late"), lambda *_: None))
        toy.register(Backend("shy", _made_by("shy"), lambda *_: None, automatic=False), before="fpga")
        names = [b.name for b in toy.backends]
        assert names == ["shy", "fpga", "cpu", "triton", "late", "eager", "reference"]
        assert toy.choose(torch.zeros(3), 1.0).name == "fpga"
        with fastseq.use("shy"):
            assert int(toy(torch.zeros(1), 1.0)) == len("shy")
        with pytest.raises(ValueError, match="toy_scale has one named 'fpga' already"):
            toy.register(Backend("fpga", _made_by("fpga"), lambda *_: None))
        with pytest.raises(ValueError, match="before: got 'tpu', wanted one of shy, fpga, cpu"):
            toy.register(Backend("new", _made_by("new"), lambda *_: None), before="tpu")
    finally:
        toy.backends[:] = before


def test_the_machine_is_asked_only_about_arguments_that_fit(toy: Op) -> None:
    """Asking for a CUDA device wakes the driver up, after which a process can no longer be forked."""
    before = list(toy.backends)

    def never() -> str | None:
        raise AssertionError("asked")

    try:
        toy.register(Backend("gpu", _made_by("gpu"), needs(device="cuda"), never), before="cpu")
        assert toy.choose(torch.zeros(3), 1.0).name == "cpu"
    finally:
        toy.backends[:] = before


def test_explain_has_a_reason_for_each(toy: Op) -> None:
    lines = fastseq.explain("toy_scale", torch.zeros(5), 1.0).splitlines()
    assert [line.split(None, 1) for line in lines] == [
        ["cpu", "too long"],
        ["triton", "there is no triton here"],
        ["eager", "ok"],
        ["reference", "ok"],
    ]
    assert "needs one of float32, got torch.float64" in toy.explain(torch.zeros(3).double(), 1.0)
    assert "needs a cpu tensor, got one on meta" in toy.explain(torch.zeros(3, device="meta"), 1.0)
    with pytest.raises(ValueError, match=r"op_name: got 'nothing', wanted one of .*toy_scale"):
        fastseq.explain("nothing")


def test_forcing_is_for_the_block_and_nests(toy: Op) -> None:
    x = torch.zeros(3)
    with fastseq.use("eager"):
        assert _maker(toy(x, 1.0)) == "eager"
        with fastseq.use("reference"):
            assert _maker(toy(x, 1.0)) == "reference"
        assert _maker(toy(x, 1.0)) == "eager"
    assert _maker(toy(x, 1.0)) == "cpu"


def test_forcing_never_falls_back(toy: Op) -> None:
    with (
        fastseq.use("cpu"),
        pytest.raises(BackendError, match=r"(?s)'cpu' cannot run toy_scale.*cpu +too long.*eager +ok"),
    ):
        toy(torch.zeros(5), 1.0)
    with fastseq.use("triton"), pytest.raises(BackendError, match="there is no triton here"):
        toy(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"backend: got 'gpu', wanted one of cpu, .*reference, .*triton"):
        fastseq.use("gpu").__enter__()


@pytest.mark.parametrize("forced", ["eager", "reference", None])
@pytest.mark.parametrize("loss", [crf.nll, crf.nll_grad, crf.log_likelihood], ids=["nll", "nll_grad", "likelihood"])
def test_backward_runs_on_the_backend_of_forward(loss: Any, forced: str | None, chosen: list[str]) -> None:
    """In another thread, as autograd runs the backward pass of a GPU's tensors, and under another `use`."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    args = [x, None, None, torch.randn(4, 4), torch.randn(4), torch.randn(4)]
    args += [] if loss is crf.nll else [None, 1.0]
    default = crf.nll_grad.choose(*args[:6], None, 1.0).name

    def forward() -> Tensor:
        output = loss(*args)
        total = (output[0] if isinstance(output, tuple) else output).sum()
        return -total if loss is crf.log_likelihood else total

    chosen.clear()
    if forced is None:
        total = forward()
    else:
        with fastseq.use(forced):
            total = forward()
    failed: list[BaseException] = []

    def backward() -> None:
        try:
            for _ in range(2):  # the second pass computes anew what the first handed over
                total.backward(retain_graph=True)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    with fastseq.use("cpu" if library.loaded("cpu") and forced is not None else "eager"):
        total.backward()
    assert not failed
    assert len(chosen) == (4 if loss is crf.nll else 3)  # nll_grad hands the gradient of the first pass over
    assert set(chosen) == {forced or default}
    with fastseq.use("eager"):  # and nothing of it stays behind
        assert crf.nll.choose(*args[:6]).name == "eager"


def test_forced_and_inside_compile(toy: Op) -> None:
    """The choice is made below the op boundary, anew for each call of one compiled graph."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: toy(x, 1.0), fullgraph=True, backend=count)
    assert _maker(compiled(torch.zeros(3))) == "cpu"
    with fastseq.use("eager"):
        assert _maker(compiled(torch.zeros(3))) == "eager"
    assert len(graphs) == 1


def test_errors_of_the_library_are_value_errors(toy: Op) -> None:
    def fails(message: str) -> Any:
        def run() -> None:
            raise RuntimeError(message)

        return run

    with pytest.raises(ValueError, match=r"^tags: got 7, wanted 0 to 3$"):
        value_errors(fails("fastseq: tags: got 7, wanted 0 to 3\nException raised from f"))()
    with pytest.raises(RuntimeError, match="out of memory"):
        value_errors(fails("out of memory"))()


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_a_reference_and_an_eager_backend(name: str) -> None:
    names = [b.name for b in OPS[name].backends]
    assert names[-2:] == ["eager", "reference"]
    assert not OPS[name].backends[-1].automatic
    assert torch.Tag.pt2_compliant_tag in OPS[name].torch_op.tags


def test_a_missing_library_has_a_reason() -> None:
    for device in ("cpu", "cuda"):
        reason = library.why_not(device)
        assert reason is None or reason


# ---- GPUs: what can be checked without one ---------------------------------------------------------------------------


class _OnGpu:
    """All that a `why_not` looks at in a tensor on a GPU."""

    device, dtype, is_cuda = torch.device("cuda", 1), torch.float32, True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that says what GPU there is, and why the CUDA library cannot run on it."""

    def forget() -> None:
        reasons._capability.cache_clear()
        reasons._library_cannot_run.cache_clear()

    def set_up(capability: tuple[int, int], reason: str | None = None) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(library, "cannot_run", lambda found: f"{reason} sm_{found}" if reason else None)

    yield set_up
    forget()


def test_needs_a_capability(gpu: Any) -> None:
    why_not = needs(device="cuda", capability=(8, 0), limits=lambda x, n: f"n: {n}" if n else None)
    gpu((7, 5))
    assert why_not(_OnGpu(), 0) == "needs a GPU of sm_80 or later, this one is sm_75"
    assert why_not(torch.zeros(1), 0) == "needs a cuda tensor, got one on cpu"
    gpu((8, 0))
    assert why_not(_OnGpu(), 0) is None
    assert why_not(_OnGpu(), 3) == "n: 3"


def test_the_compiled_cuda_backend_has_both_reasons(toy: Op, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(toy.backends)
    monkeypatch.setattr(library, "why_not", lambda device: None)
    namespace = types.SimpleNamespace(toy_scale=types.SimpleNamespace(default=_made_by("cuda")))
    monkeypatch.setattr(torch.ops, "fastseq_cuda", namespace, raising=False)
    try:
        toy.compiled("cuda", needs(device="cuda"))
        backend = next(b for b in toy.backends if b.name == "cuda")
        gpu((7, 0), "no code for")
        assert backend.why_not(_OnGpu(), 1.0) == "no code for sm_(7, 0)"
        assert backend.why_not(torch.zeros(1), 1.0) == "needs a cuda tensor, got one on cpu"
        gpu((8, 0))
        assert backend.why_not(_OnGpu(), 1.0) is None
        assert backend.available() == reasons.no_cuda()
        assert [b.name for b in toy.backends if b.automatic] == ["cpu", "triton", "cuda", "eager"]
    finally:
        toy.backends[:] = before


@pytest.mark.parametrize("there", [False, True])
def test_no_cuda_has_the_drivers_words(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", None)
    without = reasons.no_cuda.__wrapped__()
    assert without == f"torch finds no CUDA device: torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    words = "torch finds no CUDA device: Found no NVIDIA driver on your system."
    assert reasons.no_cuda.__wrapped__() == (None if there else words)
