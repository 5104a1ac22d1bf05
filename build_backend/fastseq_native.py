"""Decide what can be compiled, compile it with CMake and ninja, and write down what was left out and why.

Nothing here imports torch, asks whether a GPU is present, or downloads anything.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODES = ("auto", "cpu", "cuda", "none", "require-cuda")
MINIMUM_CMAKE = (3, 24)
GIB_PER_JOB = 1.5

# Run by the target's own interpreter: prints where torch is, or null.
FIND_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
found = spec is not None and spec.origin is not None
print(json.dumps([spec.origin, importlib.metadata.version("torch")] if found else None))
"""


class BuildError(Exception):
    """Why something cannot be built, in words."""


def build_mode() -> str:
    """The value of FASTSEQ_BUILD, checked.

    Raises:
        SystemExit: It is none of `MODES`, or asks for what this version does not have.
    """
    mode = os.environ.get("FASTSEQ_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"FASTSEQ_BUILD: got {mode!r}, wanted one of {', '.join(MODES)}")
    if "cuda" in mode:
        raise SystemExit(
            f"FASTSEQ_BUILD={mode}: this version of fastseq has no CUDA sources yet; wanted auto, cpu or none"
        )
    return mode


def torch_requirement() -> str:
    """The requirement on torch of pyproject.toml, so that it is written once."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'"(torch *[<>=!~][^"]*)"', text)
    if match is None:
        raise BuildError("pyproject.toml has no requirement on torch")
    return match.group(1)


def satisfies(version: str, requirement: str) -> bool:
    """Whether `version` meets the >= and < bounds of `requirement`, on major and minor number.

    (A build environment has setuptools, and not always packaging.)
    """

    def release(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", text)[:2])

    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement):
        if (release(version) >= release(bound)) != (sign == ">="):
            return False
    return True


def find_torch() -> Path | None:
    """The folder of an installed torch that fits: in this process's path, else in the target environment's.

    Under build isolation pip hides the target's packages from this process through PYTHONPATH, and the
    interpreter is still the target's: without that variable it finds them.
    """
    here = None
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        here = (spec.origin, importlib.metadata.version("torch"))
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"}
    found = here or _ask_interpreter({k: v for k, v in os.environ.items() if k not in hidden})
    if found is None or not satisfies(found[1], torch_requirement()):
        return None
    return Path(found[0]).parent


def _ask_interpreter(environment: dict[str, str]) -> tuple[str, str] | None:
    folder = Path(sys.executable).parent  # not the current one: it would be on the path
    command = [sys.executable, "-c", FIND_TORCH]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return json.loads(result.stdout) if result.returncode == 0 else None


def find_tool(name: str) -> str | None:
    """The path of cmake (new enough) or ninja, beside this interpreter or on PATH; None if there is none."""
    for path in (str(Path(sys.executable).parent), None):
        tool = shutil.which(name, path=path)
        if tool is None:
            continue
        result = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
        numbers = tuple(int(n) for n in re.findall(r"\d+", result.stdout)[:2])
        if result.returncode == 0 and (name != "cmake" or numbers >= MINIMUM_CMAKE):
            return tool
    return None


def find_compiler() -> str | None:
    """The C++ compiler that CMake would take: $CXX, else the usual names."""
    wanted = os.environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


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
    record: dict[str, Any] = {
        "mode": mode,
        "python": platform.python_version(),
        "built": [],
        "left_out": {"cuda": "this version of fastseq has no CUDA sources yet"},
    }
    _remove_old(package)
    if mode == "none":
        reason = "FASTSEQ_BUILD=none asked for the pure Python package"
        record["left_out"] |= dict.fromkeys(("cpu", "host"), reason)
    else:
        try:
            _compile(package, scratch, record)
        except BuildError as error:
            if mode != "auto":
                raise SystemExit(f"fastseq: FASTSEQ_BUILD={mode}, but {error}") from None
            record["built"] = []
            record["left_out"] |= dict.fromkeys(("cpu", "host"), str(error))
    (package / "lib").mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    (package / "lib" / "build.json").write_text(text, encoding="utf-8")
    return record


def _remove_old(package: Path) -> None:
    """Delete what an earlier build left: a record must never describe another build's library."""
    for old in [*package.glob("lib/*"), *package.glob("_host.*")]:
        if old.suffix in {".so", ".pyd", ".json"}:
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
    define = {"FASTSEQ_TORCH": str(torch), "CMAKE_MAKE_PROGRAM": ninja, "FASTSEQ_PYTHON_INCLUDE": ""}
    if (Path(sysconfig.get_path("include")) / "Python.h").exists():
        define["FASTSEQ_PYTHON_INCLUDE"] = sysconfig.get_path("include")
        define["FASTSEQ_PYTHON_SUFFIX"] = sysconfig.get_config_var("EXT_SUFFIX")
        record["built"].append("host")
    else:
        record["left_out"]["host"] = "this Python has no Python.h (its development package is not installed)"
    options = [f"-D{name}={value}" for name, value in define.items()]
    _run("configuring", [cmake, "-S", str(ROOT), "-B", str(scratch), "-G", "Ninja", *options])
    _run("compiling", [cmake, "--build", str(scratch), "--parallel", str(jobs())])
    _run("installing", [cmake, "--install", str(scratch), "--prefix", str(package)])
    record["built"].append("cpu")
    version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text(encoding="utf-8"))
    record["torch"] = version.group(1) if version else "unknown"
    record |= json.loads((scratch / "toolchain.json").read_text(encoding="utf-8"))


def _run(what: str, command: list[str]) -> None:
    """Run one step of CMake; on failure show its output, and raise with the first line that says error."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout, flush=True)
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -1)
        excerpt = " ".join(lines[first:][:3]).replace(str(ROOT) + os.sep, "")
        raise BuildError(f"{what} failed: {excerpt[:300] or f'exit status {result.returncode}'}")
