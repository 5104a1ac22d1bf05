"""Speed-ups as a grouped bar chart: a panel for each suite, a group for each shape, a bar for each rival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastseq_benchmarks.results import CaseResult, Report, RivalResult

__all__ = ["FORMATS", "draw"]

FORMATS = (".svg", ".png")
COLOURS = ("#0b6e8f", "#e8a33d", "#7a5195", "#5a9c5a", "#b5495b")
INK, PALE = "#2b2b2b", "#d9d9d9"


def draw(report: Report, path: Path) -> None:
    """Draw all suites of a report that have a speed-up to show.

    Raises:
        ValueError: There is none, or the file's type is not svg or png.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot: got {path.name!r}, wanted a name that ends in {' or '.join(FORMATS)}")
    suites = _suites(report)
    if not suites:
        raise ValueError("--plot: no rival was timed against a baseline, so there is nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
    }
    with plt.rc_context(style):
        height = 3.5 * len(suites) + 0.4
        figure, axes = plt.subplots(len(suites), 1, figsize=(8.6, height), squeeze=False, layout="constrained")
        for axis, (suite, cases) in zip(axes[:, 0], suites.items(), strict=True):
            _panel(axis, suite, cases)
        machine = report.machine
        note = f"{machine.get('cpu')}, {machine.get('threads')} threads, torch {machine.get('torch')}. "
        figure.supxlabel(
            note + "Bars: median of ratios paired by round; whiskers: 95 % interval.", fontsize=7.5, color=INK
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {})
        plt.close(figure)


def _suites(report: Report) -> dict[str, list[CaseResult]]:
    suites: dict[str, list[CaseResult]] = {}
    for case in report.cases:
        if _compared(case):
            suites.setdefault(f"{case.family} {case.suite}", []).append(case)
    return suites


def _compared(case: CaseResult) -> list[RivalResult]:
    return [r for r in case.rivals if r.speedup is not None and r.name != case.baseline]


def _panel(axis: Any, suite: str, cases: list[CaseResult]) -> None:
    names = list(dict.fromkeys(r.name for case in cases for r in _compared(case)))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        label: str | None = name
        for group, case in enumerate(cases):
            rival = next((r for r in _compared(case) if r.name == name), None)
            if rival is None:
                continue
            x = group + (i - (len(names) - 1) / 2) * width
            _bar(axis, x, width, rival, COLOURS[i % len(COLOURS)], label, 1.0 if case.judged else 0.35)
            label = None  # once in the legend
            if name in case.goals:
                goal = case.goals[name]
                axis.plot([x - width / 2, x + width / 2], [goal, goal], color=INK, lw=1.4, ls=(0, (2, 1)), zorder=4)
    goals = [goal for case in cases for name, goal in case.goals.items() if name in names]
    if goals:
        axis.plot([], [], color=INK, lw=1.4, ls=(0, (2, 1)), label="goal")
    axis.axhline(1, color=INK, lw=1)
    axis.set(yscale="log", xlim=(-0.6, len(cases) - 0.4), xticks=range(len(cases)))
    axis.set_xticklabels([_label(case) for case in cases])
    axis.set_ylabel(f"times faster than {cases[0].baseline}")
    axis.set_title(f"{suite}, {cases[0].dtype}, by {cases[0].letters}", loc="left", fontweight="bold")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.grid(axis="y", color=PALE, lw=0.7)
    axis.set_axisbelow(True)
    tops = [r.speedup.high for case in cases for r in _compared(case) if r.speedup]
    lows = [r.speedup.low for case in cases for r in _compared(case) if r.speedup]
    axis.set_ylim(min([1.0, *lows]) * 0.9, max([1.0, *tops, *goals]) * 1.9)
    axis.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _bar(axis: Any, x: float, width: float, rival: RivalResult, colour: str, label: str | None, alpha: float) -> None:
    s = rival.speedup
    if s is None:
        return
    from matplotlib import patheffects

    whiskers = [[s.median - s.low], [s.high - s.median]]
    # A bar stands on 1x, where no change is; one of a run that is not judged is pale.
    axis.bar(x, s.median - 1, width * 0.92, bottom=1, color=colour, label=label, alpha=alpha, zorder=2)
    axis.errorbar(x, s.median, yerr=whiskers, color=INK, lw=0.9, capsize=2.5, zorder=3)
    text = axis.annotate(
        f"{s.median:.3g}x",
        (x, max(s.high, 1)),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        zorder=5,
    )
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])  # legible across a goal line


def _label(case: CaseResult) -> str:
    return case.shape.replace(",", " x ") + ("" if case.judged else "\n(not judged)")
