"""The Triton kernels: in the interpreter, compiled for GPUs that are not here, and, where there is one, on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq
from fastseq.ops import crf
from fastseq.registry import OPS
from fastseq.testing import compare, sample_inputs

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FAMILIES = ("crf", "pointer", "attention")
NAMES = ("crf_nll", "crf_nll_grad", "crf_viterbi", "pointer_nll", "pointer_nll_grad")
NAMES += ("attention", "attention_grad", "disentangled_attention", "disentangled_attention_grad")
HOSTS = {  # the module of the backend `triton`, and that of what it launches with, by the beginning of an op's name
    "crf": ("fastseq.ops.crf.triton",) * 2,
    "pointer": ("fastseq.ops.pointer.nll.triton",) * 2,
    "attention": ("fastseq.ops.attention.dot_product.triton", "fastseq.ops.attention.triton_call"),
    "disentangled": ("fastseq.ops.attention.disentangled.triton", "fastseq.ops.attention.triton_call"),
}


def _child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python, with the fastseq that is tested here."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastseq.__file__).parents[1]), **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def _interpret(family: str, *, whole: bool) -> None:
    file = str(HERE / f"triton_{family}_interpret.py")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", file)
    child = _child(*arguments, TRITON_INTERPRET="1", FASTSEQ_ALL_SAMPLES=str(int(whole)))
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout
    assert "skipped" not in child.stdout


@needs_triton
@pytest.mark.timeout(1200)  # a minute on a machine that does nothing else
@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_interpreter(family: str) -> None:
    _interpret(family, whole=False)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_samples_in_the_interpreter(family: str) -> None:
    _interpret(family, whole=True)


def test_fastseq_does_not_import_triton() -> None:
    """And no op does, until one is run by it."""
    code = "import sys, fastseq; fastseq.info(); assert 'triton' not in sys.modules"
    child = _child("-c", code)
    assert child.returncode == 0, child.stderr


# ---- compiled for GPUs that are not here -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler() -> Any:
    """The module triton_compile, beside this file."""
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("triton_compile", HERE / "triton_compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_compile"] = module  # for the child processes of `main`
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(compiler: Any) -> dict[str, dict[str, int]]:
    """The table of resources, by case; skips where another Triton is installed than it was made with."""
    import triton

    table = json.loads(compiler.TABLE.read_text(encoding="utf-8"))
    if table["triton"] != triton.__version__:
        pytest.skip(f"triton {triton.__version__} is installed, and the table is that of {table['triton']}")
    rows: dict[str, dict[str, int]] = table["kernels"]
    return rows


def test_the_table_is_of_these_cases_and_nothing_spills(compiler: Any, recorded: dict[str, dict[str, int]]) -> None:
    """But float64 Viterbi of more than 64 tags: its transitions alone are half of all registers of a multiprocessor.

    And attention, where sizes are those that are fastest, except in its usual forms.
    """
    assert set(recorded) == {compiler.name_of(case) for case in compiler.cases()}
    spills = {name for name, row in recorded.items() if row["stack"]}
    attention = {compiler.name_of(case) for case in compiler.triton_attention_cases.cases()}
    assert {name for name in spills - attention if not name.startswith("viterbi grad fp64 128")} == set()
    usual = {name for name in attention if re.search("(plain|causal) bf16 64", name)}
    assert usual & spills == set()
    assert max(row["shared"] for name, row in recorded.items() if name.endswith("sm_75")) <= 64 << 10
    assert max(row["shared"] for row in recorded.values()) <= 99 << 10  # what sm_86, sm_89 and sm_120 have


FEW = [
    ("sweep", "grad", "fp32", 128, 90),
    ("sweep", "odd", "fp32", 16, 75),
    ("posterior", "grad", "bf16", 128, 90),
    ("posterior", "grad", "fp32", 128, 75),
    ("exact", "grad", "fp32", 128, 90),
    ("reduce", "grad", "fp32", 16, 120),
    ("viterbi", "grad", "fp32", 128, 100),
    ("rows", "copynet", "fp32", 256, 120),
    ("scores", "pointer", "fp32", 256, 90),
    ("hidden_gradient", "pointer", "fp32", 256, 80),
    ("hidden_gradient", "pointer", "bf16+", 256, 90),
    ("weight_gradient", "pointer", "fp32", 256, 90),
    ("weight_gradient", "pointer", "bf16+", 256, 80),
    ("forward", "plain", "bf16", 64, 90),
    ("query_gradient", "positions", "bf16", 64, 80),
]


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_compiles_within_its_resources(compiler: Any, recorded: dict[str, dict[str, int]], case: Any) -> None:
    case = next(c for c in compiler.cases() if tuple(c) == case)
    assert compiler.excess(compiler.resources(case), recorded[compiler.name_of(case)]) == []


@pytest.mark.parametrize("architecture", [80, 90])
def test_attention_is_products_on_tensor_cores(compiler: Any, architecture: int) -> None:
    """Two a tile of scores forward, in code for masked tiles and for others."""
    case = next(c for c in compiler.cases() if tuple(c) == ("forward", "plain", "bf16", 64, architecture))
    assert compiler.tensor_core_products(case) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_compile_within_their_resources(recorded: dict[str, dict[str, int]]) -> None:
    child = _child(str(HERE / "triton_compile.py"))
    assert child.returncode == 0, child.stdout + child.stderr


# ---- the host's part -------------------------------------------------------------------------------------------------


def _host(name: str) -> tuple[Any, Any]:
    """The function that the backend `triton` of an op calls, and the module that launches kernels for it."""
    family, _, rest = name.partition("_")
    package, launcher = HOSTS[family]
    function = rest if family in ("crf", "pointer") else name
    return getattr(importlib.import_module(package), function), importlib.import_module(launcher)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_never_waits_for_a_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On the meta device there are no values to wait for: what reads one fails. Shapes and dtypes are the op's."""
    host, launcher = _host(name)
    monkeypatch.setattr(launcher, "_launch", lambda *args, **constants: None)
    for args in sample_inputs(name, dtype=torch.bfloat16):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        if OPS[name].name.startswith("pointer") and meta[8]:
            continue  # label smoothing, which the kernels have not
        got, wanted = host(*meta), OPS[name].torch_op(*meta)
        for g, w in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (got, wanted)), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            assert g.stride() == w.stride() or not g.numel()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("k", [9, 128])
def test_a_cuda_graph_replays_on_new_numbers(k: int, random_case: Callable[..., Any]) -> None:
    from fastseq.ops.crf import triton as backend

    inputs, later = ([v.cuda() for v in random_case(8, 40, k)] for _ in range(2))
    later[0][0, 3] -= 1e4 * torch.arange(k, device="cuda")  # the exact kernel has a row to do
    backend.nll_grad(*inputs, None, 1.0)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = backend.nll_grad(*inputs, None, 1.0)
    for to, new in zip(inputs, later, strict=True):
        to.copy_(new)
    graph.replay()
    again = backend.nll_grad(*later, None, 1.0)
    compare([o.cpu() for o in outputs], [o.cpu() for o in again], 0.0)
    compare([o.cpu() for o in outputs], crf.eager.nll_grad(*(v.cpu() for v in later), None, 1.0), 3e-5)
