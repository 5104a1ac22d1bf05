"""The dispatch: who is chosen, who refuses and why, and what forcing does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import library
from fastseq.registry import OPS, Backend, BackendError, Op, needs


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
    op.backends.insert(0, Backend("cpu", _made_by("cpu"), small))
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
    with pytest.raises(ValueError, match=r"backend: got 'gpu', wanted one of cpu, eager, reference, triton"):
        fastseq.use("gpu").__enter__()


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
    from fastseq.registry import _value_errors

    def fails(message: str) -> Any:
        def run() -> None:
            raise RuntimeError(message)

        return run

    with pytest.raises(ValueError, match=r"^tags: got 7, wanted 0 to 3$"):
        _value_errors(fails("fastseq: tags: got 7, wanted 0 to 3\nException raised from f"))()
    with pytest.raises(RuntimeError, match="out of memory"):
        _value_errors(fails("out of memory"))()


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
