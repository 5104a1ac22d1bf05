"""The parts of the site that are made when it is built: what runs where, and what was measured.

A line <!-- generated: NAME --> of a page is replaced by what the function of that name in `GENERATED` returns.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastseq.recipes import RECIPES
from fastseq.recipes.compare.show import around_in_words

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Where the table asks each backend. No GPU is needed: the tensors are fake, and the GPU's age is told to the backends.
MACHINES = {"CPU": None, "GPU before sm_80": (7, 5), "GPU from sm_80": (9, 0)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the drawings of the results: those that are committed, and of the other files, new ones."""
    for source in _results():
        data = json.loads(source.read_text("utf-8"))
        drawing = _drawing(source, data)
        if drawing is not None:
            name = f"results/{source.stem}{drawing.suffix}"
            files.append(File.generated(config, name, abs_src_path=str(drawing)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is generated."""
    return re.sub(r"^<!-- generated: (\w+) -->$", lambda match: GENERATED[match[1]](), markdown, flags=re.MULTILINE)


# ---- what runs where ------------------------------------------------------------------------------------------------


def support() -> str:
    """A table of the backends that take each op, and a list of what they refuse."""
    import fastseq.ops  # noqa: F401  (registers them)
    from fastseq.registry import OPS

    table = ["| op | machine | " + " | ".join(map(_name, DTYPES)) + " |", "|---" * (len(DTYPES) + 2) + "|"]
    notes: list[str] = []
    for name, op in sorted(OPS.items()):
        if name.endswith("_grad"):
            continue
        samples = {dtype: list(op.samples("cpu", dtype, 0)) for dtype in DTYPES}
        reasons: dict[str, list[str]] = {}
        for machine, capability in MACHINES.items():
            cells = [_takers(op, samples[dtype], capability, reasons) for dtype in DTYPES]
            table.append(f"| `{name}` | {machine} | {' | '.join(cells)} |")
        notes += [f"- `{name}`, {backend}: {'; '.join(found)}" for backend, found in reasons.items()]
    return "\n".join([*table, "", "## Why not", "", *notes])


def _takers(op: Any, samples: list[Any], capability: tuple[int, int] | None, reasons: dict[str, list[str]]) -> str:
    """The backends that run the samples, in the order of choice; * for those that run some of them."""
    with _machine(capability):
        if capability is not None:
            samples = [tree_map_only(torch.Tensor, _on_gpu, args) for args in samples]
        cells = []
        for backend in op.backends:
            if not backend.automatic or backend.device not in (None, "cpu" if capability is None else "cuda"):
                continue
            refusals = [backend.why_not(*args) for args in samples]
            if not all(refusals):
                cells.append(backend.name + "\\*" * any(refusals))
            for reason in filter(None, refusals):
                short = re.sub(r",? (got|this one is) .*", "", reason)  # without what came in this sample or that
                if short not in reasons.setdefault(backend.name, []):
                    reasons[backend.name].append(short)
    return ", ".join(cells)


@contextlib.contextmanager
def _machine(capability: tuple[int, int] | None) -> Iterator[None]:
    """Tells the backends that there is a GPU of that compute capability, if one is asked for."""
    if capability is None:
        yield
        return
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("fastseq.reasons._capability", return_value=capability),
        mock.patch("fastseq.reasons._library_cannot_run", return_value=None),
    ):
        yield


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return fake.requires_grad_(tensor.requires_grad)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what was measured ----------------------------------------------------------------------------------------------


def results() -> str:
    """A section for each file of results, of `fastseq compare` and of `fastseq bench`."""
    return "\n\n".join("\n".join(_section(path)) for path in _results())


def _results() -> list[Path]:
    paths = RESULTS.glob("*.json")
    return sorted(paths, key=lambda path: (not path.stem.startswith("compare"), path.stem))


def _section(path: Path) -> Iterator[str]:
    data = json.loads(path.read_text("utf-8"))
    yield f"## {path.stem}\n"
    machine = ", ".join(f"{key} {value}" for key, value in data["machine"].items() if value and key != "flags")
    yield f"{machine}. All figures: `benchmarks/results/{path.name}`.\n"
    drawing = _drawing(path, data)
    if drawing is not None:
        yield f"![{path.stem}](results/{path.stem}{drawing.suffix})\n"
    yield from _levers(data) if "levers" in data else _cases(data)


def _levers(data: dict[str, Any]) -> Iterator[str]:
    """What `fastseq compare` wrote."""
    yield f"`{data['title'].partition(':')[0]}`:{data['title'].partition(':')[2]}; {data['seconds']:.0f} s in all.\n"
    yield "| a lever more each time | a second | in all | ops a step | peak MB |\n|---|---|---|---|---|"
    for lever in data["levers"]:
        ops = "" if lever["ops"] is None else f"{lever['ops']:,}"
        figures = f"{lever['examples_per_s']:,.0f} | {lever['speedup']:.2f}x | {ops}"
        yield f"| {lever['name']} | {figures} | {_megabytes(lever)} |"


def _cases(data: dict[str, Any]) -> Iterator[str]:
    """What `fastseq bench` wrote: the interval is of 95 %."""
    yield "| case | rival | time | speed-up | interval | |\n|---|---|---|---|---|---|"
    for case in data["cases"]:
        what = f"{case['suite']}, {case['letters']} = {case['shape']}, {case['dtype']}, {case['device']}"
        for rival in case["rivals"]:
            if not rival.get("seconds"):
                continue
            time, ratio = rival["seconds"]["median"], rival.get("speedup")
            speed = f"{ratio['median']:.2f}x | {ratio['low']:.2f} to {ratio['high']:.2f}" if ratio else " | "
            judged = "" if case["judged"] else "not judged: the machine was too busy"
            yield f"| {what} | {rival['name']} | {1e3 * time:.3g} ms | {speed} | {judged} |"


CLAIMS = {
    "tagger": ("0: BiLSTM-CRF tagger", "1.6 batches of 32 a second", ""),
    "classifier": ("1: BERT and DistilBERT on a CPU", "13 s a batch", "25 to 30x"),
    "summarizer": ("2: pointer-generator", "1.25 s a step", "0.28 s, 4.5x"),
    "image": ("3: image classifier", "100 images a second", "350, 3.5x"),
    "regressor": ("4: DeBERTa and numbers to a price", "60 minutes an epoch", "15 to 20 minutes, 3 to 4x"),
}
"""Of each guide: its name, where it starts, and what it hopes for."""


def guides() -> str:
    """What the guides claim, and what `fastseq compare` measured."""
    table = [
        "| guide | starts from | hopes for | measured here: a batch, plain and all levers | |",
        "|---|---|---|---|---|",
    ]
    for recipe, claim in CLAIMS.items():
        data = _compared(recipe)
        cells = "not measured yet | "
        if data:
            plain, *_, last = data["levers"]
            cells = f"{plain['step_ms']:,.0f} ms, {last['step_ms']:,.0f} ms | **{last['speedup']:.2f}x**"
        table.append(f"| {' | '.join(claim)} | {cells} |")
    return "\n".join(table)


def guide(recipe: str) -> str:
    """What `fastseq compare` measured of a recipe: in a sentence, drawn, and as tables."""
    data = _compared(recipe)
    if not data:
        return f"Not measured yet: `fastseq compare {recipe}`."
    return "\n".join(_guide(RESULTS / f"compare-{recipe}.json", data))


def _compared(recipe: str) -> dict[str, Any]:
    """The figures of a comparison; nothing where there are none."""
    path = RESULTS / f"compare-{recipe}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _guide(path: Path, data: dict[str, Any]) -> Iterator[str]:
    plain, *_, last = data["levers"]
    unit, count = data["unit"], data["train_examples"]
    rates = [row["examples_per_s"] for row in (plain, last)]
    batch = data["config"]["train"]["batch_size"]
    yield f"Measured ({data['title'].partition(': ')[2]}, {data['machine']['cpu']}), plain against all levers:\n"
    yield "| | plain | all levers | |\n|---|---|---|---|"
    gain = f"**{last['speedup']:.2f}x**"
    yield f"| {unit} a second | {rates[0]:,.0f} | {rates[1]:,.0f} | {gain} |"
    yield f"| a batch of {batch} | {plain['step_ms']:,.0f} ms | {last['step_ms']:,.0f} ms | |"
    minutes = [count / rate / 60 for rate in rates]
    yield f"| an epoch of {count:,} {unit}, computed | {minutes[0]:.1f} min | {minutes[1]:.1f} min | |"
    yield from (f"| {row[0]} | {row[1]} | {row[2]} | |" for row in _quality(data))
    yield f"\nPlain is {data['plain']}; two runs of it disagree by {100 * data['control_disagreement']:.1f} %.\n"
    if _drawing(path, data) is not None:
        yield f"![{path.stem}](results/{path.stem}.png)\n"
    yield "| a lever more each time | a second | gain | in all | dev loss | peak MB |\n|---|---|---|---|---|---|"
    for row in data["levers"]:
        gains = f"{row['gain']:.2f}x | {row['speedup']:.2f}x | {row['dev_loss']:.3f} | {_megabytes(row)}"
        yield f"| {row['name']} | {row['examples_per_s']:,.0f} | {gains} |"
    head = ("each alone, on top of what was kept", "a second", "gain", "dev loss", "peak MB", "changes")
    yield f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|"
    for row in data["alone"]:
        apart = row.get("control_disagreement")
        gain = f"{row['gain']:.2f}x" if apart is None else f"{100 * apart:.1f} % apart"
        cells = f"{gain} | {row['dev_loss']:.3f} | {_megabytes(row)} | {row['changes']}"
        yield f"| {row['name']} | {row['examples_per_s']:,.0f} | {cells} |"
    yield ""
    yield from (f"- {around_in_words(row)}" for row in data["around"])
    yield from (f"- Not tried: {item['name']}: {item['why']}." for item in data["not_tried"])


def _quality(data: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The scores of both versions after the same training examples."""
    if "quality" not in data:
        return
    plain, fast = data["quality"]
    for part in ("dev", "test"):
        if part in plain:
            scores = [f"{row[part][data['score']]:.2f}" for row in (plain, fast)]
            yield f"{part} {data['score']} after the same {plain['examples']:,} {data['unit']}", *scores


def _megabytes(row: dict[str, Any]) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"


def _drawing(path: Path, data: dict[str, Any]) -> Path | None:
    """The drawing beside a file of results, or else one that is made now; None where there is nothing to draw."""
    for suffix in (".png", ".svg"):
        if path.with_suffix(suffix).exists():
            return path.with_suffix(suffix)
    if "levers" in data:
        return None
    from fastseq_benchmarks import plot
    from fastseq_benchmarks.results import load

    drawing = Path(tempfile.gettempdir()) / f"fastseq-{path.stem}.svg"
    try:
        plot.draw(load(path), drawing)
    except ValueError:  # no rival has a speed-up
        return None
    return drawing


GENERATED = {"support": support, "results": results, "guides": guides}
GENERATED |= {f"guide_{recipe}": partial(guide, recipe) for recipe in RECIPES}
