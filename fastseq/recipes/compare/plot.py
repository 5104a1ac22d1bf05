"""The figures of a comparison as a drawing that needs no table beside it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, cast

from fastseq.recipes.compare.show import around_in_words, speed

KEPT, DROPPED, PLAIN, ALONE, GREY = "#1f6fb4", "#a9c7e3", "#6b7280", "#3c8d5a", "#6b7280"

WIDTH, LEFT, BARS, TITLE, BELOW = 10.5, 2.5, 4.6, 0.95, 0.9
"""Inches: of the whole, left of the bars, of the bars, above the first of them, and below the bars of each part."""

LETTERS, NAME = 145, 30
"""Of a line of small text that fits below, and of a name that fits left of the bars."""


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draws the waterfall, the levers alone, and the list of what was not tried.

    Args:
        figures: of `Comparison.finish`, or a file of them.
        path: PNG, SVG, or what else matplotlib writes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levers = [row for i, row in enumerate(figures["levers"]) if i != 1]  # the control is in the subtitle
    notes = _notes(figures)
    parts = [0.42 * len(levers), 0.34 * len(figures["alone"]), 0.18 * (notes.count("\n") + 1)]
    figure = pyplot.figure(figsize=(WIDTH, sum(parts) + 2 * BELOW + TITLE))
    figure.text(0.02, 1 - 0.3 / figure.get_figheight(), figures["title"], fontsize=13, fontweight="bold", va="center")
    top, bottom, text = _stacked(figure, parts)
    _waterfall(top, figures, levers)
    _alone(bottom, figures)
    text.axis("off")
    text.text(-0.4, 1, notes, fontsize=8, color=GREY, va="top", transform=text.transAxes)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _stacked(figure: Any, heights: list[float]) -> list[Any]:
    """Axes of so many inches below each other, with the same room on both sides."""
    whole, axes = figure.get_figheight(), []
    at = whole - TITLE
    for height in heights:
        at -= height
        axes.append(figure.add_axes((LEFT / WIDTH, at / whole, BARS / WIDTH, height / whole)))
        at -= BELOW
    return axes


def _waterfall(axes: Any, figures: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Each bar begins where the one before ended."""
    before = 0.0
    for y, row in enumerate(rows):
        rate = row["examples_per_s"]
        kept = figures["kept"].get(row["name"].removeprefix("+ "), True)
        color = PLAIN if y == 0 else KEPT if kept else DROPPED
        axes.barh(y, before, color="#eef1f5", height=0.62)
        axes.barh(y, rate - before, left=before, color=color, height=0.62, hatch=_hatch(row), edgecolor="white")
        label = "" if y == 0 else f"{row['gain']:.2f}x" + ("" if kept else " (out)")
        _label(axes, label, max(rate, before), y)
        _cells(axes, y, (speed(rate), f"{row['speedup']:.2f}x", *_loss_and_memory(row)))
        before = rate
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[textwrap.fill(row["name"], NAME) for row in rows],
        xlim=(0, 1.12 * max(row["examples_per_s"] for row in rows)),
        xlabel=f"training {figures['unit']} a second",
    )
    _cells(axes, -0.75, ("a second", "in all", "dev loss", "MB"), color=GREY)
    axes.set_title(_subtitle(figures), fontsize=9, color=GREY, loc="left", pad=16)
    _plain_frame(axes)


def _alone(axes: Any, figures: dict[str, Any]) -> None:
    """Gains against the kept version, which is the line at 1; the control's disagreement is a band around it."""
    rows = figures["alone"]
    for y, row in enumerate(rows):
        apart = row.get("control_disagreement")
        if apart is None:
            axes.barh(y, row["gain"] - 1, left=1, color=ALONE, height=0.62, hatch=_hatch(row), edgecolor="white")
            label, place = f"{row['gain']:.2f}x", max(row["gain"], 1)
        else:
            axes.barh(y, 2 * apart, left=1 - apart, color="#c9ccd1", height=0.62)
            label, place = f"{100 * apart:.1f} % apart", 1 + apart
        _label(axes, label, place, y)
        _cells(axes, y, (speed(row["examples_per_s"]), "", *_loss_and_memory(row)))
    axes.axvline(1, color="black", linewidth=0.8)
    low, high = (pick(row["gain"] for row in rows) for pick in (min, max))
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[textwrap.fill(_marked(row), NAME) for row in rows],
        xlim=(min(low, 0.9) - 0.02, 1 + 1.25 * max(high - 1, 0.3)),
        xlabel="times the speed of what was kept",
    )
    title = "each other lever alone, on top of what was kept; hatched: it changes the batch, the model or the data"
    axes.set_title(title, fontsize=9, color=GREY, loc="left")
    _plain_frame(axes)


def _label(axes: Any, text: str, x: float, y: float) -> None:
    """Right of a bar."""
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight="bold")


def _cells(axes: Any, y: float, texts: tuple[str, ...], color: str = "black") -> None:
    """A line of the table beside the bars."""
    for i, text in enumerate(texts):
        place = 1.14 + 0.15 * i, y
        axes.text(
            *place, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8.5, color=color
        )


def _loss_and_memory(row: dict[str, Any]) -> tuple[str, str]:
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return f"{row['dev_loss']:.3f}", memory


def _marked(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['changes']})" if row["changes"] else cast(str, row["name"])


def _hatch(row: dict[str, Any]) -> str:
    return "////" if row["changes"] else ""


def _plain_frame(axes: Any) -> None:
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _subtitle(figures: dict[str, Any]) -> str:
    machine, apart = figures["machine"], 100 * figures["control_disagreement"]
    return f"{machine['cpu']}, torch {machine['torch']}; two runs of plain disagree by {apart:.1f} %"


def _notes(figures: dict[str, Any]) -> str:
    """What plain is, the scores, and what was not tried."""
    lines = [f"Plain: {figures['plain']}."]
    if "quality" in figures:
        plain, fast = figures["quality"]
        score = figures["score"]
        lines.append(
            f"After the same {plain['examples']} {figures['unit']}: dev {score} {plain['dev'][score]:.2f} plain, "
            f"{fast['dev'][score]:.2f} with what was kept."
        )
    lines += [around_in_words(row) for row in figures["around"]]
    reasons: dict[str, list[str]] = {}
    for item in figures["not_tried"]:
        reasons.setdefault(item["why"], []).append(item["name"])
    lines += [f"Not tried: {', '.join(names)} ({why})." for why, names in reasons.items()]
    return "\n".join(textwrap.fill(line, LETTERS, subsequent_indent="    ") for line in lines) + "\n"
