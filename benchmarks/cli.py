"""`fastseq bench`: pick cases, run them, print, save, plot, compare.

The exit status is 1 if a result is wrong or, with --compare, has become slower.

    fastseq bench crf                                     all suites at all shapes
    fastseq bench crf --suite loss --shape 32,64,9        one case
    fastseq bench crf --json new.json --compare old.json  flag what has become slower
    fastseq bench crf --compare HEAD~3                    the same, beside the package of a git revision
    fastseq bench crf --device cuda --json gpu.json       on a GPU, each of its backends beside the others
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from fastseq.reasons import no_cuda
from fastseq_benchmarks import machine, plot, report, results, revision
from fastseq_benchmarks.results import Report, Table
from fastseq_benchmarks.runner import Case, Effort, Shape, Suite, run_case

__all__ = ["Plan", "main", "plan"]

FAMILIES = ("crf", "pointer", "attention", "models")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUICK = Effort(budget_s=2.0, min_rounds=6)
QUICK_SHAPES = 2


class UsageError(ValueError):
    """What the command line asks for cannot be had; the message says what can."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command line asks for.

    Attributes:
        options: As parsed.
        cases: To be run.
        tables: To be made.
        effort: For each case.
    """

    options: argparse.Namespace
    cases: list[Case]
    tables: list[Callable[[torch.dtype, str], Table]]
    effort: Effort

    @property
    def seed(self) -> int:
        """Of the inputs."""
        return int(self.options.seed)


def plan(argv: Sequence[str]) -> Plan:
    """Check all options, and make this process ready to run the cases.

    Raises:
        ValueError: An option is wrong; the message says how.
        SystemExit: Help was asked for.
    """
    options = _parser().parse_args(argv)
    cases, tables = _select(_family(options.family), options)
    effort = QUICK if options.quick else Effort()
    if options.budget is not None:
        effort = dataclasses.replace(effort, budget_s=options.budget)
    if options.plot and options.plot.suffix not in plot.FORMATS:  # not after minutes of measuring
        raise UsageError(f"--plot: got {options.plot.name!r}, wanted a name that ends in {' or '.join(plot.FORMATS)}")
    torch.set_num_threads(options.threads)
    return Plan(options, cases, tables, effort)


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0, 1 for a wrong result or a regression, 2 for bad arguments."""
    try:
        return _run(plan(argv), argv)
    except ValueError as error:
        print(f"fastseq bench: {error}")
        return 2
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastseq bench", description="Time fastseq against its peers, after checking both.")
    add = parser.add_argument
    add(
        "family",
        nargs="?",
        default="crf",
        metavar="FAMILY",
        help=f"one of {', '.join(FAMILIES)}; default crf",
    )
    add("--suite", action="append", help="only this suite; may be repeated")
    add("--shape", action="append", help="only this shape, as in 32,64,9; may be repeated")
    add("--plot", type=Path, metavar="F", help="draw the speed-ups into F.svg or F.png")
    add("--json", type=Path, metavar="F", help="write all numbers, and what machine they are from, into F")
    add("--compare", metavar="OLD", help="an earlier --json, or a git revision, measured in turns with this one")
    add("--quick", action="store_true", help="a first look: two small shapes, two seconds each")
    add("--budget", type=float, metavar="S", help=f"seconds of timing a case; default {Effort.budget_s:g}")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default %(default)s")
    add("--device", default="cpu", help="cpu (the default) or cuda")
    add("--dtype", default="float32", help=f"one of {', '.join(DTYPES)}; default float32")
    add("--seed", type=int, default=0, help="of the inputs; default 0")
    return parser


def _run(what: Plan, argv: Sequence[str]) -> int:
    """Measure, and compare with what is asked for."""
    options, older = what.options, what.options.compare
    old = results.load(Path(older)) if older and _is_file(older) else None
    kept = ("family", "suite", "shape", "quick", "budget", "threads", "device", "dtype", "seed")
    new = Report(machine.describe(options.device), {name: getattr(options, name) for name in kept})
    print("\n".join(f"{key:12s} {value}" for key, value in new.machine.items()))
    if older and old is None:
        return _run_in_turns(what, argv, new)
    for case in what.cases:
        new.cases.append(run_case(case, what.effort, what.seed))
        report.print_table(report.case_table(new.cases[-1]))
    for table in what.tables:
        new.tables.append(table(DTYPES[options.dtype], options.device))
        report.print_table(new.tables[-1])
    wrong = _keep(new, options)
    if old is None:
        return int(wrong)
    for line in report.differing(old, new):
        print(f"the two runs differ in {line}")
    return int(_verdict(*report.compare(old, new)) or wrong)


