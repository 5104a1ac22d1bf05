"""What a run leaves behind: plain records that go to JSON and come back equal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastseq_benchmarks.stats import Estimate

__all__ = ["CaseResult", "Report", "RivalResult", "Table", "case_from", "load", "save"]

FORMAT = 1


@dataclasses.dataclass
class RivalResult:
    """One rival in one case.

    Attributes:
        name: The rival.
        note: Why it was not timed, else "".
        matches: Whether its result passed the gate; None where there was nothing to check.
        error: The error of its result against the float64 truth.
        seconds: One call.
        speedup: The baseline's time over its own, paired by round.
        floor_share: The floor's time over its own, paired by round.
        ops: Operators that a call runs.
        kept_bytes: Bytes of the storages kept for backward.
        peak_bytes: The most memory that a call adds while it runs.
        copy_share: The time that a copy takes to move the case's bytes over its own, paired by round (on a GPU).
        kernels: Kernels, copies and fills that a call runs on the GPU.
        launches: Calls of the driver that put them there: fewer, where a graph is launched.
        waits: How often the host waits for the GPU.
    """

    name: str
    note: str = ""
    matches: bool | None = None
    error: float | None = None
    seconds: Estimate | None = None
    speedup: Estimate | None = None
    floor_share: Estimate | None = None
    ops: int | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    copy_share: Estimate | None = None
    kernels: int | None = None
    launches: int | None = None
    waits: int | None = None


@dataclasses.dataclass
class CaseResult:
    """One shape of one suite, all rivals.

    Attributes:
        family: The op family.
        suite: The suite.
        letters: What the shape's numbers are, "B,T,K" for the CRF.
        shape: The numbers.
        dtype: Of the inputs.
        device: cpu or cuda.
        baseline: The rival that speed-ups are against; "" if none passed the gate.
        rounds: How many rounds were made.
        control: The baseline's time over that of its second entry: 1 on a quiet machine.
        judged: Whether the two entries agreed; where they did not, no number of this case should be quoted.
        fma_per_s: The peak multiply-adds a second, the median over the rounds.
        goals: The speed-up aimed at, by rival.
        rivals: The baseline and the others, in the order in which they ran.
        copy_bytes_per_s: The bytes a second that a copy on the GPU moves, the median over the rounds.
        traffic_bytes: The bytes that the case cannot but move.
    """

    family: str
    suite: str
    letters: str
    shape: str
    dtype: str
    device: str
    baseline: str = ""
    rounds: int = 0
    control: Estimate | None = None
    judged: bool = False
    fma_per_s: float | None = None
    goals: dict[str, float] = dataclasses.field(default_factory=dict)
    rivals: list[RivalResult] = dataclasses.field(default_factory=list)
    copy_bytes_per_s: float | None = None
    traffic_bytes: float | None = None

    @property
    def key(self) -> str:
        """What makes two results comparable."""
        return f"{self.family} {self.suite} {self.shape} {self.dtype} {self.device}"

    @property
    def wrong(self) -> list[RivalResult]:
        """The rivals whose result was refused."""
        return [r for r in self.rivals if r.matches is False]


@dataclasses.dataclass
class Table:
    """A result that is not a timing: rows of numbers and words."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclasses.dataclass
class Report:
    """A whole run."""

    machine: dict[str, str | int]
    options: dict[str, Any]
    cases: list[CaseResult] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)


def save(report: Report, path: Path) -> None:
    """Write a report as JSON; `path`'s folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, **dataclasses.asdict(report)}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Report:
    """Read a report back.

    Raises:
        ValueError: The file is not such a report; the message says what is wrong with it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != FORMAT:
            raise ValueError(f"format {document.get('format')!r}, wanted {FORMAT}")
        return Report(
            machine=document["machine"],
            options=document["options"],
            cases=[case_from(case) for case in document["cases"]],
            tables=[Table(**table) for table in document["tables"]],
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a report of fastseq bench: {error}") from None


def case_from(fields: dict[str, Any]) -> CaseResult:
    """A case back from its JSON."""
    rivals = [RivalResult(**{key: _estimate(value) for key, value in r.items()}) for r in fields["rivals"]]
    control = _estimate(fields["control"])
    return CaseResult(**{**fields, "control": control, "rivals": rivals})


def _estimate(value: Any) -> Any:
    return Estimate(**value) if isinstance(value, dict) else value
