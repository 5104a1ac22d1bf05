"""Load the compiled op libraries, and remember in words why one could not be loaded. Importing never raises.

    loaded("cpu"), why_not("cpu")     whether the library of a device is in, and if not, why
    cannot_run((8, 0))                why the CUDA library cannot run on a GPU of that compute capability
    driver(), runtime()               the CUDA of the NVIDIA driver here, and of the library
    isa(), isas()                     the kernels' instruction set in use; those that could be
    use_isa("avx2")                   another one inside a `with` block, for tests and benchmarks

FASTSEQ_ISA=baseline|avx2|avx512 in the environment lowers the instruction set for a whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["build_record", "cannot_run", "driver", "isa", "isas", "loaded", "path", "runtime", "use_isa", "why_not"]

FOLDER = Path(__file__).parent / "lib"
DEVICES = ("cpu", "cuda")
ISAS = ("baseline", "avx2", "avx512")

_libraries: dict[str, ctypes.CDLL] = {}
_reasons: dict[str, str] = {}


def path(device: str) -> Path:
    """Where the library of a device is, if it was built."""
    return FOLDER / f"libfastseq_{device}.so"


def build_record() -> dict[str, Any]:
    """What the build wrote down: versions, flags, what was left out and why. Empty where there is none."""
    try:
        record = json.loads((FOLDER / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def loaded(device: str) -> bool:
    """Whether the compiled library of `device` is loaded."""
    return device in _libraries


def why_not(device: str) -> str | None:
    """The reason that the compiled library of `device` is not loaded, or None if it is."""
    return None if loaded(device) else _reasons.get(device, f"there is no compiled library for {device!r}")


def runtime() -> tuple[int, int] | None:
    """The CUDA version of the CUDA library, or None where that is not loaded."""
    return _version(_libraries["cuda"].fastseq_cuda_runtime_version()) if loaded("cuda") else None


def driver() -> tuple[int, int] | None:
    """The latest CUDA version that the NVIDIA driver can run; None where there is no driver, or no CUDA library."""
    version = _libraries["cuda"].fastseq_cuda_driver_version() if loaded("cuda") else 0
    return _version(version) if version else None


def cannot_run(capability: tuple[int, int]) -> str | None:
    """The reason that the CUDA library cannot run on a GPU of this compute capability, or None if it can."""
    needed, there = runtime(), driver()
    if needed is None:
        return why_not("cuda")
    if there is None:
        return "no NVIDIA driver was found"
    if there[0] < needed[0]:  # within one major version, drivers run what is newer than they are
        return f"the CUDA library needs an NVIDIA driver for CUDA {needed[0]}.0, this one is for {there[0]}.{there[1]}"
    names = build_record().get("cuda_architectures", [])
    if any(_has_code(name, capability) for name in names):
        return None
    reason = f"the CUDA library has code for sm_{', '.join(names)}, and this GPU is sm_{capability[0]}{capability[1]}"
    if capability < (7, 5) and needed >= (13, 0):
        reason += "; nvcc 13 compiles for none before sm_75, an nvcc of CUDA 12 does"
    return reason


def isa() -> str | None:
    """The instruction set of the CPU kernels in use, or None where the CPU library is not loaded."""
    return _libraries["cpu"].fastseq_isa().decode() if loaded("cpu") else None


def isas() -> list[str]:
    """The instruction sets that the CPU library has and this machine can run, the most capable last."""
    if not loaded("cpu"):
        return []
    best = _libraries["cpu"].fastseq_best_isa().decode()
    return list(ISAS[: ISAS.index(best) + 1])


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of another instruction set, in the whole process, inside a `with` block.

    Raises:
        ValueError: The library is not loaded, or does not have it, or this CPU cannot run it.
    """
    if name not in isas():
        wanted = "wanted one of " + ", ".join(isas()) if loaded("cpu") else f"the library is {why_not('cpu')}"
        raise ValueError(f"name: got {name!r}, {wanted}")
    before = _libraries["cpu"].fastseq_isa()
    _libraries["cpu"].fastseq_set_isa(name.encode())
    try:
        yield
    finally:
        _libraries["cpu"].fastseq_set_isa(before)


def _load(device: str) -> None:
    """Load one library, or remember why it cannot be."""
    record = build_record()
    if not path(device).exists():
        unknown = "there is no build record" if not record else "the file is missing"
        _reasons[device] = f"not built: {record.get('left_out', {}).get(device, unknown)}"
        return
    try:
        import torch

        torch.ops.load_library(str(path(device)))
        _libraries[device] = ctypes.CDLL(str(path(device)))  # the same copy again: for its plain C functions
    except Exception as error:  # whatever it is, the package must work without the library
        built = f" (built against torch {record['torch']})" if "torch" in record else ""
        _reasons[device] = f"built, but it cannot be loaded{built}: {error}"


def _version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10  # 12040 is 12.4


def _has_code(name: str, capability: tuple[int, int]) -> bool:
    """Whether what was compiled for `name`, as in 80, 90a, 120+PTX, runs on a GPU of this compute capability."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", name)
    if match is None:
        return False
    built = (int(match[1]), int(match[2]))
    if match[3] == "a":  # for this very architecture
        return capability == built
    same_generation = capability[0] == built[0] and capability >= built
    return same_generation or (match[4] is not None and match[3] == "" and capability >= built)


def _declare(library: ctypes.CDLL) -> None:
    library.fastseq_isa.restype = library.fastseq_best_isa.restype = ctypes.c_char_p
    library.fastseq_set_isa.argtypes = [ctypes.c_char_p]


def _check_environment() -> None:
    """Warn where FASTSEQ_ISA asks for what cannot be had: the library then keeps the best that can."""
    wanted = os.environ.get("FASTSEQ_ISA")
    if not wanted or wanted == isa():
        return
    if wanted not in ISAS:
        reason = f"wanted one of {', '.join(ISAS)}"
    elif loaded("cpu"):
        reason = "this CPU cannot run it, or it was not built"
    else:
        return
    warnings.warn(f"FASTSEQ_ISA: got {wanted!r}, {reason}; using {isa()}", RuntimeWarning, stacklevel=2)


for _device in DEVICES:
    _load(_device)
if loaded("cpu"):
    _declare(_libraries["cpu"])
_check_environment()
