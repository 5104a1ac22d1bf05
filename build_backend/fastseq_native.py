"""Compile what can be compiled with CMake and ninja, and write down what was left out and why.

FASTSEQ_BUILD says what is wanted, see `MODES`. Nothing here imports torch, asks whether a GPU is present, or downloads
anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastseq_cuda
from fastseq_find import ROOT, BuildError, find_compiler, find_tool, find_torch, torch_requirement, torch_version

MODES = {
    "auto": "what can be built: the CPU library; the CUDA library where there is nvcc and torch is built for CUDA",
    "cpu": "the CPU library, or an error",
    "cuda": "the CPU and the CUDA library, or an error; the latter against any torch",
    "require-cuda": "the same, and an error too where torch is not built for CUDA",
    "none": "nothing",
}
GIB_PER_JOB = 1.5


def build_mode() -> str:
    """The value of FASTSEQ_BUILD, checked.

    Raises:
        SystemExit: It is none of `MODES`.
    """
    mode = os.environ.get("FASTSEQ_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"FASTSEQ_BUILD: got {mode!r}, wanted one of {', '.join(MODES)}")
    return mode


def jobs() -> int:
    """MAX_JOBS, else one for each core, as far as the free memory reaches."""
    given = os.environ.get("MAX_JOBS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        available = None
    by_memory = int(int(available.group(1)) / 2**20 / GIB_PER_JOB) if available else cores
    return max(1, min(cores, by_memory))


def build(package: Path, scratch: Path) -> dict[str, Any]:
    """Compile into the folder `package`, with CMake's own files in `scratch`; return the build record.

    The record is also written to `package`/lib/build.json. It has no date or path: equal builds have equal
    records.

    Raises:
        SystemExit: Something failed, and FASTSEQ_BUILD does not allow leaving it out.
    """
    mode = build_mode()
    record: dict[str, Any] = {"mode": mode, "python": platform.python_version(), "built": [], "left_out": {}}
    _remove_old(package)
    if mode == "none":
        reason = "FASTSEQ_BUILD=none asked for the pure Python package"
        record["left_out"] |= dict.fromkeys(("cpu", "cuda", "host"), reason)
    else:
        _build_libraries(package, scratch, record)
    (package / "lib").mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    (package / "lib" / "build.json").write_text(text, encoding="utf-8")
    return record


def _build_libraries(package: Path, scratch: Path, record: dict[str, Any]) -> None:
    cuda = None
    if record["mode"] == "cpu":
        record["left_out"]["cuda"] = "FASTSEQ_BUILD=cpu asked for the CPU library alone"
    else:
        with _or_leave_out(record, "cuda"):
            cuda = fastseq_cuda.plan(record["mode"], find_torch())
    with _or_leave_out(record, "cpu", "host"):
        _compile(package, scratch, record)
    if cuda is not None:
        with _or_leave_out(record, "cuda"):
            _compile_cuda(package, scratch, record, cuda)


@contextlib.contextmanager
def _or_leave_out(record: dict[str, Any], *names: str) -> Iterator[None]:
    """Write down under `names` why the block failed; stop the build where FASTSEQ_BUILD asks for them."""
    try:
        yield
    except BuildError as error:
        if record["mode"] != "auto":
            raise SystemExit(f"fastseq: FASTSEQ_BUILD={record['mode']}, but {error}") from None
        record["built"] = [name for name in record["built"] if name not in names]
        record["left_out"] |= dict.fromkeys(names, str(error))


def _remove_old(package: Path) -> None:
    """Delete what an earlier build left: a record must never describe another build's library."""
    for old in [*package.glob("lib/*"), *package.glob("_host.*")]:
        if old.suffix in {".so", ".json"}:
            old.unlink()


def _compile(package: Path, scratch: Path, record: dict[str, Any]) -> None:
    torch = find_torch()
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if sys.platform == "win32":
        raise BuildError("the compiled library is not made for Windows yet")
    if torch is None:
        raise BuildError(f"no installed {torch_requirement()} was found to build against")
    if cmake is None or ninja is None:
        missing = "CMake 3.24 or later" if cmake is None else "ninja"
        raise BuildError(f"no {missing} was found (pip install cmake ninja)")
    if find_compiler() is None:
        looked = os.environ.get("CXX") or "c++, g++, clang++"
        raise BuildError(f"no C++ compiler was found (looked for {looked})")
    define = {"FASTSEQ_TORCH": str(torch), "CMAKE_MAKE_PROGRAM": ninja}
    define |= {"FASTSEQ_PYTHON_INCLUDE": "", "FASTSEQ_NVCC": ""}  # the cache may have an earlier build's
    if (Path(sysconfig.get_path("include")) / "Python.h").exists():
        define["FASTSEQ_PYTHON_INCLUDE"] = sysconfig.get_path("include")
        record["built"].append("host")
    else:
        record["left_out"]["host"] = "this Python has no Python.h (its development package is not installed)"
    _cmake(cmake, scratch, define, "all")
    _run("installing", [cmake, "--install", str(scratch), "--prefix", str(package)])
    record["built"].append("cpu")
    record["torch"] = torch_version(torch) or "unknown"
    record |= json.loads((scratch / "toolchain.json").read_text(encoding="utf-8"))


def _compile_cuda(package: Path, scratch: Path, record: dict[str, Any], cuda: fastseq_cuda.Cuda) -> None:
    """Add the CUDA library to the build of the CPU library, whose settings CMake remembers."""
    cmake = find_tool("cmake")
    if "cpu" not in record["built"] or cmake is None:
        raise BuildError("the CPU library was not built")
    define = {
        "FASTSEQ_NVCC": cuda.nvcc,
        "FASTSEQ_CUDA_GENCODE": ";".join(cuda.gencode()),
        "FASTSEQ_JOBS": str(jobs()),
    }
    _cmake(cmake, scratch, define, "fastseq_cuda")
    _run("installing", [cmake, "--install", str(scratch), "--prefix", str(package), "--component", "cuda"])
    record["built"].append("cuda")
    record |= {"nvcc": cuda.version, "cuda_architectures": cuda.architectures}
    record |= json.loads((scratch / "cuda.json").read_text(encoding="utf-8"))


def _cmake(cmake: str, scratch: Path, define: dict[str, str], target: str) -> None:
    options = [f"-D{name}={value}" for name, value in define.items()]
    _run("configuring", [cmake, "-S", str(ROOT), "-B", str(scratch), "-G", "Ninja", *options])
    _run("compiling", [cmake, "--build", str(scratch), "--parallel", str(jobs()), "--target", target])


def _run(what: str, command: list[str]) -> None:
    """Run one step of CMake; on failure show its output, and raise with the first line that says error."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout, flush=True)
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -1)
        excerpt = " ".join(lines[first:][:3]).replace(str(ROOT) + os.sep, "")
        raise BuildError(f"{what} failed: {excerpt[:300] or f'exit status {result.returncode}'}")
