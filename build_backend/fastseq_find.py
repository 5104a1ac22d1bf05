"""Find what a build needs: torch, CMake, ninja, a C++ compiler, nvcc. Nothing is imported or downloaded for that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_CMAKE = (3, 24)
CUDA_FOLDER = Path("/usr/local/cuda")
NVCC_PACKAGES = " ".join(
    f'"nvidia-{name}==13.0.*"' for name in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
)

# Run by the target's own interpreter: prints where torch is, or null, and the folders of NVIDIA's wheels.
FIND_PACKAGES = """
import importlib.metadata, importlib.util, json
torch, nvidia = importlib.util.find_spec("torch"), importlib.util.find_spec("nvidia")
found = torch is not None and torch.origin is not None
print(json.dumps({
    "torch": [torch.origin, importlib.metadata.version("torch")] if found else None,
    "nvidia": list(nvidia.submodule_search_locations or ()) if nvidia else [],
}))
"""


class BuildError(Exception):
    """Why something cannot be built, in words."""


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
    """The folder of an installed torch that fits: in this process's path, else in the target environment's."""
    here = None
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        here = (spec.origin, importlib.metadata.version("torch"))
    found = here or _target().get("torch")
    if found is None or not satisfies(found[1], torch_requirement()):
        return None
    return Path(found[0]).parent


def torch_version(torch: Path, name: str = "__version__") -> str | None:
    """A string of `torch`/version.py: its version, or by the name "cuda" the CUDA that it was built for."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    match = re.search(rf"^{name}\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
    return match.group(1) if match else None


def _target() -> dict[str, Any]:
    """The packages of the environment that is installed into.

    Under build isolation pip hides them from this process through PYTHONPATH, and the interpreter is still the
    target's: without that variable it finds them.
    """
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    folder = Path(sys.executable).parent  # not the current one: it would be on the path
    command = [sys.executable, "-c", FIND_PACKAGES]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return json.loads(result.stdout) if result.returncode == 0 else {}


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


def find_nvcc() -> str | None:
    """The path of nvcc: of $CUDA_HOME, of NVIDIA's wheels in the target environment, on PATH, of the usual folder."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    for nvidia in _target().get("nvidia", []):  # nvidia/cu13/bin: the latest version first
        wheels = Path(nvidia).glob("cu[0-9]*/bin")
        folders += sorted(wheels, key=lambda folder: int(folder.parent.name[2:]), reverse=True)
    found = [shutil.which("nvcc", path=str(folder)) for folder in folders]
    found += [shutil.which("nvcc"), shutil.which("nvcc", path=str(CUDA_FOLDER / "bin"))]
    return next((path for path in found if path), None)
