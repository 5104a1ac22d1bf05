"""Results as tables on a terminal, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Iterable

from fastseq_benchmarks.results import CaseResult, Report, RivalResult, Table
from fastseq_benchmarks.revision import Pair
from fastseq_benchmarks.runner import CONTROL_TOLERANCE
from fastseq_benchmarks.stats import Estimate

__all__ = ["case_table", "compare", "compare_in_turns", "print_table", "verdict"]

BEYOND = 0.05  # two processes that run the same code differ by some percent: their memory lies elsewhere

COLUMNS = [
    "rival",
    "match (error)",
    "time, 95 % interval",
    "speed-up",
    "goal",
    "of floor",
    "ops",
    "kept",
    "peak",
]
ON_A_GPU = ["GB/s (of a copy)", "kernels", "launches", "waits"]


def print_table(table: Table) -> None:
    """Print a table: with rich where it is installed and wide enough, else in plain text."""
    width = sum(max(len(c) for c in column) + 3 for column in zip(table.columns, *table.rows, strict=True))
    try:
        import rich
        import rich.box
        from rich.table import Table as RichTable
    except ImportError:
        rich = None  # type: ignore[assignment]
    if rich is None or rich.get_console().width < width:  # rich would cut the cells off; plain lines can wrap
        print(f"\n{table.title}\n{_plain(table)}")
        return
    pretty = RichTable(title=table.title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for i, column in enumerate(table.columns):
        pretty.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in table.rows:
        bad = any(mark in cell for cell in row for mark in ("NO", "missed", "REGRESSION"))
        pretty.add_row(*row, style="red" if bad else None)
    rich.print(pretty)


def _plain(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    rows = [table.columns, ["-" * w for w in widths], *table.rows]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def case_table(case: CaseResult) -> Table:
    """One case: a row a rival, with the verdict on the run in the title."""
    what = f"{case.family} {case.suite}   {case.letters} = {case.shape}   {case.dtype} on {case.device}"
    title = f"{what}   {verdict(case)}"
    if case.fma_per_s is not None:
        title += f"   peak {case.fma_per_s / 1e9:.0f} GFMA/s"
    if case.copy_bytes_per_s is not None:
        title += f", copy {case.copy_bytes_per_s / 1e9:.0f} GB/s"
    if case.device != "cuda":
        return Table(title, COLUMNS, [_row(case, rival) for rival in case.rivals])
    rows = [[*_row(case, rival), *_gpu_cells(case, rival)] for rival in case.rivals]
    return Table(title, [*COLUMNS, *ON_A_GPU], rows)


def verdict(case: CaseResult) -> str:
    """Whether the run's numbers may be quoted, in words."""
    if case.control is None:
        return "NOTHING TIMED"
    c = case.control
    shown = f"control {c.median:.3f} [{c.low:.3f}, {c.high:.3f}], {case.rounds} rounds"
    return f"judged: {shown}" if case.judged else f"NOT JUDGED: the baseline disagrees with itself: {shown}"


def goal_cell(case: CaseResult, rival: RivalResult) -> str:
    """The goal and whether the median reached it; a run that is not judged says neither."""
    goal = case.goals.get(rival.name)
    if goal is None or rival.speedup is None:
        return ""
    if not case.judged:
        return f"{goal:g}x not judged"
    return f"{goal:g}x {'met' if rival.speedup.median >= goal else 'missed'}"


def _row(case: CaseResult, rival: RivalResult) -> list[str]:
    if rival.matches is None:
        match = "probe" if rival.seconds else "-"
    else:
        match = f"{'yes' if rival.matches else 'NO'} ({rival.error:.0e})" if rival.error is not None else "NO"
    seconds = rival.note or (f"{_time(rival.seconds)}" if rival.seconds else "")
    share = f"{100 * rival.floor_share.median:.1f} %" if rival.floor_share else ""
    ops = "" if rival.ops is None else f"{rival.ops:,}"
    baseline = rival.name == case.baseline
    speedup = "baseline" if baseline else _ratio(rival.speedup)
    sizes = [_bytes(rival.kept_bytes), _bytes(rival.peak_bytes)]
    return [rival.name, match, seconds, speedup, goal_cell(case, rival), share, ops, *sizes]


def _gpu_cells(case: CaseResult, rival: RivalResult) -> list[str]:
    bandwidth = ""
    if rival.seconds and rival.copy_share and case.traffic_bytes is not None:
        rate = case.traffic_bytes / rival.seconds.median / 1e9
        bandwidth = f"{rate:.4g} ({100 * rival.copy_share.median:.1f} %)"
    counts = (rival.kernels, rival.launches, rival.waits)
    return [bandwidth, *("" if n is None else f"{n:,}" for n in counts)]


def _time(e: Estimate) -> str:
    """A time with its interval, in one unit."""
    unit, scale = ("s", 1.0) if e.median >= 1 else ("ms", 1e3) if e.median >= 1e-3 else ("us", 1e6)
    return f"{e.median * scale:.4g} {unit} [{e.low * scale:.4g}, {e.high * scale:.4g}]"


def _ratio(e: Estimate | None) -> str:
    return f"{e.median:.3g}x [{e.low:.3g}, {e.high:.3g}]" if e else ""


def _bytes(n: int | None) -> str:
    if n is None:
        return ""
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 / 10 else f"{n / 1024:.1f} KiB"


# ---- two runs ---------------------------------------------------------------------------------------------


