"""The CUDA kernels on the CPU, as the torch ops `fastseq_emulator::*`, so that the operators' tests can run them.

    reason = emulator.load()      None once the ops are there, else why they cannot be

CMake builds the library in build/emulator, again only after a change; or FASTSEQ_EMULATOR_LIBRARY names a built one.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"


@functools.cache
def load() -> str | None:
    """Build the library if that has to be, and load it; the reason where it cannot be built, or None.

    Raises:
        RuntimeError: It does not compile. That is no reason to skip a test.
    """
    given = os.environ.get("FASTSEQ_EMULATOR_LIBRARY")
    library = Path(given) if given else FOLDER / "libfastseq_emulator.so"
    if not given:
        cmake, ninja, compiler = _find("cmake"), _find("ninja"), _find("c++", "g++", "clang++")
        if cmake is None or ninja is None or compiler is None or not (ROOT / "csrc").exists():
            return "the emulator needs the source tree, CMake, ninja and a C++ compiler"
        _build(cmake, ninja)
    torch.ops.load_library(str(library))
    return None


def _find(*names: str) -> str | None:
    """The first of these programs that there is, beside this interpreter or on PATH."""
    places = (str(Path(sys.executable).parent), None)
    return next((tool for name in names for path in places if (tool := shutil.which(name, path=path))), None)


def _build(cmake: str, ninja: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    define = {"EMULATOR": "ON", "TORCH": str(Path(torch.__file__).parent)}
    options = [f"-DFASTSEQ_{name}={value}" for name, value in define.items()]
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be at it
        _run(cmake, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
        _run(cmake, "--build", str(FOLDER), "--target", "fastseq_emulator")


def _run(*command: str) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}")
