"""What nvcc makes of the CUDA kernels, against a record of it. It needs no GPU, and no torch.

    python csrc/testing/cuda_resources.py [--update] [--arch 75 90] [--jobs 2] [--show sweep]

For each kernel and architecture cuda_resources.json has the registers, the barriers, the shared memory of a block
(static, and the most that a launch asks for), the blocks and warps that a multiprocessor has room for, and the
instructions of each innermost loop that calculates. None of that is a speed, and none of it may get worse unnoticed:

    - nothing is kept in local memory: no spills, no stack
    - the loops of the recursions do their multiply-adds on whole vectors from shared memory (LDS.128)
    - registers, shared memory: at most what is recorded       - warps: at least
    - instructions of a loop: at most 5 % more

Another nvcc than the recorded one allocates and schedules as it likes: then all but the first two, and the shared
memory, are only reported. `--update` records what is found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import sass

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
import fastseq_cuda  # noqa: E402
import fastseq_find  # noqa: E402

TABLE = Path(__file__).with_suffix(".json")
MORE_INSTRUCTIONS = 1.05
CALCULATES = ("FFMA", "FADD", "FMUL", "DFMA", "DADD", "DMUL", "MUFU")
REGISTERS = 65536  # of a multiprocessor
SHARED_OF_BLOCK = 64 << 10  # what the oldest architecture can be asked for


class Multiprocessor(NamedTuple):
    """What one multiprocessor has room for; `reserved` bytes of shared memory a block are the system's."""

    warps: int
    blocks: int
    shared: int
    reserved: int = 1024


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10, reserved=0),
    80: Multiprocessor(64, 32, 164 << 10),
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
    120: Multiprocessor(48, 24, 100 << 10),
}


class Found(NamedTuple):
    """One kernel as it was compiled for one architecture; `row` is its line of the table."""

    row: dict[str, Any]
    loops: list[Counter[str]]
    faults: list[str]


