"""Compile the Triton kernels for GPUs that are not here, and read what each takes from the cubin.

python tests/ops/triton_compile.py           compile all, and compare with triton_resources.json
python tests/ops/triton_compile.py --write   and make that the table

Registers, stack and shared memory say whether a kernel can run, and whether it spills; they say nothing about speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent))
import triton_attention_cases
import triton_crf_cases
import triton_pointer_cases

FAMILIES = (triton_crf_cases, triton_pointer_cases, triton_attention_cases)
TABLE = Path(__file__).with_name("triton_resources.json")


def cases() -> list[Any]:
    """All of all families."""
    return [case for family in FAMILIES for case in family.cases()]


def compiled(case: Any) -> Any:
    """Compile one case."""
    family = next(f for f in FAMILIES if isinstance(case, f.Case))
    source, warps = family.source(case)
    options = {"num_warps": warps, **family.COMPILE}
    if hasattr(family, "stages"):
        options["num_stages"] = family.stages(case)
    return triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)


def tensor_core_products(case: Any) -> int:
    """How many instructions for matrix products it has."""
    return len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", compiled(case).asm["ptx"]))


def resources(case: Any) -> dict[str, int]:
    """Compile one case; what its cubin says."""
    kernel = compiled(case)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout + text.stderr))
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return {"registers": int(usage["REG"]), "stack": stack, "shared": shared, "num_warps": warps}


def name_of(case: Any) -> str:
    """The case's key in the table."""
    return "{} {} {} {} sm_{}".format(*case)


def excess(got: dict[str, int], recorded: dict[str, int]) -> list[str]:
    """What is above the table's, in words."""
    return [f"{key} {got[key]} > {recorded[key]}" for key in recorded if got[key] > recorded[key]]


def main() -> None:
    """Compile everything, two at a time."""
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(map(name_of, cases()), pool.map(resources, cases()), strict=True))
    if "--write" in sys.argv:
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
        head = f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n'
        TABLE.write_text(f"{head}{lines}\n  }}\n}}\n", encoding="utf-8")
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    wrong = {name: excess(row, recorded[name]) for name, row in found.items()}
    print(*(f"{name}: {', '.join(why)}" for name, why in wrong.items() if why), sep="\n")
    print(f"{len(found)} compiled; with a stack: {[name for name, row in found.items() if row['stack']]}")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