def _run_in_turns(what: Plan, argv: Sequence[str], new: Report) -> int:
    """Beside another revision; without tables, which have no times."""
    pairs = []
    for pair in revision.compare(what.options.compare, argv, len(what.cases), what.effort):
        pairs.append(pair)
        new.cases.append(pair.new)
        report.print_table(report.case_table(pair.new))
    wrong = _keep(new, what.options)
    return int(_verdict(*report.compare_in_turns(pairs)) or wrong)


def _is_file(older: str) -> bool:
    """Whether --compare names a file, there or not, and not a revision."""
    return older.endswith(".json") or Path(older).is_file()


def _verdict(table: Table, regressions: int) -> bool:
    """Print a comparison; whether anything has become worse."""
    report.print_table(table)
    print(f"{regressions} regressions in {len(table.rows)} results that both have")
    return regressions > 0


def _keep(new: Report, options: argparse.Namespace) -> bool:
    """Save and draw; whether a result is wrong."""
    wrong = [f"{case.key}: {rival.name}: {rival.note}" for case in new.cases for rival in case.wrong]
    for line in wrong:
        print(f"WRONG: {line}")
    for case in new.cases:
        if not case.judged:
            print(f"NOT JUDGED: {case.key}: the baseline disagrees with itself, or nothing was timed")
    if options.json:
        results.save(new, options.json)
    if options.plot:
        try:
            plot.draw(new, options.plot)
        except ImportError:
            raise UsageError("--plot: matplotlib is not installed: pip install 'fastseq-kernels[bench]'") from None
    return bool(wrong)


def _family(name: str) -> ModuleType:
    """The module of a family."""
    if name not in FAMILIES:
        raise UsageError(f"{name!r} is not a family; there is: {', '.join(FAMILIES)}")
    return importlib.import_module(f"fastseq_benchmarks.{name}")


def _select(
    family: ModuleType, options: argparse.Namespace
) -> tuple[list[Case], list[Callable[[torch.dtype, str], Table]]]:
    """The cases and the tables that the options ask for."""
    names = [*family.SUITES, *family.TABLES]
    wanted = options.suite or [name for name in names if name in family.TABLES or not family.SUITES[name].by_name]
    for name in wanted:
        if name not in names:
            raise UsageError(f"--suite: got {name!r}, wanted one of {', '.join(names)}")
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype: got {options.dtype!r}, wanted one of {', '.join(DTYPES)}")
    if options.device not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {options.device!r}, wanted cpu or cuda")
    if options.device == "cuda" and no_cuda() is not None:
        raise UsageError(f"--device: got 'cuda', and {no_cuda()}")
    if options.threads < 1:
        raise UsageError(f"--threads: got {options.threads}, wanted at least 1")
    cases = [
        case
        for name, suite in family.SUITES.items()
        if name in wanted
        for case in suite.cases(_shapes(suite, options), DTYPES[options.dtype], options.device)
    ]
    # A table has shapes of its own: a quick look, or one shape, does without unless it is asked for by name.
    skip = not options.suite and (options.quick or options.shape)
    return cases, [] if skip else [family.TABLES[name] for name in family.TABLES if name in wanted]


def _shapes(suite: Suite, options: argparse.Namespace) -> list[Shape]:
    """The shapes that the options ask for, or the suite's own."""
    if options.shape:
        return [_shape(text, suite.letters) for text in options.shape]
    if options.quick:
        return list(suite.quick or suite.shapes[:QUICK_SHAPES])
    return [*suite.shapes, *(suite.large if options.device == "cuda" else [])]


def _shape(text: str, letters: str) -> Shape:
    parts = text.split(",")
    if len(parts) != len(letters.split(",")) or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UsageError(f"--shape: got {text!r}, wanted {letters}, each at least 1, as in 32,64,9")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
