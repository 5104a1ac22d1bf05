"""The parts of a comparison: the waterfall of levers, each other lever alone, the costs around a step, the quality."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console

from fastseq import host
from fastseq.recipes.compare import around
from fastseq.recipes.compare.around import beside
from fastseq.recipes.compare.cost import cost
from fastseq.recipes.compare.levers import Lever, Setup
from fastseq.recipes.compare.variant import Variant, take_turns
from fastseq.recipes.config import ConfigT, RecipeConfig
from fastseq.recipes.fetch import SOURCES, fetch
from fastseq.recipes.loading import evaluation_batches, evaluation_sample
from fastseq.recipes.task import Task

PLAIN_SECONDS = 12.0
"""What each of the two plain runs may train in the waterfall; the variants with levers take less."""

LEAST_STEPS = 8
"""What they train where that takes longer: of fewer, noise cannot be told from gain."""

LEAST_LOADED_STEPS = 24
"""The same where a loader is tried, whose gains are small."""

ALONE_SECONDS = 24.0
"""What all variants together may train where each other lever is tried alone."""

QUALITY_SECONDS = 35.0
"""What the plain version may train for the comparison of the scores."""

SCORED = 256
"""Examples of dev that every variant's loss is taken of."""

GROUP = 4
"""Levers alone that are measured together: more models would not fit into every memory."""


