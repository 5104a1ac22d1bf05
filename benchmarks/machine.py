"""The machine that a result was measured on, in words that name no host, user or folder, and no one GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastseq
from fastseq import library

__all__ = ["describe"]

SMI = {
    "driver": "driver_version",
    "sm clock now": "clocks.current.sm",
    "sm clock at most": "clocks.max.sm",
    "memory clock now": "clocks.current.memory",
    "memory clock at most": "clocks.max.memory",
    "power limit": "power.limit",
    "gpu temperature": "temperature.gpu",
}
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve", "bf16")


def describe(device: str) -> dict[str, str | int]:
    """Processor, cores, instruction sets, versions, threads and operating system."""
    model, flags = _processor()
    machine: dict[str, str | int] = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastseq": fastseq.__version__,
        "compiler": str(library.build_record().get("compiler", "none")),
        "isa": library.isa() or "no compiled library",
        "pytorch-crf": _version("pytorch-crf"),
    }
    return machine | _gpu() if device == "cuda" else machine


def _gpu() -> dict[str, str | int]:
    """The current CUDA device: what torch knows, and what nvidia-smi adds, where there is one."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    known: dict[str, str | int] = {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu memory": f"{found.total_memory / 2**30:.1f} GiB",
        "cuda of torch": str(torch.version.cuda),
        "cuda library": library.why_not("cuda") or f"built by nvcc {library.build_record().get('nvcc')}",
        "triton": _version("triton"),
    }
    return known | _nvidia_smi(str(found.uuid))


def _nvidia_smi(uuid: str) -> dict[str, str | int]:
    """Driver, clocks and power limit of the GPU of this id; empty where they cannot be read."""
    which = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    query = ["nvidia-smi", *which, f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = answer.partition("\n")[0].split(",")
    return {key: value.strip() for key, value in zip(SMI, values, strict=True)} if len(values) == len(SMI) else {}


def _processor() -> tuple[str, set[str]]:
    """The processor's model name and feature flags: /proc/cpuinfo has both, on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    model = fields.get("model name", platform.machine())
    return model, set(fields.get("flags", fields.get("features", "")).split())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
