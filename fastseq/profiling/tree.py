"""From the time of each place to the rows of a table: the module tree, as deep as the time in it is worth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from fastseq.profiling.marks import Path
from fastseq.profiling.record import Costs
from fastseq.profiling.timeline import STEP, Key, Reading

WORTH_SPLITTING = 0.15
"""The share of a step from which on a part is shown in its own parts."""

WORTH_A_ROW = 0.005
ENOUGH_ROWS = 14

LEAST = 0.1
"""What a place keeps of its time at least, however many marks there are in it."""


@dataclass
class Phase:
    """A row of the table; times are milliseconds a step.

    Attributes:
        name: the module's name in its root, with * for layers of one class, or what the step does there.
        ms: of the host: operators, and the Python around them.
        share: of the step.
        forward_ms, backward_ms: what `ms` is made of, for a module.
        python_ms: the part of `ms` outside operators.
        calls: operators called a step.
        kept_bytes: that its forward pass keeps for the backward pass.
        gpu_ms: of kernels and copies on a GPU.
        launches: of those, a step.
    """

    name: str
    ms: float = 0.0
    share: float = 0.0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    python_ms: float = 0.0
    calls: float = 0.0
    kept_bytes: int = 0
    gpu_ms: float = 0.0
    launches: float = 0.0

    def add(self, other: Phase) -> None:
        """Takes another row in."""
        for name, value in vars(other).items():
            if name != "name":
                setattr(self, name, getattr(self, name) + value)


@dataclass
class Node:
    """A module, or several of one class that stand in a list; `own` is what it does outside its parts.

    Attributes:
        path: its place, with * in it.
        own: its own code.
        parts: its submodules.
        mostly: microseconds of the operators of its own code.
        first: when it first ran.
    """

    path: Path
    own: Phase
    parts: dict[str, Node] = field(default_factory=dict)
    mostly: Counter[str] = field(default_factory=Counter)
    first: float = float("inf")

    @property
    def is_root(self) -> bool:
        """Whether it is a whole model, of which the parts are wanted anyway."""
        return len(self.path) == 1

    @property
    def whole(self) -> Phase:
        """All of it as one row."""
        row = Phase(self.own.name)
        for node in (self, *self.parts.values()):
            row.add(self.own if node is self else node.whole)
        return row

    @property
    def began(self) -> float:
        """When it or a part of it first ran."""
        return min([self.first, *(part.began for part in self.parts.values())])


def build(
    reading: Reading,
    kept: Mapping[Path, int],
    modules: Mapping[Path, nn.Module],
    step_ms: float,
    costs: Costs,
) -> Node:
    """The tree of all places, with times as they are without the recording.

    What recording has cost is taken off by the number of events, not by the time, so that a part of many small
    operators is not shown as larger than it is.

    Args:
        reading: of the trace.
        kept: bytes that each place keeps.
        modules: of each path.
        step_ms: of a step that is not recorded.
        costs: of the recording.
    """
    true = _without_recording(reading, 1e3 * step_ms * reading.steps, costs)
    root = Node(STEP, Phase("the step's own code"))
    names = _Names(modules)
    for key, total in reading.totals.items():
        node = _node(root, key.place, names)
        ms = true[key] / 1e3 / reading.steps
        node.own.add(
            Phase(
                "",
                ms=ms,
                share=ms / step_ms,
                forward_ms=0.0 if key.backward else ms,
                backward_ms=ms if key.backward else 0.0,
                python_ms=ms if key.python else 0.0,
                calls=total.calls / reading.steps,
                gpu_ms=total.gpu_us / 1e3 / reading.steps,
                launches=total.launches / reading.steps,
            )
        )
        node.first = min(node.first, reading.first.get(key.place, float("inf")))
    for place, size in kept.items():
        _node(root, place, names).own.kept_bytes += size
    for place, times in reading.op_us.items():
        _node(root, place, names).mostly.update(times)
    return root


def _without_recording(reading: Reading, wanted_us: float, costs: Costs) -> dict[Key, float]:
    """The microseconds of each key, that add up to what the steps take when nothing is recorded."""
    times = {
        key: max(LEAST * total.us, total.us - total.marks * costs.mark_us - total.events * costs.event_us)
        for key, total in reading.totals.items()
    }
    scale = wanted_us / max(sum(times.values()), 1e-9)
    return {key: scale * value for key, value in times.items()}


class _Names:
    """What nodes are called.

    Args:
        modules: of each path.
    """

    def __init__(self, modules: Mapping[Path, nn.Module]) -> None:
        self.modules = modules
        classes: dict[Path, set[type]] = {}
        for path, module in modules.items():
            if path[-1].isdigit():
                classes.setdefault(path[:-1], set()).add(type(module))
        self.alike = {path for path, found in classes.items() if len(found) == 1}

    def part(self, path: Path) -> str:
        """The last part of a path: * for the layers of a list that have one class, which are shown as one."""
        return "*" if path[-1].isdigit() and path[:-1] in self.alike else path[-1]

    def shown(self, path: Path, parts: Path) -> str:
        """The name in the table of what is at `path`, and is reached by `parts`."""
        name = ".".join(parts[1:]) or parts[0]
        return f"{name} ({type(self.modules[path]).__name__})" if path in self.modules and parts[1:] else name


def _node(root: Node, path: Path, names: _Names) -> Node:
    node = root
    for end in range(1, len(path) + 1):
        part = names.part(path[:end])
        if part not in node.parts:
            parts = (*node.path, part)
            node.parts[part] = Node(parts, Phase(names.shown(path[:end], parts)))
        node = node.parts[part]
    return node


def rows(root: Node) -> list[Phase]:
    """The rows to show, in the order in which they first run; they add up to the step.

    A module in a list of layers is called by its name from the list on, where that tells all of them apart.
    """
    own, whole = [root], list(root.parts.values())
    while sum(node.whole.share >= WORTH_A_ROW for node in whole) < ENOUGH_ROWS:
        worth = [node for node in whole if node.parts and (node.is_root or node.whole.share > WORTH_SPLITTING)]
        if not worth:
            break
        largest = max(worth, key=lambda node: (node.is_root, node.whole.ms))
        whole.remove(largest)
        whole += largest.parts.values()
        own.append(largest)
    found = [(node.began, node.whole) for node in whole]
    found += [(node.first, replace(node.own, name=_own_name(node))) for node in own]
    found.sort(key=lambda pair: pair[0])
    shown = [row for _, row in found if row.share >= WORTH_A_ROW]
    short = [re.sub(r"^[\w.]+\.(?=\w+\.\*)", "", row.name) for row in shown]
    if len(set(short)) == len(short):
        shown = [replace(row, name=name) for row, name in zip(shown, short, strict=True)]
    small = Phase("smaller parts")
    for row in (row for _, row in found if row.share < WORTH_A_ROW):
        small.add(row)
    return [*shown, small] if small.ms or small.kept_bytes else shown


def _own_name(node: Node) -> str:
    """What a module does outside its parts, by the operator that takes most of it."""
    most = node.mostly.most_common(1)
    name = node.own.name if node.path == STEP else f"{node.own.name} itself"
    mostly = most[0][0].rpartition("::")[2] if most and node.own.python_ms < node.own.ms / 2 else None
    return f"{name}: {mostly}" if mostly else name
