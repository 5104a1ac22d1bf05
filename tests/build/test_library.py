"""The loader and the report: right where all is well, and in words where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastseq
from fastseq import _info, library

PACKAGE = Path(fastseq.__file__).parent
needs_library = pytest.mark.skipif(not library.loaded("cpu"), reason=f"cpu library: {library.why_not('cpu')}")


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Away from the source tree, and with the copy of fastseq that is under test here.
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(PACKAGE.parent)]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment | {"PYTHONPATH": path},
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        check=False,
    )


def _copy(folder: Path) -> Path:
    """A copy of the package to break; returns the folder to put on the path."""
    shutil.copytree(PACKAGE, folder / "fastseq", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_loaded_or_a_reason() -> None:
    for device in library.DEVICES:
        assert library.loaded(device) == (library.why_not(device) is None)
    assert library.why_not("abacus") == "there is no compiled library for 'abacus'"


@needs_library
def test_isa() -> None:
    assert library.isas()[0] == "baseline"
    before = library.isa()
    for name in library.isas():
        with library.use_isa(name):
            assert library.isa() == name
    assert library.isa() == before
    with pytest.raises(ValueError, match="name: got 'sse9', wanted one of baseline"), library.use_isa("sse9"):
        pass


@needs_library
def test_isa_from_the_environment() -> None:
    code = "from fastseq import library; print(library.isa())"
    assert _run("-W", "error", "-c", code, FASTSEQ_ISA="baseline").stdout.strip() == "baseline"
    refused = _run("-c", code, FASTSEQ_ISA="avx9000")
    assert refused.stdout.strip() == library.isas()[-1]
    assert "FASTSEQ_ISA: got 'avx9000', wanted one of baseline, avx2, avx512" in refused.stderr


def test_report() -> None:
    found = _info.report()
    assert set(found) == {"versions", "machine", "build", "libraries", "ops"}
    assert not [name for name, section in found.items() if "error" in section]
    assert found["ops"]["crf_nll" if "crf_nll" in found["ops"] else next(iter(found["ops"]))]["eager"] == "yes"


def test_info_prints_without_warnings() -> None:
    result = _run("-W", "error", "-m", "fastseq.info")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "eager" in result.stdout


def test_import_of_the_module_keeps_the_function() -> None:
    code = "import fastseq, fastseq.info; fastseq.info()"
    assert "versions" in _run("-c", code).stdout


def test_info_with_a_corrupt_library(tmp_path: Path) -> None:
    copy = _copy(tmp_path)
    (copy / "fastseq" / "lib").mkdir(exist_ok=True)
    broken = copy / "fastseq" / "lib" / "libfastseq_cpu.so"
    broken.unlink(missing_ok=True)
    broken.write_bytes(b"not a library")
    result = _run("-m", "fastseq.info", PYTHONPATH=str(copy))
    assert result.returncode == 0, result.stderr
    assert "built, but it cannot be loaded" in result.stdout
    assert "eager" in result.stdout


@pytest.mark.parametrize("package", ["torch", "numpy"])
def test_info_with_a_package_that_cannot_be_imported(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('this one is broken')")
    result = _run("-m", "fastseq.info", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "it cannot be imported: ImportError: this one is broken" in result.stdout
    assert "libraries" in result.stdout


def test_import_is_light() -> None:
    """Needs only torch and numpy, and adds little to torch's own import."""
    heavy = ["triton", "transformers", "accelerate", "matplotlib", "typer", "rich", "pydantic", "yaml"]
    code = f"""
import sys, torch
before = set(sys.modules)
import fastseq
print(sorted((set(sys.modules) - before) & set({heavy})))
"""
    assert _run("-c", code).stdout.strip() == "[]"


def test_import_is_fast() -> None:
    code = "import torch, time; t = time.perf_counter(); import fastseq; print(time.perf_counter() - t)"
    best = 9.0
    for _ in range(3):  # the first may be reading from a cold disk, or compiling the bytecode
        best = min(best, float(_run("-c", code).stdout))
        if best < 0.3:
            break
        time.sleep(1)
    assert best < 0.3
