"""The machine that a result was measured on, in words that name no host, user or folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import fastseq
from fastseq import library

__all__ = ["describe"]

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
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


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
