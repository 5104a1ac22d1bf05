"""Decide whether the CUDA library is built, by which nvcc, and for which architectures."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from fastseq_find import CUDA_FOLDER, NVCC_PACKAGES, BuildError, find_nvcc, torch_version

MINIMUM_NVCC = 12  # the first that knows C++20, in which torch's headers are written
# What is compiled where TORCH_CUDA_ARCH_LIST does not say, as far as nvcc can: P100, V100, T4, A100, RTX 30, RTX 40,
# H100, B200, RTX 50. The code of one runs on later ones of the same generation; for what comes after the last, its PTX
# is compiled by the driver.
ARCHITECTURES = (60, 70, 75, 80, 86, 89, 90, 100, 120)


class Cuda(NamedTuple):
    """How to build the CUDA library.

    Attributes:
        nvcc: The compiler's path.
        version: Its version, 13.0.88.
        architectures: What it compiles for: 75, 90a, 120+PTX, ...
    """

    nvcc: str
    version: str
    architectures: list[str]

    def gencode(self) -> list[str]:
        """The options of nvcc for the architectures."""
        return [_gencode(name) for name in self.architectures]


def plan(mode: str, torch: Path | None) -> Cuda:
    """How to build the CUDA library.

    Raises:
        BuildError: It is not to be built, or cannot be.
    """
    if torch is not None and mode in ("auto", "require-cuda") and torch_version(torch, "cuda") is None:
        version = torch_version(torch)
        raise BuildError(f"torch {version} is not built for CUDA (FASTSEQ_BUILD=cuda compiles it nevertheless)")
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            f"no nvcc was found in $CUDA_HOME, NVIDIA's wheels, PATH and {CUDA_FOLDER} (pip install {NVCC_PACKAGES})"
        )
    version = nvcc_version(nvcc)
    if int(version.partition(".")[0]) < MINIMUM_NVCC:
        raise BuildError(f"{nvcc} is version {version}, wanted {MINIMUM_NVCC}.0 or later")
    supported = [int(n) for n in re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch"))]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    return Cuda(nvcc, version, architectures(wanted, supported, version))


def nvcc_version(nvcc: str) -> str:
    """The version that nvcc says it has.

    Raises:
        BuildError: It cannot be run, or says none.
    """
    match = re.search(r"\bV(\d+\.\d+\.\d+)", _ask(nvcc, "--version"))
    if match is None:
        raise BuildError(f"{nvcc} --version names no version")
    return match.group(1)


def architectures(wanted: str, supported: list[int], version: str) -> list[str]:
    """The architectures to compile for: `wanted`, as TORCH_CUDA_ARCH_LIST has them (8.0;9.0a+PTX), else the usual ones.

    Raises:
        BuildError: `wanted` is not such a list, or this nvcc cannot compile for one of them.
    """
    names = [name for name in re.split(r"[;, ]+", wanted) if name]
    if not names:
        usual = [str(n) for n in ARCHITECTURES if n in supported]
        return [*usual[:-1], f"{usual[-1]}+PTX"]
    found = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?(?:\+PTX)?)", name)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {name!r}, wanted numbers as in '8.0;9.0+PTX'")
        number = int(match[1] + match[2])
        if number not in supported:
            can = ", ".join(f"{n // 10}.{n % 10}" for n in sorted(supported))
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {name!r}, and nvcc {version} can compile for {can}")
        found.append(f"{number}{match[3]}")
    return list(dict.fromkeys(found))


def _gencode(name: str) -> str:
    number, _, ptx = name.partition("+")
    code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _ask(nvcc: str, option: str) -> str:
    try:
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"nvcc cannot be run: {error}") from None
