"""`fastseq bench --compare REV`: the package as it is now beside that of a git revision, in turns.

The revision is checked out into a temporary worktree, and compiled there with the settings of the environment
(FASTSEQ_BUILD), unless its C++ sources are those of now: then the libraries of now are copied. Two processes
(`worker`), one with the package of each tree, run the same benchmarks, those of now. They take turns, a round each,
so that what slows the machine down hits both, and ratios are taken within a pair of rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fastseq_benchmarks import results
from fastseq_benchmarks.results import CaseResult
from fastseq_benchmarks.runner import Effort
from fastseq_benchmarks.stats import Estimate, paired_ratio

__all__ = ["Pair", "compare"]

HERE = Path(__file__).resolve().parent
COMPILED = ("csrc", "CMakeLists.txt", "build_backend", "setup.py")
"""What the compiled libraries are made of."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One case at both revisions.

    Attributes:
        old: At the revision.
        new: Now.
        ratios: The time now over the time at the revision, for each rival that was timed in both, paired by round.
    """

    old: CaseResult
    new: CaseResult
    ratios: dict[str, Estimate]


def compare(revision: str, argv: Sequence[str], cases: int, effort: Effort, root: Path | None = None) -> Iterator[Pair]:
    """Measure the cases that `argv` asks for, one after the other, at both revisions.

    Args:
        revision: As git names it.
        argv: Of `fastseq bench`.
        cases: How many there are.
        effort: For each of the two.
        root: The checkout; by default the one that this file is in.

    Raises:
        ValueError: There is no checkout or no such revision, or it cannot be built, or does not run the benchmarks.
    """
    root = _checkout() if root is None else root
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(f"--compare: got {revision!r}, wanted a file of --json, or a revision that git knows")
    with _worktree(root, commit.strip()) as tree:
        _build(root, tree, commit.strip(), revision)
        with _Side(tree, argv, f"at {revision}") as old, _Side(root, argv, "now") as new:
            for number in range(cases):
                yield _in_turns(old, new, number, effort)


def _in_turns(old: _Side, new: _Side, number: int, effort: Effort) -> Pair:
    """One case: rounds of the two sides, the one first that was second before."""
    names = old.ask("begin", number)
    both = [name for name in new.ask("begin", number) if name in names]
    samples: dict[_Side, list[dict[str, float]]] = {old: [], new: []}
    start = time.perf_counter()
    for done in range(effort.max_rounds if both else 0):
        if done >= effort.min_rounds and time.perf_counter() - start > 2 * effort.budget_s:
            break
        for side in (old, new) if done % 2 else (new, old):
            samples[side].append(side.ask("round"))
    was, now = (results.case_from(side.ask("finish")) for side in (old, new))
    ratios = {
        name: paired_ratio([s[name] for s in samples[new]], [s[name] for s in samples[old]])
        for name in both
        if samples[old]
    }
    return Pair(was, now, ratios)


# ---- the trees ---------------------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails, or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _checkout() -> Path:
    found = _git(HERE, "rev-parse", "--show-toplevel")
    if found is None or not (Path(found.strip()) / "fastseq").is_dir():
        raise ValueError(
            "--compare: a revision needs a git checkout of fastseq, and this is none: compare with a file of --json"
        )
    return Path(found.strip())


@contextlib.contextmanager
def _worktree(root: Path, commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastseq-bench-") as folder:
        tree = Path(folder) / "tree"
        if _git(root, "worktree", "add", "--detach", str(tree), commit) is None:
            raise ValueError(f"--compare: git cannot check {commit} out into a worktree of its own")
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _build(root: Path, tree: Path, commit: str, revision: str) -> None:
    """Compile the libraries of a tree, or copy those of now where they would be the same."""
    if not (tree / "CMakeLists.txt").exists():
        return
    if _git(root, "diff", "--quiet", commit, "--", *COMPILED) is not None:
        if (root / "fastseq" / "lib").is_dir():
            shutil.copytree(root / "fastseq" / "lib", tree / "fastseq" / "lib", dirs_exist_ok=True)
        for module in (root / "fastseq").glob("_host*.so"):
            shutil.copy2(module, tree / "fastseq")
        return
    print(f"compiling {revision}: some minutes", flush=True)
    command = [sys.executable, "setup.py", "build_native", "--inplace"]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--compare: {revision} does not compile here: {_last_line(done.stdout)}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"


# ---- the processes -----------------------------------------------------------------------------------------------


class _Side:
    """A worker with the package of one tree and the benchmarks of now."""

    def __init__(self, tree: Path, argv: Sequence[str], name: str) -> None:
        self.name = name
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fastseq-bench-")))
        (folder / "fastseq_benchmarks").symlink_to(HERE)
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(tree), str(folder), *([inherited] if inherited else [])])
        self._errors: IO[str] = self._stack.enter_context((folder / "errors").open("w+", encoding="utf-8"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastseq_benchmarks.worker", *argv],
            cwd=folder,  # which comes first in the path of -m
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._stack.close()

    def ask(self, *request: Any) -> Any:
        """One request, and its answer.

        Raises:
            ValueError: The process has ended; the message has its last words.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise ValueError(f"--compare: {self.name} the benchmarks do not run: {_last_line(self._errors.read())}")
        return json.loads(answer)
