"""The build's decisions, without building: what it requires, which torch it finds, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "build_backend"


def _import(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BACKEND / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def find() -> ModuleType:
    return _import("fastseq_find")


@pytest.fixture
def native(find: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("FASTSEQ_BUILD", raising=False)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    _import("fastseq_cuda")
    return _import("fastseq_native")


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.13.0+cpu", True), ("2.14.1", True), ("2.12.1", False), ("2.15.0a0", False), ("3.0", False)],
)
def test_torch_versions(find: ModuleType, version: str, fits: bool) -> None:
    assert find.satisfies(version, "torch>=2.13,<2.15") is fits


def test_torch_requirement_is_the_package_s(find: ModuleType) -> None:
    assert find.torch_requirement().startswith("torch>=2.13")


@pytest.mark.parametrize(("there", "wanted"), [(True, []), (False, ["torch>=2.13,<2.15", "cmake>=3.24", "ninja"])])
def test_requires_only_what_is_missing(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, there: bool, wanted: list[str]
) -> None:
    backend = _import("fastseq_backend")
    monkeypatch.setattr(backend, "find_torch", lambda: Path("torch") if there else None)
    monkeypatch.setattr(backend, "find_tool", lambda name: name if there else None)
    assert backend.requirements() == wanted
    monkeypatch.setenv("FASTSEQ_BUILD", "none")
    assert backend.requirements() == []


def test_finds_the_target_s_torch_under_isolation(tmp_path: Path) -> None:
    """As pip does it: a sitecustomize on PYTHONPATH takes the environment's packages off the path."""
    import torch

    hide = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    (tmp_path / "sitecustomize.py").write_text(hide)
    code = """
import importlib.util, fastseq_find
print(importlib.util.find_spec("torch") is None, fastseq_find.find_torch())
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{BACKEND}", "PYTHONNOUSERSITE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    hidden, found = result.stdout.split()
    assert hidden == "True"
    assert Path(found) == Path(torch.__file__).parent


def test_a_torch_that_does_not_fit_is_not_found(find: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "torch_requirement", lambda: "torch>=99.0")
    assert find.find_torch() is None


def test_refuses_modes(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BUILD", "fast")
    with pytest.raises(SystemExit, match="got 'fast', wanted one of auto, cpu, cuda, require-cuda, none"):
        native.build_mode()


def test_jobs(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= native.jobs() <= (os.cpu_count() or 1)
    monkeypatch.setenv("MAX_JOBS", "7")
    assert native.jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    assert native.jobs() <= (os.cpu_count() or 1)


def test_record_of_a_build_of_nothing(native: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    old = tmp_path / "lib" / "libfastseq_cpu.so"
    old.write_text("from an earlier build")
    monkeypatch.setenv("FASTSEQ_BUILD", "none")
    record = native.build(tmp_path, tmp_path / "scratch")
    assert not old.exists()
    assert record == json.loads((tmp_path / "lib" / "build.json").read_text())
    assert record["built"] == []
    assert {"FASTSEQ_BUILD=none" in record["left_out"][name] for name in ("cpu", "cuda", "host")} == {True}


def test_a_failed_compile(native: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Left out in auto, with the compiler's own first error; an error in cpu."""

    def fail(package: Path, scratch: Path, record: object) -> None:
        native._run("compiling", [sys.executable, "-c", "print('x.cpp:3: error: no such thing'); raise SystemExit(1)"])

    monkeypatch.setattr(native, "_compile", fail)
    record = native.build(tmp_path, tmp_path / "scratch")
    assert record["built"] == []
    assert record["left_out"]["cpu"] == "compiling failed: x.cpp:3: error: no such thing"
    assert "cuda" in record["left_out"]
    monkeypatch.setenv("FASTSEQ_BUILD", "cpu")
    with pytest.raises(SystemExit, match="no such thing"):
        native.build(tmp_path, tmp_path / "scratch")
