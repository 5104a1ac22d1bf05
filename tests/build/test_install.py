"""The package as pip installs it from a copy of the source tree: pure, without a compiler, compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("benchmarks", "build_backend", "csrc", "fastseq")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree"),
]

SMOKE = """
import torch, fastseq
crf = fastseq.nn.CRF(5)
loss = -crf(torch.randn(7, 3, 5), torch.zeros(7, 3, dtype=torch.int64))
loss.backward()
assert torch.isfinite(loss) and torch.isfinite(crf.transitions.grad).all()
assert len(crf.decode(torch.randn(7, 3, 5))) == 3
assert [len(b) for b in fastseq.host.bucket_batches([3, 1, 2, 2], 2, 0)] == [2, 2]
print(fastseq.library.loaded("cpu"))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy, so that neither this build nor the checkout's files get into each other."""
    copy = tmp_path / "source"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "lib")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in PARTS:
        shutil.copy(ROOT / name, copy)
    return copy


def _install(source: Path, **environment: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    target = source.parent / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target"]
    result = subprocess.run(
        [*command, str(target), str(source)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return target, result


def _python(target: Path, *arguments: str) -> str:
    """What a new Python prints that has the installed copy in front of all else."""
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=os.environ | {"PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_none_gives_a_working_pure_package(source: Path) -> None:
    target, result = _install(source, FASTSEQ_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert not list(target.rglob("*.so"))
    assert (target / "fastseq" / "py.typed").exists()
    assert (target / "fastseq_benchmarks" / "__init__.py").exists()
    assert "Root-Is-Purelib: true" in next(target.glob("*.dist-info/WHEEL")).read_text()
    assert _python(target, "-c", SMOKE).strip() == "False"
    assert "FASTSEQ_BUILD=none" in _python(target, "-m", "fastseq.info")


def test_no_compiler_gives_the_pure_package_and_the_reason(source: Path) -> None:
    target, result = _install(source, FASTSEQ_BUILD="auto", CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert _python(target, "-c", SMOKE).strip() == "False"
    assert "no C++ compiler was found (looked for /nonexistent/c++)" in _python(target, "-m", "fastseq.info")


def test_no_compiler_is_an_error_where_the_library_is_asked_for(source: Path) -> None:
    _, result = _install(source, FASTSEQ_BUILD="cpu", CXX="/nonexistent/c++")
    assert result.returncode != 0
    assert "FASTSEQ_BUILD=cpu, but no C++ compiler was found" in result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_source_that_does_not_compile_gives_the_pure_package(source: Path) -> None:
    # The first that is compiled: the test then takes seconds.
    (source / "csrc" / "common" / "cpu_features.cpp").write_text("this is not C++\n")
    target, result = _install(source, FASTSEQ_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert not list(target.rglob("*.so"))
    assert "compiling failed" in _python(target, "-m", "fastseq.info")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled(source: Path) -> None:
    target, result = _install(source, FASTSEQ_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    assert _python(target, "-c", SMOKE).strip() == "True"
    _check_instruction_sets(target / "fastseq" / "lib" / "libfastseq_cpu.so")


def _check_instruction_sets(library: Path) -> None:
    """No function outside the namespaces of the wide variants uses their registers: old CPUs call those."""
    if shutil.which("objdump") is None:
        return
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    function = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif "%zmm" in line or "%k1" in line:
            assert "avx512" in function, f"{function} {line}"
        elif "%ymm" in line:
            assert "avx512" in function or "avx2" in function, f"{function} {line}"
