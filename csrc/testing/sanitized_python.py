"""The CPU library under a sanitizer, driven from Python.

    python csrc/testing/sanitized_python.py address,undefined|thread [BUILD_FOLDER]

Builds the library with it, puts it into a copy of the package, and has a Python process with the sanitizer's runtime
run every op on all of its sample inputs, alone and in two threads at once, whose results must be the same bits. In each
thread torch has one thread of its own: OpenMP's, in which torch would run the kernels, are not instrumented. (The C++
tests run the kernels in threads that are.) Under `address` a read beyond the end of an argument is planted, and must be
found, or else the rest means nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNTIMES = {"address": ("asan", "ubsan"), "thread": ("tsan",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have until the process ends
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
}


def main(sanitizers: str, folder: Path) -> None:
    """Builds, in a folder that may have the objects already, and runs the two child processes."""
    name = sanitizers.partition(",")[0]
    library = build(sanitizers, folder)
    package = folder / "package" / "fastseq"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fastseq", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (package / "lib").mkdir(exist_ok=True)
    shutil.copy(library, package / "lib")
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}
    environment["LD_PRELOAD"] = ":".join(runtime(each) for each in (*RUNTIMES[name], "stdc++"))
    command = [sys.executable, "-X", "faulthandler", __file__]
    subprocess.run([*command, "--run", str(package)], env=environment, check=True)
    if name == "address":
        planted = subprocess.run([*command, "--plant"], env=environment, capture_output=True, text=True)
        if "heap-buffer-overflow" not in planted.stderr:
            sys.exit(f"a planted read beyond an argument's end was not found:\n{planted.stderr}")
        print("a planted read beyond an argument's end is found")


def build(sanitizers: str, folder: Path) -> Path:
    """The library with sanitizers, for all instruction sets."""
    import torch

    torch_folder = Path(torch.__file__).parent
    options = [f"-DFASTSEQ_SANITIZE={sanitizers}", f"-DFASTSEQ_TORCH={torch_folder}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", str(folder), "--target", "fastseq_cpu"], check=True)
    return folder / "libfastseq_cpu.so"


def runtime(name: str) -> str:
    """The shared library of that name which belongs to the compiler."""
    found = subprocess.run(["c++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def run_all(package: str) -> None:
    """Every op of the CPU library on its samples; ends with an error where two threads give other bits than one."""
    import torch

    import fastseq
    from fastseq import library
    from fastseq.registry import OPS
    from fastseq.testing import compare, sample_inputs

    assert Path(fastseq.__file__).parent == Path(package), fastseq.__file__
    assert library.loaded("cpu"), library.why_not("cpu")
    torch.set_num_threads(1)
    for isa in library.isas():
        with library.use_isa(isa):
            for name, op in OPS.items():
                cpu = next((backend for backend in op.backends if backend.name == "cpu"), None)
                if cpu is None:
                    continue
                dtypes = torch.float32, torch.bfloat16, torch.float64
                samples = [a for d in dtypes for a in sample_inputs(name, dtype=d) if cpu.refusal(*a) is None]
                alone = [cpu.run(*args) for args in samples]
                together = in_two_threads(lambda args, run=cpu.run: run(*args), samples)
                for results in together:
                    for got, wanted in zip(results, alone, strict=True):
                        compare(got, wanted, 0.0)
                print(f"{isa:9s} {name}: {len(samples)} samples", flush=True)


def in_two_threads(call: Any, samples: list[Any]) -> list[list[Any]]:
    """The results of each of two threads, which begin together."""
    barrier, results = threading.Barrier(2), [[], []]  # type: ignore[var-annotated]

    def work(number: int) -> None:
        import torch

        torch.set_num_threads(1)
        barrier.wait()
        results[number] = [call(args) for args in samples]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def plant() -> None:
    """Reads emissions whose memory was taken away behind torch's back."""
    import torch

    from fastseq.functional import crf_log_partition

    x = torch.zeros(64, 64, 4)
    x.untyped_storage().resize_(64)
    crf_log_partition(x, torch.zeros(4, 4), torch.zeros(4), torch.zeros(4))


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run_all(sys.argv[2])
    elif sys.argv[1] == "--plant":
        plant()
    else:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "build" / f"sanitized-{sys.argv[1]}"
        main(sys.argv[1], folder.resolve())