def room(arch: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks fit on a multiprocessor at a time."""
    has = MULTIPROCESSORS[arch]
    warps = threads // 32
    of_warp = -(-registers // 8) * 8 * 32  # registers are given out in eights
    by_registers = REGISTERS // of_warp // 4 * 4 // warps  # a quarter of the warps has a quarter of the registers
    taken = -(-(shared + has.reserved) // 128) * 128
    return min(has.blocks, has.warps // warps, by_registers, has.shared // max(taken, 1))


class Tools(NamedTuple):
    """Paths of programs."""

    nvcc: str
    nvdisasm: str


# ---- the tools -------------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> str:
    """What a command prints; it ends the program where it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def find_nvdisasm(nvcc: str) -> str:
    """The disassembler: beside nvcc, of NVIDIA's wheels, on PATH, or the one in triton."""
    folders = [Path(nvcc).resolve().parent]
    for package, pattern in (("nvidia", "cu[0-9]*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations if spec else None) or ():
            folders += Path(place).glob(pattern)
    path = os.pathsep.join(map(str, folders))
    found = shutil.which("nvdisasm", path=path) or shutil.which("nvdisasm")
    return found or sys.exit('no nvdisasm was found (pip install "nvidia-cuda-nvdisasm==13.2.*")')


def cmake_list(name: str) -> list[str]:
    """A list that CMakeLists.txt sets, so that sources and flags are written once."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    match = re.search(rf"set\({name}\s+([^)]*)\)", text)
    return match[1].split() if match else sys.exit(f"CMakeLists.txt does not set {name}")


def short(name: str) -> str:
    """sweep_kernel<float, Registers<32, 1>> of a name with all its namespaces and arguments."""
    for long, brief in ((r"fastseq::(\w+::)?cuda::|decoding::|^void |\(.*", ""), ("unsigned char", "uint8")):
        name = re.sub(long, brief, name)
    return name.replace("unsigned short", "uint16").replace("> >", ">>").strip()


class Launch(NamedTuple):
    """What a launch asks for: threads of a block, bytes of dynamic shared memory."""

    threads: int
    shared: int


def read_launches(folder: Path) -> dict[str, Launch]:
    """The launches by regime, or by the name of a kernel that has one shape only; from cuda_launches.cpp."""
    program = folder / "launches"
    source = ROOT / "csrc/testing/cuda_launches.cpp"
    compiler = fastseq_find.find_compiler() or sys.exit("no C++ compiler was found")
    run(compiler, "-std=c++20", "-DFASTSEQ_EMULATE", f"-I{ROOT / 'csrc'}", source, "-pthread", "-o", program)
    rows = [line.split(";") for line in run(program).splitlines()]
    return {short(name): Launch(int(threads), int(shared)) for name, threads, shared in rows}


# ---- what is found ---------------------------------------------------------------------------------------------------


def ptxas_numbers(log: str) -> dict[str, dict[str, int]]:
    """By mangled name: what ptxas -v says that a kernel uses."""
    found = {}
    for entry in re.split(r"Compiling entry function ", log)[1:]:

        def number(pattern: str, entry: str = entry) -> int:
            match = re.search(pattern, entry)
            return int(match[1]) if match else 0

        found[entry.split("'")[1]] = {
            "registers": number(r"Used (\d+) registers"),
            "barriers": number(r"used (\d+) barriers"),
            "static": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "stores": number(r"(\d+) bytes spill stores"),
            "loads": number(r"(\d+) bytes spill loads"),
        }
    return found


def recursion_faults(name: str, loops: list[Counter[str]]) -> list[str]:
    """What is wrong with the loops of a kernel that keeps E in registers: K/G multiply-adds, of vectors of four."""
    regime = re.match(r"(sweep|posterior)_kernel<.*\bRegisters<(\d+), (\d+)>", name)
    if not regime:
        return []
    length, wanted = int(regime[2]) // int(regime[3]), 3 if regime[1] == "posterior" else 2
    steps = [n for n in loops if n["FFMA"] and n["FFMA"] % length == 0 and 4 * n["LDS.128"] == n["FFMA"]]
    if len(steps) == wanted:
        return []
    return [f"{len(steps)} loops of {length} FFMA and {length // 4} LDS.128, wanted {wanted}"]


def examine(arch: int, name: str, used: dict[str, int], kernel: sass.Kernel, launch: Launch) -> Found:
    """Puts together what is known of a kernel."""
    shared = used["static"] + launch.shared
    blocks = room(arch, launch.threads, used["registers"], shared)
    calculating = [loop for loop in kernel.innermost_loops() if sum(loop[kind] for kind in CALCULATES) >= 8]
    counts = kernel.counts()
    local = {"LDL": counts["LDL"], "STL": counts["STL"]} | {k: used[k] for k in ("stack", "stores", "loads")}
    faults = [f"local memory: {local}"] if any(local.values()) else []
    faults += recursion_faults(name, calculating)
    if shared > SHARED_OF_BLOCK:
        faults.append(f"{shared} bytes of shared memory, and there are {SHARED_OF_BLOCK}")
    if blocks < 1:
        faults.append("a multiprocessor has no room for a block")
    row = {"registers": used["registers"], "barriers": used["barriers"], "shared": shared, "blocks": blocks}
    row["warps"] = blocks * launch.threads // 32
    return Found(row | {"loops": [loop.total() for loop in calculating]}, calculating, faults)


def compile_one(tools: Tools, source: str, arch: int, launches: dict[str, Launch], folder: Path) -> dict[str, Found]:
    """All kernels of one source and architecture, by their short names."""
    cubin = folder / f"{Path(source).stem}_{arch}.cubin"
    flags = cmake_list("FASTSEQ_CUDA_FLAGS")
    log = run(tools.nvcc, "-cubin", f"-arch=sm_{arch}", *flags, f"-I{ROOT / 'csrc'}", ROOT / source, "-o", cubin)
    used = ptxas_numbers(log)
    code = sass.kernels(run(tools.nvdisasm, "-c", cubin))
    found = {}
    for mangled in used:
        name = short(run("c++filt", mangled))
        launch = next((launch for shape, launch in launches.items() if re.search(rf"\b{re.escape(shape)}", name)), None)
        if launch is None:
            sys.exit(f"cuda_launches.cpp does not know the launch of {name}")
        found[name] = examine(arch, name, used[mangled], code[mangled], launch)
    return found


def compile_all(tools: Tools, architectures: list[int], jobs: int) -> dict[str, dict[str, Found]]:
    """All kernels, by architecture and name."""
    found: dict[str, dict[str, Found]] = {f"sm_{arch}": {} for arch in architectures}
    tasks = [(arch, source) for arch in architectures for source in cmake_list("FASTSEQ_CUDA_SOURCES")]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        launches = read_launches(folder)
        results = pool.map(lambda task: compile_one(tools, task[1], task[0], launches, folder), tasks)
        for (arch, _), kernels in zip(tasks, results, strict=True):
            found[f"sm_{arch}"] |= kernels  # reduce_kernel<float> is in three of the sources, and the same
    return found


# ---- against the table -----------------------------------------------------------------------------------------------


def compare(old: dict[str, Any] | None, found: Found) -> tuple[list[str], list[str], list[str]]:
    """What is worse, of that the part that no compiler may change; and what is better than recorded."""
    if old is None:
        return [], ["not in the table"], []
    moved: list[str] = []
    firm: list[str] = []
    better: list[str] = []
    new = found.row
    for what, sign in (("registers", 1), ("shared", 1), ("warps", -1)):
        change = f"{what} {old[what]} -> {new[what]}"
        if sign * new[what] > sign * old[what]:
            (firm if what == "shared" else moved).append(change)
        elif new[what] != old[what]:
            better.append(change)
    if len(old["loops"]) != len(new["loops"]):
        moved.append(f"loops {old['loops']} -> {new['loops']}")
    for before, loop in zip(old["loops"], found.loops, strict=False):
        if loop.total() > before * MORE_INSTRUCTIONS:
            moved.append(f"a loop of {before} instructions -> {sass.describe(loop)}")
    return moved, firm, better


def judge(table: dict[str, Any], found: dict[str, dict[str, Found]], version: str) -> int:
    """Prints what has moved; the number of failures."""
    same, failures = table.get("nvcc") == version, 0
    if not same:
        print(f"nvcc is {version}, the table is of {table.get('nvcc')}: registers, warps and loops are only reported")
    for arch, kernels in found.items():
        rows = table.get("kernels", {}).get(arch, {})
        for name, kernel in kernels.items():
            moved, firm, better = compare(rows.get(name), kernel)
            failing = kernel.faults + firm + (moved if same else [])
            failures += len(failing)
            notes = [("FAIL", text) for text in failing] + [("moved", text) for text in ([] if same else moved)]
            for kind, text in notes + [("better, tighten the table", text) for text in better]:
                print(f"{kind}: {arch} {name}: {text}")
        for name in sorted(set(rows) - set(kernels)):
            failures += 1
            print(f"FAIL: {arch} {name}: in the table, and no longer compiled")
    return failures


def write_table(version: str, found: dict[str, dict[str, Found]]) -> None:
    """A line for each kernel and architecture."""
    parts = []
    for arch, kernels in found.items():
        rows = [f"      {json.dumps(name)}: {json.dumps(kernels[name].row)}" for name in sorted(kernels)]
        parts.append(f"    {json.dumps(arch)}: {{\n" + ",\n".join(rows) + "\n    }")
    text = f'{{\n  "nvcc": {json.dumps(version)},\n  "kernels": {{\n' + ",\n".join(parts) + "\n  }\n}\n"
    TABLE.write_text(text, encoding="utf-8")


def main() -> int:
    """The exit status: 1 if anything is worse than recorded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="record what is found (of all architectures)")
    parser.add_argument("--arch", type=int, nargs="+", choices=MULTIPROCESSORS, default=list(MULTIPROCESSORS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--show", metavar="TEXT", help="list the loops of the kernels with TEXT in their names")
    options = parser.parse_args()
    if options.update and set(options.arch) != set(MULTIPROCESSORS):
        parser.error("--update is for all architectures")
    nvcc = fastseq_find.find_nvcc() or sys.exit("no nvcc was found")
    version = fastseq_cuda.nvcc_version(nvcc)
    found = compile_all(Tools(nvcc, find_nvdisasm(nvcc)), options.arch, options.jobs)
    print(f"nvcc {version}: {sum(map(len, found.values()))} kernels for {', '.join(found)}")
    for arch, kernels in found.items():
        for name, kernel in kernels.items():
            if options.show and options.show in name:
                print("\n    ".join([f"{arch} {name} {kernel.row}", *map(sass.describe, kernel.loops)]))
    if options.update:
        write_table(version, found)
    return 1 if judge(json.loads(TABLE.read_text(encoding="utf-8")), found, version) else 0


if __name__ == "__main__":
    sys.exit(main())
