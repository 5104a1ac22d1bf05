"""One side of a comparison of two revisions: a process that runs cases as it is told, a round at a time.

It reads a line of JSON for each request, and answers with one: `["begin", i]` checks case i and gives the names that a
round samples, `["round"]` their seconds, `["finish"]` the case's result. `revision` is the other end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from fastseq_benchmarks import cli
from fastseq_benchmarks.runner import Run

__all__ = ["main"]


class _Worker:
    def __init__(self, argv: list[str]) -> None:
        self.plan = cli.plan(argv)
        self.run: Run | None = None
        self.samples: dict[str, list[float]] = {}

    def begin(self, number: int) -> list[str]:
        self.run = None  # the case before has memory
        self.run = Run(self.plan.cases[number], self.plan.effort, self.plan.seed)
        self.samples = {name: [] for name in self.run.tracks}
        return list(self.samples)

    def round(self) -> dict[str, float]:
        assert self.run is not None
        once = {name: sample() for name, sample in self.run.tracks.items()}
        for name, seconds in once.items():
            self.samples[name].append(seconds)
        return once

    def finish(self) -> dict[str, Any]:
        assert self.run is not None
        return dataclasses.asdict(self.run.finish(self.samples))


def main(argv: list[str]) -> None:
    """Serve requests until there are no more; `argv` is that of `fastseq bench`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anybody prints is no answer
    worker = _Worker(argv)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
