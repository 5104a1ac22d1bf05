"""The figures of a comparison as tables, and in words."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints what every comparison has: levers on top of each other, alone, around the steps, not tried; quality."""
    console.print(_waterfall(figures))
    console.print(
        f"Per batch. Plain is {figures['plain']}; levers add up.\n{disagreement(figures)}\n{left_out(figures)}\n"
        f"{_scores_in_words(figures)}\n"
    )
    console.print(_alone(figures))
    for row in figures["around"]:
        console.print(around_in_words(row))
    console.print()
    for item in figures["not_tried"]:
        console.print(f"Not tried: {item['name']}: {item['why']}.")
    if "quality" in figures:
        console.print()
        console.print(_quality(figures))
        plain, fast = figures["quality"]
        console.print(f"{fast['examples_per_s'] / plain['examples_per_s']:.1f}x the {figures['unit']} a second.")
    console.print(f"All of this took {figures['seconds']:.0f} s.")


def disagreement(figures: dict[str, Any]) -> str:
    """How far figures can be trusted, in words."""
    apart = 100 * figures["control_disagreement"]
    return f"The two plain runs disagree by {apart:.1f} %: trust no figure further than that."


def left_out(figures: dict[str, Any]) -> str:
    """The levers that what follows goes without, in words."""
    dropped = [name for name, on in figures["kept"].items() if not on]
    if not dropped:
        return "Every lever that was tried gave something, and is kept below."
    return f"Left out below, since it gave nothing here: {', '.join(dropped)}."


def _scores_in_words(figures: dict[str, Any]) -> str:
    return (
        f"The loss is of a part of dev after these {figures['levers'][0]['steps']} batches: it shows damage, not merit."
    )


def around_in_words(row: dict[str, Any]) -> str:
    """A row of "around": two measured times, and what an epoch gains by the second, which is computed."""
    times = ", then ".join(f"{row[f'{when}_seconds']:.2f} s ({row[when]})" for when in ("before", "after"))
    gain = "" if row["epoch_gain"] is None else f"; an epoch {row['epoch_gain']:.2f}x, computed"
    return f"{row['name'].capitalize()}: {times}{gain}."


def speed(value: float) -> str:
    """Examples a second, or milliseconds."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _megabytes(row: dict[str, Any]) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"


def table(title: str, first: str, *others: str) -> Table:
    """A table whose other columns are numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    made.add_column(first, no_wrap=True)
    for name in others:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def _waterfall(figures: dict[str, Any]) -> Table:
    head = ("per s", "ms", "gain", "in all", "dev loss", "ops", "MB")
    made = table(figures["title"], "", *head)
    for i, row in enumerate(figures["levers"]):
        made.add_row(
            row["name"],
            speed(row["examples_per_s"]),
            speed(row["step_ms"]),
            f"{row['gain']:.2f}x" if i else "",
            f"{row['speedup']:.2f}x",
            f"{row['dev_loss']:.3f}",
            "" if row["ops"] is None else str(row["ops"]),
            _megabytes(row),
        )
    return made


def _alone(figures: dict[str, Any]) -> Table:
    made = table("each other lever alone, on top of what was kept", "", "per s", "gain", "dev loss", "MB", "changes")
    for row in figures["alone"]:
        control = row.get("control_disagreement")
        if control is not None:
            made.add_section()
        made.add_row(
            row["name"] if control is None else f"{row['name']} ({100 * control:.1f} % apart)",
            speed(row["examples_per_s"]),
            f"{row['gain']:.2f}x" if control is None else "",
            f"{row['dev_loss']:.3f}",
            _megabytes(row),
            row["changes"],
        )
    return made


def _quality(figures: dict[str, Any]) -> Table:
    rows, score = figures["quality"], figures["score"]
    parts = [part for part in ("dev", "test") if part in rows[0]]
    head = ("per s", "ms", *(f"{part} {score}" for part in parts), "scoring s")
    title = f"the same {rows[0]['examples']} training {figures['unit']}, the same first weights"
    made = table(title, "", "train s", *head)
    for row in rows:
        made.add_row(
            row["name"],
            f"{row['seconds']:.1f}",
            speed(row["examples_per_s"]),
            speed(row["step_ms"]),
            *(f"{row[part][score]:.2f}" for part in parts),
            f"{sum(row[f'{part}_seconds'] for part in parts):.1f}",
        )
    return made