def compare(old: Report, new: Report) -> tuple[Table, int]:
    """Old against new, for each case and rival that both have; (the table, the number of regressions).

    A rival has regressed where its new interval lies wholly beyond its old one: that of the speed-up, if both
    runs have the same baseline, since a busy machine slows the baseline too; else that of the time. It has
    regressed as well where its result is now refused, or it runs more operators or kernels, keeps more bytes, or
    waits more often for a GPU. Timings of a case that either run could not judge are shown, and never flagged.
    """
    columns = ["case", "rival", "old", "new", "new / old", "old speed-up", "new speed-up", "verdict"]
    table, regressions = Table("new against old", columns, []), 0
    before = {case.key: case for case in old.cases}
    for case in new.cases:
        if case.key not in before:
            continue
        was = {rival.name: rival for rival in before[case.key].rivals}
        for rival in case.rivals:
            if rival.name not in was or (rival.matches is None and rival.seconds is None):
                continue
            a, word = was[rival.name], _change(before[case.key], case, was[rival.name], rival)
            regressions += word.startswith("REGRESSION")
            times = [_time(r.seconds) if r.seconds else r.note for r in (a, rival)]
            both = f"{rival.seconds.median / a.seconds.median:.3f}" if a.seconds and rival.seconds else ""
            name = f"{case.family} {case.suite} {case.shape}"
            table.rows.append([name, rival.name, *times, both, _ratio(a.speedup), _ratio(rival.speedup), word])
    return table, regressions


def compare_in_turns(pairs: Iterable[Pair]) -> tuple[Table, int]:
    """Two revisions, measured in turns; (the table, the number of regressions).

    A rival has regressed where the interval of its time over its old time lies wholly beyond 1.05, and beyond that of
    the baseline, which is other people's code and the same on both sides: that is the control. Where the baseline's
    median is off by more than 10 %, nothing is flagged but what does not depend on time, as in `compare`.
    """
    columns = ["case", "rival", "old", "new", "new / old, 95 % interval", "verdict"]
    table, regressions = Table("new against old, in turns", columns, []), 0
    for pair in pairs:
        was = {rival.name: rival for rival in pair.old.rivals}
        for rival in pair.new.rivals:
            if rival.name not in was or (rival.matches is None and rival.seconds is None):
                continue
            word, ratio = _change_in_turns(pair, was[rival.name], rival), pair.ratios.get(rival.name)
            regressions += word.startswith("REGRESSION")
            times = [_time(r.seconds) if r.seconds else r.note for r in (was[rival.name], rival)]
            name = f"{pair.new.family} {pair.new.suite} {pair.new.shape}"
            table.rows.append([name, rival.name, *times, _ratio(ratio), word])
    return table, regressions


def _change_in_turns(pair: Pair, old: RivalResult, new: RivalResult) -> str:
    """The verdict on one rival."""
    ratio, base = pair.ratios.get(new.name), pair.new.baseline
    control = pair.ratios.get(base) if not base.startswith("fastseq") else None
    if worse := _worse(old, new):
        return worse
    if ratio is None:
        return "not timed in both"
    if control is not None and max(control.median, 1 / control.median) > 1 + CONTROL_TOLERANCE:
        return "not judged"
    if control is not None and new.name == base:
        return "control"
    low, high = (control.low, control.high) if control is not None else (1.0, 1.0)
    if ratio.low > max(high, 1 + BEYOND):
        return "REGRESSION: slower"
    return "faster" if ratio.high < min(low, 1 / (1 + BEYOND)) else "same"


def _worse(old: RivalResult, new: RivalResult) -> str:
    """What is worse whatever the clock says, if anything."""
    if old.matches and new.matches is False:
        return "REGRESSION: its result is refused"
    for what in ("ops", "kept_bytes", "kernels", "waits"):
        a, b = getattr(old, what), getattr(new, what)
        if a is not None and b is not None and b > a:
            return f"REGRESSION: {what.replace('_', ' ')} {a} -> {b}"
    return ""


def _change(old_case: CaseResult, new_case: CaseResult, old: RivalResult, new: RivalResult) -> str:
    """The verdict on one rival."""
    if worse := _worse(old, new):
        return worse
    if old.seconds is None or new.seconds is None:
        return "not timed in both"
    if not (old_case.judged and new_case.judged):
        return "not judged"
    same_baseline = old_case.baseline == new_case.baseline
    if same_baseline and old.speedup and new.speedup and new.name != new_case.baseline:
        return _beyond(new.speedup, old.speedup)
    if same_baseline and new.name == new_case.baseline and _has_others(new_case):
        return "baseline"
    return _beyond(old.seconds, new.seconds)


def _beyond(better_if_above: Estimate, other: Estimate) -> str:
    """Compare two intervals, the first of which is meant to be the higher: new speed-up, or old time."""
    if better_if_above.high < other.low:
        return "REGRESSION: slower"
    return "faster" if better_if_above.low > other.high else "same"


def _has_others(case: CaseResult) -> bool:
    return any(r.speedup for r in case.rivals if r.name != case.baseline)


def differing(old: Report, new: Report) -> Iterable[str]:
    """What two runs' machines differ in, one line each; such runs can be compared with care only."""
    for key in sorted({*old.machine, *new.machine}):
        a, b = old.machine.get(key, "-"), new.machine.get(key, "-")
        if a != b:
            yield f"{key}: {a} -> {b}"
