"""The machine code (SASS) of a CUDA kernel, as nvdisasm prints it: its instructions, and its innermost loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# Wide loads count apart; of the rest the name up to the first dot is enough.
CLASSES = (
    *("FFMA", "FADD", "FMUL", "DFMA", "DADD", "DMUL", "MUFU", "LDS.128", "LDS.64", "LDS", "STS"),
    *("LDG", "STG", "LDL", "STL", "SHFL", "MATCH", "REDUX", "BAR", "WARPSYNC"),
)


class Instruction(NamedTuple):
    """One instruction: its text without the predicate, whether it has one, and the label that it may jump to."""

    text: str
    predicated: bool
    target: str | None

    @property
    def name(self) -> str:
        """LDS.128 of `LDS.128 R4, [R55]`."""
        return self.text.split(maxsplit=1)[0]

    @property
    def kind(self) -> str:
        """The class that it is counted in."""
        wide = re.match(r"LDS\b.*\.(64|128)\b", self.name)
        return f"LDS.{wide[1]}" if wide else self.name.partition(".")[0]


class Kernel:
    """The code of one kernel: `blocks` of instructions without a branch within, and the blocks that may follow each."""

    def __init__(self, section: str) -> None:
        self.blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                self._begin()
                labels[label[1]] = len(self.blocks) - 1
            elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+ +)?(.*?)\s*;", line):
                target = re.search(r"`\((\.L_\w+)\)", code[2]) if re.match(r"BRA|BRX|JMP", code[2]) else None
                self.blocks[-1].append(Instruction(code[2], bool(code[1]), target[1] if target else None))
                if target or self.blocks[-1][-1].name in ("EXIT", "RET", "BRX", "JMP"):
                    self._begin()
        self.after = [self._followers(n, labels) for n in range(len(self.blocks))]

    def _begin(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    def _followers(self, n: int, labels: dict[str, int]) -> list[int]:
        last = self.blocks[n][-1] if self.blocks[n] else None
        found = [n + 1] if n + 1 < len(self.blocks) else []
        if last is None or (not last.target and last.name not in ("EXIT", "RET", "BRX", "JMP")):
            return found
        if last.name == "BRA.DIV":  # what is done in place of the next instruction where the warp has split up
            return found
        # A branch is conditional by its predicate, or by one among its operands: BRA P0, `(.L_1).
        always = not last.predicated and not re.search(r"\bU?P\d\b", last.text)
        jumps = [labels[last.target]] if last.target in labels else []
        return jumps if always else found + jumps

    def counts(self) -> Counter[str]:
        """How many instructions there are of each kind."""
        return self._count(range(len(self.blocks)))

    def innermost_loops(self) -> list[Counter[str]]:
        """The instructions of each loop without another in it, by kind, in the order of the code."""
        loops: dict[int, set[int]] = {}
        order, above = self._dominators()
        before = self._predecessors(order)
        for n in order:
            for head in self.after[n]:
                if _dominates(above, head, n):
                    loops.setdefault(head, {head}).update(_body(before, head, n))
        counts = {head: self._count(body) for head, body in loops.items()}
        # Loops that only wait for lanes of the warp (sm_75) are part of what is around them.
        work = {head for head, count in counts.items() if any(count[kind] for kind in CLASSES)}
        inner = [h for h in work if not any(other != h and other in loops[h] for other in work)]
        return [counts[head] for head in sorted(inner)]

    def _count(self, blocks: Iterable[int]) -> Counter[str]:
        return Counter(instruction.kind for n in blocks for instruction in self.blocks[n])

    def _predecessors(self, order: list[int]) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {n: [] for n in order}
        for n in order:
            for m in self.after[n]:
                before[m].append(n)
        return before

    def _dominators(self) -> tuple[list[int], dict[int, int]]:
        """The reachable blocks in reverse postorder, and the nearest dominator of each (Cooper, Harvey, Kennedy)."""
        order = _reverse_postorder(self.after)
        rank = {n: i for i, n in enumerate(order)}
        before = self._predecessors(order)
        above = {order[0]: order[0]}
        changed = True
        while changed:
            changed = False
            for n in order[1:]:
                known = [m for m in before[n] if m in above]
                nearest = known[0]
                for m in known[1:]:
                    nearest = _meet(above, rank, nearest, m)
                changed |= above.get(n) != nearest
                above[n] = nearest
        return order, above


def _reverse_postorder(after: list[list[int]]) -> list[int]:
    seen, done = {0}, []
    stack = [(0, iter(after[0]))]
    while stack:
        n, rest = stack[-1]
        following = next((m for m in rest if m not in seen), None)
        if following is None:
            done.append(n)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(after[following])))
    return done[::-1]


def _meet(above: dict[int, int], rank: dict[int, int], a: int, b: int) -> int:
    while a != b:
        if rank[a] > rank[b]:
            a = above[a]
        else:
            b = above[b]
    return a


def _dominates(above: dict[int, int], head: int, n: int) -> bool:
    while n != head and above[n] != n:
        n = above[n]
    return n == head


def _body(before: dict[int, list[int]], head: int, tail: int) -> set[int]:
    """The blocks from which `tail` can be reached without passing through `head`."""
    found, todo = {head}, [tail]
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += before[n]
    return found


def kernels(listing: str) -> dict[str, Kernel]:
    """The kernels of nvdisasm's listing, by their mangled names."""
    sections = re.split(r"^\t\.section\t\.text\.", listing, flags=re.MULTILINE)[1:]
    return {section.partition(",")[0]: Kernel(section) for section in sections}


def describe(loop: Counter[str]) -> str:
    """113: 32 FFMA, 38 FADD, ...: the number of instructions, and of those of a class that matters."""
    parts = [f"{loop[kind]} {kind}" for kind in CLASSES if loop[kind]]
    return f"{loop.total()}: {', '.join(parts)}"
