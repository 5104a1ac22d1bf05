"""The report behind `fastseq info`: what is installed, what was built, and which backend can run what.

It must work where everything else is broken: each section is collected by itself, and an exception becomes
its text.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

__all__ = ["main", "report"]

PACKAGES = (
    "fastseq-kernels",
    "torch",
    "numpy",
    "triton",
    "flash-attn",
    "transformers",
    "accelerate",
    "pytorch-crf",
)
VARIABLES = ("FASTSEQ_BACKEND", "FASTSEQ_ISA")


def report() -> dict[str, Any]:
    """All that `fastseq info` knows, in sections. A section that failed is {"error": "..."}."""
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": _versions,
        "machine": _machine,
        "build": _build,
        "libraries": _libraries,
        "ops": _ops,
    }
    return {name: _guarded(collect) for name, collect in sections.items()}


def main() -> None:
    """Print the report."""
    found = report()
    for name in ("versions", "machine", "build", "libraries"):
        print(f"{name}\n" + "\n".join(_lines(found[name])) + "\n")
    print("ops: yes, or why a backend can run nothing here\n" + "\n".join(_table(found["ops"])))


def _guarded(collect: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return collect()
    except Exception as error:  # whatever is broken, the other sections must still be shown
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    for package in ("torch", "numpy"):  # installed is one thing, and working another
        try:
            importlib.import_module(package)
        except Exception as error:
            found[package] += f", but it cannot be imported: {type(error).__name__}: {error}"
    return found


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {"system": platform.platform()}
    found |= {f"${name}": os.environ[name] for name in VARIABLES if name in os.environ}
    found["cpu"] = _guarded(lambda: importlib.import_module("fastseq.host").cpu_features())
    found["torch"] = _guarded(_torch_devices)
    return found


def _torch_devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"threads": torch.get_num_threads(), "built for CUDA": torch.version.cuda or "no"}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return found | ({f"GPU {i}": _gpu(i) for i in range(count)} or {"GPUs": "none"})


def _gpu(index: int) -> str:
    """Its name and architecture, and whether the CUDA library can run there."""
    import torch

    library = importlib.import_module("fastseq.library")
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}"
    return f"{name}; {library.cannot_run(capability) or 'the CUDA library can run on it'}"


def _build() -> dict[str, Any]:
    record: dict[str, Any] = importlib.import_module("fastseq.library").build_record()
    return record or {"record": "none: this copy of fastseq was not installed by its build"}


def _libraries() -> dict[str, Any]:
    library = importlib.import_module("fastseq.library")
    found: dict[str, Any] = {d: library.why_not(d) or f"loaded, {library.path(d)}" for d in library.DEVICES}
    if library.loaded("cuda"):
        there = library.driver()
        architectures = ", ".join(library.build_record().get("cuda_architectures", []))
        found["cuda kernels"] = f"CUDA {_dotted(library.runtime())}, for sm_{architectures}"
        found["NVIDIA driver"] = f"for CUDA {_dotted(there)}" if there else "none was found: no GPU can be used"
    if library.loaded("cpu"):
        found["cpu kernels"] = f"{library.isa()} (of {', '.join(library.isas())})"
    try:
        importlib.import_module("fastseq._host")
        found["host module"] = "loaded"
    except ImportError as error:
        found["host module"] = f"not loaded, its Python twin is used: {error}"
    return found


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _ops() -> dict[str, Any]:
    importlib.import_module("fastseq.ops")
    ops = importlib.import_module("fastseq.registry").OPS
    return {name: {b.name: b.available() or "yes" for b in op.backends} for name, op in sorted(ops.items())}


def _lines(section: dict[str, Any], indent: int = 2) -> list[str]:
    """`key  value` a line; a dictionary's entries one step in."""
    width = max(map(len, section), default=0)
    lines = []
    for key, value in section.items():
        if isinstance(value, dict):
            lines += [f"{'':{indent}}{key}", *_lines(value, indent + 2)]
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"{'':{indent}}{key:{width}}  {text}")
    return lines


def _table(ops: dict[str, Any]) -> list[str]:
    """A row an op and a column a backend; below it each reason once."""
    if "error" in ops:
        return _lines(ops)
    columns = list(dict.fromkeys(backend for row in ops.values() for backend in row))
    reasons = list(dict.fromkeys(cell for row in ops.values() for cell in row.values() if cell != "yes"))
    width = max(map(len, ops), default=0)
    lines = [f"  {'':{width}}  " + "".join(f"{c:>10}" for c in columns)]
    for name, row in ops.items():
        cells = [_cell(row.get(column), reasons) for column in columns]
        lines.append(f"  {name:{width}}  " + "".join(f"{c:>10}" for c in cells))
    return [*lines, *(f"  [{i}] {reason}" for i, reason in enumerate(reasons, 1))]


def _cell(text: str | None, reasons: list[str]) -> str:
    return "-" if text is None else text if text == "yes" else f"no [{reasons.index(text) + 1}]"