class Comparison:
    """One run of ``fastseq compare``, which fills `figures` part by part.

    Args:
        recipe: its name.
        config: of the recipe.
        build: makes the task.
        examples: the most that a variant is trained on.
        unit: what the examples are, in the plural.
        plain: what the plain version is, in words.

    Attributes:
        task: the data, and the first weights of every variant.
        figures: what has been measured.
        not_tried: the levers that cannot be tried here, and why.
    """

    def __init__(
        self,
        recipe: str,
        config: ConfigT,
        build: Callable[[ConfigT], Task],
        examples: int,
        *,
        unit: str,
        plain: str,
    ) -> None:
        self.begun, self.config, self.console = time.perf_counter(), cast(RecipeConfig, config), Console()
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.around: list[dict[str, Any]] = []
        self.task = self._read(config, build)
        gpu = config.train.device == "auto" and torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu else "cpu")
        self.task.model.to(self.device)
        self.size = config.train.batch_size
        self.most = max(2, min(examples, config.train.epochs * len(self.task.train)) // self.size)
        threads = torch.get_num_threads()
        where = torch.cuda.get_device_name() if gpu else f"{threads} CPU thread{'s' * (threads > 1)}"
        self.not_tried: list[dict[str, str]] = []
        self.figures: dict[str, Any] = {
            "title": f"fastseq compare {recipe}: {cast(Any, config).data.name}, {where}",
            "unit": unit,
            "plain": plain,
            "score": self.task.score,
            "train_examples": len(self.task.train),
        }

    def _read(self, config: ConfigT, build: Callable[[ConfigT], Task]) -> Task:
        """The task; where its features can be cached, the second start is timed beside the first."""
        self.say("reading the data ...")
        data = cast(Any, config).data
        torch.manual_seed(config.seed)
        if "cache" not in type(data).model_fields:
            return build(config)
        if data.name in SOURCES:
            fetch(data.name)  # which is no part of a start
        # Kept open: a task may read its arrays where they lie.
        self.folder = tempfile.TemporaryDirectory()
        cached = config.model_copy(update={"data": data.model_copy(update={"cache": Path(self.folder.name)})})
        starts = []
        for _ in range(2):
            torch.manual_seed(config.seed)
            start = time.perf_counter()
            task = build(cached)
            starts.append(time.perf_counter() - start)
            if not any(Path(self.folder.name).iterdir()):  # these data have nothing that is kept
                return task
        self.around.append(beside("cached features", ("the first start", starts[0]), ("later starts", starts[1])))
        return task

    def say(self, line: str) -> None:
        """What is being done."""
        self.console.print(line)

    def variant(self, name: str, setup: Setup, examples: int) -> Variant:
        """A variant that will train on so many examples."""
        return Variant(name, setup, self.task, examples, self.config.seed)

    def order(self, count: int) -> list[int]:
        """The first `count` training examples of a run, epoch after epoch."""
        generator, examples = np.random.default_rng(self.config.seed), len(self.task.train)
        order = np.concatenate([generator.permutation(examples) for _ in range(-(-count // examples))])
        return cast(list[int], order[:count].tolist())

    def steps(self, setup: Setup, budget: float, least: int = 2) -> int:
        """How many batches a setup trains in so many seconds."""
        probe = self.variant("", setup, 4 * self.size)
        plan = probe.plan(self.order(4 * self.size), 0)
        probe.warm_up(plan[:1])
        probe.timed(plan[1:])
        taken = probe.step_ms / 1e3 * setup.train.batch_size / self.size
        return min(self.most, max(least, int(budget / taken)))

    def waterfall(self, plain: Setup, levers: Sequence[Lever]) -> Setup:
        """Switches one lever on after the other; the variants take turns, and the plain one runs twice.

        Returns:
            The setup with the levers that paid.
        """
        self.say("timing each lever, one on top of the other, in turns on the same examples ...")
        tried = self._tried(levers)
        count = self.steps(plain, PLAIN_SECONDS, LEAST_STEPS) * self.size
        variants = [self.variant(name, plain, count) for name in ("plain", "plain again (control)")]
        setup = plain
        for lever in tried:
            setup = lever.switch(setup)
            variants.append(self.variant(f"+ {lever.name}", setup, count))
        rows = self._measured(variants, count)
        for i, row in enumerate(rows):
            row["speedup"] = row["examples_per_s"] / rows[0]["examples_per_s"]
            row["gain"] = row["examples_per_s"] / rows[0 if i <= 2 else i - 1]["examples_per_s"]
            row["changes"] = tried[i - 2].changes if i > 1 else ""
        kept = {lever.name: row["gain"] > 1 for lever, row in zip(tried, rows[2:], strict=True) if not lever.base}
        self.figures |= {"levers": rows, "control_disagreement": abs(rows[1]["speedup"] - 1), "kept": kept}
        for lever in tried:
            plain = lever.switch(plain) if kept.get(lever.name, True) else plain
        return plain

    def alone(self, kept: Setup, levers: Sequence[Lever], loading: Sequence[Lever]) -> None:
        """Switches each lever on alone, on top of what the waterfall kept; that runs twice in each group.

        Args:
            kept: the setup of the others' first.
            levers: timed with batches that are made beforehand, unless `kept` has them loaded.
            loading: timed with batches that the loop's loader makes.
        """
        self.say("timing each other lever alone ...")
        groups = [(kept, group) for group in _groups(self._tried(levers))]
        with_loader = replace(kept, loading=True).but(workers=0)
        groups += [(with_loader, group) for group in _groups(self._tried(loading))]
        runs = sum(len(group) + 2 for _, group in groups)
        rows = []
        for setup, group in groups:
            least = LEAST_LOADED_STEPS if setup.loading else LEAST_STEPS
            count = self.steps(setup, ALONE_SECONDS / runs, least) * self.size
            rows += self._group(setup, group, count)
        self.figures["alone"] = rows

    def _group(self, kept: Setup, levers: Sequence[Lever], count: int) -> list[dict[str, Any]]:
        """A group of levers, each alone; the first row is the two controls."""
        names = "kept, with a loader" if kept.loading else "kept, twice", ""
        variants = [self.variant(name, kept, count) for name in names]
        fitting = []
        for lever in levers:
            variant = self.variant(lever.name, lever.switch(kept), count)
            if self._fits(variant):
                fitting.append(lever)
                variants.append(variant)
        one, other, *rest = self._measured(variants, count)
        rate = 2 / (1 / one["examples_per_s"] + 1 / other["examples_per_s"])
        disagreement = abs(other["examples_per_s"] / one["examples_per_s"] - 1)
        for row, lever in zip(rest, fitting, strict=True):
            row |= {"gain": row["examples_per_s"] / rate, "changes": lever.changes}
        return [one | {"examples_per_s": rate, "gain": 1.0, "changes": "", "control_disagreement": disagreement}, *rest]

    def _fits(self, variant: Variant) -> bool:
        """Whether there is memory for a batch beside the other models; notes where there is not."""
        try:
            variant.warm_up(variant.plan(self.order(4 * self.size), 0)[:1])
        except torch.OutOfMemoryError:
            self.not_tried.append({"name": variant.name, "why": "out of memory"})
            return False
        return True

    def _tried(self, levers: Iterable[Lever]) -> list[Lever]:
        """Those that can be tried; notes why the others cannot."""
        levers = list(levers)
        self.not_tried += [{"name": lever.name, "why": lever.why_not} for lever in levers if lever.why_not]
        return [lever for lever in levers if not lever.why_not]

    def _measured(self, variants: Sequence[Variant], count: int) -> list[dict[str, Any]]:
        """Trains all variants in turns on the same examples, and says what each came to."""
        order, warm = self.order(count + 2 * self.size), 2 * self.size
        take_turns(variants, order, warm, self.console)
        return [
            {
                "name": variant.name,
                "examples_per_s": variant.rate,
                "step_ms": variant.step_ms,
                **cost(variant, variant.plan(order[: 4 * self.size], 0)),
                "steps": variant.steps,
                "dev_loss": self.dev_loss(variant),
            }
            for variant in variants
        ]

    def dev(self, most: int | None) -> Sequence[Any]:
        """The same examples of dev for everybody; None is all of them."""
        if most is None:
            return self.task.dev
        some = self.config.train.model_copy(update={"max_eval_batches": 1, "eval_batch_size": most})
        return evaluation_sample(self.task.dev, some, self.config.seed)

    def dev_loss(self, variant: Variant) -> float:
        """The mean loss of the same batches of dev: after a training of seconds, it tells more than a score."""
        task = replace(self.task, collate_evaluation=None)
        with evaluating(variant):
            batches = evaluation_batches(task, self.dev(SCORED), variant.device, self.config.train.eval_batch_size)
            return statistics.fmean(variant.model(**batch).item() for batch in batches)

    def scores(self, variant: Variant, examples: Sequence[Any], size: int | None = None) -> dict[str, float]:
        """The metrics of a variant's present weights; `size` is of the batches, the configuration's where None."""
        with evaluating(variant):
            size = size or self.config.train.eval_batch_size
            return self.task.evaluate(variant.model, evaluation_batches(self.task, examples, variant.device, size))

    def quality(
        self, plain: Setup, kept: Setup, budget: float = QUALITY_SECONDS, most: int | None = 512, test: bool = False
    ) -> Variant:
        """Trains both versions on the same examples, in turns, and scores them.

        Args:
            plain: the first version.
            kept: the second.
            budget: seconds that the plain version may train.
            most: examples of dev that they are scored on; None is all.
            test: score them on the test examples too.

        Returns:
            The second version, trained.
        """
        count = self.steps(plain, budget) * self.size
        self.say(f"training both versions on {count} {self.figures['unit']} ...")
        variants = [self.variant("plain", plain, count), self.variant("fastseq", kept, count)]
        take_turns(variants, self.order(count), 0, self.console)
        rows = []
        for variant in variants:
            row: dict[str, Any] = {"name": variant.name, "examples": variant.examples}
            row |= {"seconds": sum(variant.seconds), "examples_per_s": variant.rate, "step_ms": variant.step_ms}
            for part in ("dev", "test") if test else ("dev",):
                start = time.perf_counter()
                row[part] = self.scores(variant, self.dev(most) if part == "dev" else self.task.test)
                row[f"{part}_seconds"] = time.perf_counter() - start
            rows.append(row)
        self.figures["quality"] = rows
        return variants[1]

    def evaluation(self, trained: Variant) -> None:
        """Times the evaluation on dev and the loader's start, and computes what they make of an epoch."""
        self.say("timing the evaluation and the loader's start ...")
        self.around += [*around.evaluation(self, trained), around.loader_start(self, trained)]

    def finish(self) -> dict[str, Any]:
        """The figures, with what all recipes' have."""
        return self.figures | {
            "not_tried": self.not_tried,
            "around": self.around,
            "seconds": time.perf_counter() - self.begun,
            "machine": {"cpu": host.cpu_features()["model"] or platform.machine(), "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
        }


@contextmanager
def evaluating(variant: Variant) -> Iterator[None]:
    """A variant's model as evaluation wants it; afterwards it trains again."""
    variant.model.eval()
    with torch.inference_mode(), torch.autocast(variant.device.type, torch.bfloat16, enabled=variant.bf16):
        yield
    variant.model.train()


def _groups(levers: Sequence[Lever]) -> list[Sequence[Lever]]:
    return [levers[i : i + GROUP] for i in range(0, len(levers), GROUP)]
