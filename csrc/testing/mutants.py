"""Plants known bugs in the CUDA kernels, one at a time, and runs their tests: every one must be seen.

    python csrc/testing/mutants.py [--list] [--only NAME ...] [--jobs 2] [--build FOLDER]

The bugs are in planted.py. Each goes into a copy of csrc, whose test is compiled for the emulator (cuda_emulator.h) and
run with the argument "quick". The script fails if a bug is not seen: then the tests have a hole; if the code that a bug
belongs in is not there, exactly once; or if a test fails without any bug.

It needs CMake and a C++ compiler. FOLDER is a CMake build folder of the C++ tests, which need not be finished; without
one, build/mutants is made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("csrc/crf/cuda")
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-DFASTSEQ_EMULATE", "-DFASTSEQ_TEST_FLOAT_ALONE", "-Wno-unknown-pragmas"]
SANITIZE = {"plain": [], "address": ["-fsanitize=address,undefined", "-g"], "thread": ["-fsanitize=thread", "-g"]}
# The first error ends a run. A seed of 0: the bugs that are planted must be seen by any run.
ENVIRONMENT = {
    "FASTSEQ_EMULATOR_SEED": "0",
    "ASAN_OPTIONS": "halt_on_error=1:detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
SECONDS = 300  # for a test that takes some: longer, and it hangs


class Kernels(NamedTuple):
    """The CPU's kernels, which the tests compare with: a static library, and what it was compiled for."""

    library: Path
    definitions: list[str]


class Outcome(NamedTuple):
    """Of one test: whether it failed, and how, in a line."""

    failed: bool
    how: str
    seconds: float


class BrokenError(Exception):
    """Something is wrong with the script's own matter, and not with the kernels."""


# ---- planting --------------------------------------------------------------------------------------------------------


def pattern(old: str) -> re.Pattern[str]:
    """Finds `old` however it is broken into lines."""
    return re.compile(r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", old)))


def plant(mutant: Mutant, csrc: Path) -> None:
    """Puts the bug into a copy of csrc."""
    path = csrc.parent / KERNELS / mutant.file
    text = path.read_text()
    found = list(pattern(mutant.old).finditer(text))
    if len(found) != 1:
        raise BrokenError(f"{mutant.name}: found {len(found)} times in {mutant.file}, wanted once:\n    {mutant.old}")
    path.write_text(text[: found[0].start()] + mutant.new + text[found[0].end() :])


# ---- compiling and running -------------------------------------------------------------------------------------------


def kernels(folder: Path) -> Kernels:
    """Builds the CPU's kernels in a CMake build folder."""
    if not (folder / "CMakeCache.txt").exists():
        command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DFASTSEQ_TESTS=ON"]
        subprocess.run(command + (["-G", "Ninja"] if shutil.which("ninja") else []), check=True)
    subprocess.run(["cmake", "--build", str(folder), "--target", "fastseq_kernels", "-j2"], check=True)
    isas = json.loads((folder / "toolchain.json").read_text())["flags"]
    return Kernels(folder / "libfastseq_kernels.a", [f"-DFASTSEQ_HAS_{isa.upper()}=1" for isa in isas])


def compile_test(test: str, build: str, csrc: Path, cpu: Kernels) -> Path:
    """The test's executable, with the kernels of a copy of csrc."""
    program = csrc.parent / "test"
    command = [COMPILER, *FLAGS, *SANITIZE[build], *cpu.definitions, f"-I{csrc}"]
    command += [str(csrc / "testing" / f"{test}.cpp"), str(cpu.library), "-pthread", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BrokenError(f"{test} does not compile:\n{done.stderr[:3000]}")
    return program


def telling_line(output: str) -> str:
    """What a failed test said first; of a sanitizer's report, the line that names the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip().strip("=")]
    errors = [line for line in lines if "Sanitizer:" in line or "runtime error:" in line]
    return re.sub(r"^\S*/(?=[^/ ]+:\d+: )", "", (errors + lines + ["no output"])[0])


def run(program: Path) -> tuple[bool, str]:
    """Whether the test failed, and how."""
    environment = {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(
            [str(program), "quick"], capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return True, f"hangs: not done after {SECONDS} s"
    how = telling_line(done.stdout + done.stderr)
    return done.returncode != 0, f"signal {-done.returncode}; {how}" if done.returncode < 0 else how


def try_out(test: str, build: str, mutant: Mutant | None, cpu: Kernels) -> Outcome:
    """Runs a test, with a bug in the kernels or without."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        if mutant is not None:
            plant(mutant, csrc)
        failed, how = run(compile_test(test, build, csrc, cpu))
    return Outcome(failed, how, time.monotonic() - start)


# ---- the table -------------------------------------------------------------------------------------------------------


def try_mutant(mutant: Mutant, cpu: Kernels) -> bool:
    """Whether the bug was seen; prints a line about it."""
    outcome = try_out(mutant.test, mutant.build, mutant, cpu)
    verdict = outcome.how[:110] if outcome.failed else "NOT SEEN"
    print(f"{mutant.name:20} {mutant.build:8} {outcome.seconds:5.0f} s  {mutant.what}\n{'':20} {verdict}", flush=True)
    return outcome.failed


def try_unchanged(test_and_build: tuple[str, str], cpu: Kernels) -> bool:
    """Whether the test passes as it is."""
    test, build = test_and_build
    outcome = try_out(test, build, None, cpu)
    print(f"{'(no bug)':20} {build:8} {outcome.seconds:5.0f} s  {test}: {outcome.how}", flush=True)
    return not outcome.failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say which bugs there are")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these bugs")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants", metavar="FOLDER")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.only and len(chosen) != len(set(options.only)):
        parser.error(f"no such bug: {', '.join(set(options.only) - {m.name for m in chosen})}")
    if options.list:
        print("\n".join(f"{m.name:20} {m.build:8} {m.file:22} {m.what}" for m in chosen))
        return 0
    cpu = kernels(options.build)
    tests = sorted({(m.test, m.build) for m in chosen})
    slowest_first = sorted(chosen, key=lambda m: m.build == "plain")
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            passed = list(pool.map(partial(try_unchanged, cpu=cpu), tests))
            seen = list(pool.map(partial(try_mutant, cpu=cpu), slowest_first))
    except BrokenError as error:
        print(error)
        return 1
    survivors = [m.name for m, was_seen in zip(slowest_first, seen, strict=True) if not was_seen]
    print(
        f"{len(seen) - len(survivors)} of {len(seen)} bugs seen"
        + (f"; not: {', '.join(survivors)}" if survivors else "")
    )
    return int(bool(survivors) or not all(passed))


if __name__ == "__main__":
    sys.exit(main())
