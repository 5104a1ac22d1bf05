"""Plants known bugs in the CUDA kernels, one at a time, and runs their tests: every one must be seen.

    python csrc/testing/mutants.py [--list] [--only NAME ...] [--jobs 2] [--build FOLDER]

The bugs are in planted*.py, a file a family of kernels. Each goes into a copy of csrc, whose test is compiled for the
emulator (cuda_emulator.h) and run with the argument "quick". The script fails if a bug is not seen: then the tests
have a hole; if the code that a bug belongs in is not there, exactly once; or if a test fails without any bug.

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
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import NamedTuple

import planted
import planted_decoder
import planted_distribution
from planted import Mutant

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = [*planted.MUTANTS, *planted_decoder.MUTANTS, *planted_distribution.MUTANTS]
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-DFASTSEQ_EMULATE", "-DFASTSEQ_TEST_FLOAT_ALONE", "-Wno-unknown-pragmas"]
# Compiling takes longer than running up to the first failure, but for the sanitizers.
BUILDS = {
    "plain": ["-Og"],
    "address": ["-O1", "-fsanitize=address"],
    "thread": ["-O1", "-fsanitize=thread"],
}
# The first error ends a run. A seed of 0: the bugs that are planted must be seen by any run.
ENVIRONMENT = {
    "FASTSEQ_EMULATOR_SEED": "0",
    "ASAN_OPTIONS": "halt_on_error=1:detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}
SECONDS = 300  # for a test that takes some: longer, and it hangs


class Kernels(NamedTuple):
    """The CPU's kernels, which the tests compare with: a static library, and what it was compiled for."""

    library: Path
    definitions: list[str]


class Trial(NamedTuple):
    """A run of a test, with a bug or without."""

    test: str
    build: str
    mutant: Mutant | None = None


class BrokenError(Exception):
    """Something is wrong with the script's own matter, and not with the kernels."""


# ---- planting --------------------------------------------------------------------------------------------------------


def pattern(old: str) -> re.Pattern[str]:
    """Finds `old` however it is broken into lines."""
    return re.compile(r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", old)))


def plant(mutant: Mutant, csrc: Path) -> None:
    """Puts the bug into a copy of csrc."""
    path = csrc / mutant.folder / mutant.file
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
    command = [COMPILER, *FLAGS, *BUILDS[build], *cpu.definitions, f"-I{csrc}"]
    command += [str(csrc / "testing" / f"{test}.cpp"), str(cpu.library), "-pthread", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BrokenError(f"{test} does not compile:\n{done.stderr[:3000]}")
    return program


def telling_line(output: str) -> str:
    """What a failed test said first; of a sanitizer's report, the line that names the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip().strip("=")]
    errors = [line for line in lines if "Sanitizer:" in line]
    line = re.sub(r"^\S*/(?=[^/ ]+:\d+: )", "", (errors + lines + ["no output"])[0])
    return re.sub(r"^.*CUDA emulator: kernel \W*(\w+).*? threads: ", r"emulator: \1: ", line)


def failure(program: Path) -> str | None:
    """How a test failed, in a line; None if it passed, and then said no more than that."""
    command, environment = [str(program), "quick"], {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, errors="replace", env=environment) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        output = process.stdout.readline()
        if is_check := re.search(r"\.(cpp|h):\d+: ", output) is not None:
            process.kill()  # there is more of the same
        output += process.stdout.read()
        process.wait()
        hangs = watchdog.finished.is_set()
        watchdog.cancel()
    if process.returncode == 0:
        return None
    if hangs:
        return f"hangs: not done after {SECONDS} s"
    crash = f"signal {-process.returncode}: " if process.returncode < 0 and not is_check else ""
    return crash + telling_line(output.replace(f"{program.parent}/", ""))


def try_out(trial: Trial, cpu: Kernels) -> bool:
    """Runs a test, with a bug in the kernels or without. Prints how it went; returns whether that is as it should."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        if trial.mutant is not None:
            plant(trial.mutant, csrc)
        how = failure(compile_test(trial.test, trial.build, csrc, cpu))
    name, what = (trial.mutant.name, trial.mutant.what) if trial.mutant else ("(no bug)", trial.test)
    verdict = how[:120] if how else "NOT SEEN" if trial.mutant else "passes"
    print(f"{name:20} {trial.build:8}{time.monotonic() - start:4.0f} s  {what}\n{'':36}{verdict}", flush=True)
    return bool(how) == bool(trial.mutant)


# ---- all of it -------------------------------------------------------------------------------------------------------


def trials(mutants: Sequence[Mutant]) -> list[Trial]:
    """The bugs, and each test without any; those that take longest first."""
    tests = sorted({Trial(m.test, m.build) for m in mutants})
    return sorted(tests + [Trial(m.test, m.build, m) for m in mutants], key=lambda t: (t.build == "plain", t.build))


def try_all(mutants: Sequence[Mutant], cpu: Kernels, jobs: int) -> int:
    """Runs the trials; returns the exit status of the script."""
    todo = trials(mutants)
    with ThreadPoolExecutor(jobs) as pool:
        well = list(pool.map(partial(try_out, cpu=cpu), todo))
    for trial, is_well in zip(todo, well, strict=True):
        if not is_well:
            print(f"not seen: {trial.mutant.name}" if trial.mutant else f"fails without a bug: {trial.test}")
    print(f"{len(mutants)} bugs planted: {'all seen' if all(well) else 'NOT all is well'}")
    return int(not all(well))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say which bugs there are")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these bugs")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants", metavar="FOLDER")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if unknown := set(options.only or []) - {m.name for m in chosen}:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")
    if options.list:
        print("\n".join(f"{m.name:20} {m.build:8} {m.file:24} {m.what}" for m in chosen))
        return 0
    try:
        return try_all(chosen, kernels(options.build), options.jobs)
    except BrokenError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
