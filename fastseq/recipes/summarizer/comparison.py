"""``fastseq compare summarizer``: the published step loop against fastseq's decoder, loss and beam search."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from fastseq.models.summarizer import PointerGeneratorSummarizer
from fastseq.recipes import checkpoint
from fastseq.recipes.compare import Variant, disagreement, levers, levers_table, take_turns, training_order
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.summarizer.data import Example
from fastseq.recipes.summarizer.phases import PHASES, Clock
from fastseq.recipes.summarizer.plain import PlainSummarizer
from fastseq.recipes.summarizer.recipe import Config, Evaluate, build
from fastseq.recipes.task import Batch, Task
from fastseq.recipes.train import wants_bf16

PLAIN_SECONDS = 25.0
"""What each of the two plain runs may train: the loop is what this command's time goes into."""

TRAIN_SECONDS = 40.0
"""How long fastseq trains for the weights of the beam search, where the run directory has none."""

DECODE_SECONDS = 40.0
"""How long the published search may decode."""

TEXTS = 100
"""Texts to decode, if time allows."""

BREAKDOWN_STEPS = 8

JOINED = {"attention": "decoder", "pointer": "loss"}
"""Phases that are part of one op with another, and cannot be timed alone."""


class Comparison:
    """The variants of one task, and what is measured of them.

    Args:
        config: of the recipe.
        task: its data, and the first weights of every variant.
        examples: the most that a variant is trained on.
    """

    def __init__(self, config: Config, task: Task, examples: int) -> None:
        self.config, self.task = config, task
        gpu = config.train.device == "auto" and torch.cuda.is_available()
        self.first = cast(PointerGeneratorSummarizer, task.model).to("cuda" if gpu else "cpu")
        self.size = config.train.batch_size
        self.most = max(1, examples // self.size)
        self.order = training_order(max(examples, 4 * self.size), len(task.train), config.seed)
        self.device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
        self.bf16 = wants_bf16(config.train)

    def plain(self, name: str) -> Variant:
        """The published code."""
        return self._variant(name, PlainSummarizer(self.first), buckets=False, fused=False)

    def fast(self, name: str, *, buckets: bool = False, bf16: bool = False, fused: bool = False) -> Variant:
        """Fastseq's model."""
        return self._variant(name, copy.deepcopy(self.first), buckets=buckets, fused=fused, bf16=bf16)

    def _variant(self, name: str, model: Any, *, buckets: bool, fused: bool, bf16: bool = False) -> Variant:
        # A comparison is short: no warmup, which would be all of it.
        train = self.config.train.model_copy(update={"buckets": buckets, "fused": fused, "warmup_steps": 0})
        torch.manual_seed(self.config.seed)
        return Variant(name, model.train(), train, self.most, bf16)

    def levers(self) -> list[dict[str, Any]]:
        """Switches the levers on one at a time and times them in turns; the plain version runs twice."""
        buckets = self.config.train.buckets and self.size > 1
        variants = [
            self.plain("published loop"),
            self.plain("the same again (control)"),
            self.fast("+ fused decoder and loss"),
            *([self.fast("+ length buckets", buckets=True)] if buckets else []),
            self.fast("+ bf16", buckets=buckets, bf16=True),
            self.fast("+ fused optimizer", buckets=buckets, bf16=True, fused=True),
        ]
        pool = self._steps(variants[0], PLAIN_SECONDS) * self.size
        order = self.order[: self.size + pool]
        take_turns(variants, self.task, order, pool, warm=self.size)
        before = [0, 0, 0, *range(2, len(variants) - 1)]
        return levers(variants, before, self.task, order[: self.size])

    def _steps(self, variant: Variant, budget: float) -> int:
        """How many steps of a variant fit into so many seconds; at least 2."""
        batches = list(variant.batches(self.task, self.order[: 2 * self.size], 0))
        variant.step(batches[0])
        start = time.perf_counter()
        variant.step(batches[-1])
        taken = time.perf_counter() - start
        return max(2, min(int(budget / taken), self.most))

    def breakdown(self, bf16: bool, fused: bool) -> dict[str, Any]:
        """The milliseconds of a step by phase, of both versions on the same batches, in turns.

        Returns:
            "steps", and for "plain" and "fastseq" the phases; None where a phase is part of an op with another.
        """
        clocks = [Clock(next(self.first.parameters()).device) for _ in range(2)]
        variants = [self.plain("plain"), self.fast("fastseq", bf16=bf16, fused=fused)]
        cast(PlainSummarizer, variants[0].model).clock = clocks[0]
        model = cast(PointerGeneratorSummarizer, variants[1].model)
        parts = {"embedding": "embedding", "encoder": "encoder", "reduce_hidden": "encoder", "reduce_cell": "encoder"}
        for name, phase in {**parts, "decoder": "decoder"}.items():
            clocks[1].watch(getattr(model, name), phase)
        count = min(BREAKDOWN_STEPS, self._steps(variants[0], PLAIN_SECONDS / 2))
        self._steps(variants[1], 0)
        for clock in clocks:
            clock.reset()
        for i in range(count):
            at = i * self.size % (len(self.order) - self.size + 1)
            for variant, clock in zip(variants, clocks, strict=True):
                _timed_step(variant, clock, self.task, self.order[at : at + self.size])
        plain, fast = ({name: 1e3 * clock.seconds[name] / count for name in PHASES} for clock in clocks)
        joined: dict[str, float | None] = {**fast, **dict.fromkeys(JOINED)}
        return {"steps": count, "plain": plain, "fastseq": joined}

    def beam(self, bf16: bool, fused: bool) -> dict[str, Any]:
        """Decodes test texts with the published search and with fastseq's, with the same weights."""
        model, weights = self._trained(bf16, fused)
        plain = PlainSummarizer(model).eval()
        evaluate = cast(Evaluate, self.task.evaluate_test)
        settings: dict[str, Any] = evaluate.settings
        usual = {name: settings[name] for name in ("beam_size", "max_steps", "min_steps")}
        examples = cast(Sequence[Example], self.task.test[:TEXTS])
        single = [self._sources([example]) for example in examples]
        plain.summarize(*single[0], **usual)
        outputs, start = list[list[int]](), time.perf_counter()
        for source in single:
            outputs += plain.summarize(*source, **usual)
            if time.perf_counter() - start > DECODE_SECONDS:
                break
        taken = time.perf_counter() - start
        examples = examples[: len(outputs)]
        rows = [{"name": "published, one text at a time", "seconds": taken, **evaluate.scores(examples, outputs)}]
        for name, half in (("fastseq, all together", False), *([("the same in bf16", True)] if self.bf16 else [])):
            found, seconds = self._decoded(model, examples, half, settings)
            rows.append({"name": name, "seconds": seconds, **evaluate.scores(examples, found)})
        return {"texts": len(examples), "weights": weights, **usual, "rows": rows}

    def _decoded(
        self, model: PointerGeneratorSummarizer, examples: Sequence[Example], bf16: bool, settings: dict[str, Any]
    ) -> tuple[list[list[int]], float]:
        """The summaries, and the seconds that they take once all is warm: the median of three times."""
        size = self.config.train.eval_batch_size
        batches = [self._sources(examples[i : i + size]) for i in range(0, len(examples), size)]
        times = []
        for _ in range(4):
            start = time.perf_counter()
            with self._autocast(bf16):
                found = [ids for batch in batches for ids in model.summarize(*batch, **settings).ids]
            times.append(time.perf_counter() - start)
        return found, sorted(times[1:])[1]

    def _sources(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, device = self.task.collate(list(examples)), self.first.embedding.weight.device
        source_ids, source_extended, source_lengths = (
            batch[name].to(device) for name in ("source_ids", "source_extended", "source_lengths")
        )
        return source_ids, source_extended, source_lengths

    def _autocast(self, bf16: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.first.embedding.weight.device.type, torch.bfloat16, enabled=bf16)

    def _trained(self, bf16: bool, fused: bool) -> tuple[PointerGeneratorSummarizer, str]:
        """A model whose summaries end where they should, and what its weights are."""
        file = self.config.run_dir / "best.pt"
        if file.exists():
            state = checkpoint.load(file)
            same = state["artefacts"] == self.task.artefacts
            if same and state["config"]["model"] == self.config.model.model_dump(mode="json"):
                model = copy.deepcopy(self.first)
                model.load_state_dict(state["model"])
                return model.eval(), f"of {file}"
        variant = self.fast("trained", buckets=self.config.train.buckets, bf16=bf16, fused=fused)
        start = time.perf_counter()
        for batch in self._training(variant):
            variant.timed_steps([batch])
            if time.perf_counter() - start > TRAIN_SECONDS:
                break
        model = cast(PointerGeneratorSummarizer, variant.model)
        return model.eval(), f"after {variant.steps} steps of training, {time.perf_counter() - start:.0f} s"

    def _training(self, variant: Variant) -> Iterator[Batch]:
        """The batches of a variant's training, as far as it may go."""
        pool = 30 * self.size
        for at in range(0, self.most * self.size, pool):
            yield from variant.batches(self.task, self.order[at : at + pool], at)


def _timed_step(variant: Variant, clock: Clock, task: Task, indices: Sequence[int]) -> None:
    """One step with the clock told of what the model does not tell it itself."""
    clock.switch("data loading")
    batch: Batch = task.collate([task.train[i] for i in indices])
    clock.switch("loss")
    loss = variant.loss(batch)
    clock.switch("backward")
    loss.backward()
    clock.switch("optimizer")
    variant.update()
    clock.switch(None)


def compare(config: Config, examples: int) -> dict[str, Any]:
    """Measures a step's phases, the levers and the beam search; prints and returns the figures.

    Args:
        config: of the recipe; its model and training settings hold for both versions.
        examples: the most that a version is trained on; the time of the published loop is limited too.

    Raises:
        ConfigError: the model does not copy, so that there is no published loop for it.
    """
    if not config.model.copying:
        raise ConfigError("model.copying: the comparison is of models that copy, got false")
    start = time.perf_counter()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    console = Console()
    console.print("reading the data ...")
    run = Comparison(config, build(config), examples)
    console.print("timing each lever, in turns on the same examples ...")
    rows = run.levers()
    # The fastseq version keeps the levers that paid on this machine.
    bf16, fused = rows[-2]["gain"] > 1 and run.bf16, rows[-1]["gain"] > 1
    console.print("timing the parts of a step ...")
    breakdown = run.breakdown(bf16, fused)
    console.print("decoding ...")
    figures = {
        "title": f"fastseq compare summarizer: {config.data.name}, {run.device}",
        "levers": rows,
        "control_disagreement": abs(rows[1]["examples_per_s"] / rows[0]["examples_per_s"] - 1),
        "breakdown": breakdown,
        "beam": run.beam(bf16, fused),
        "kept": {"bf16": bf16, "fused_optimizer": fused},
        "seconds": time.perf_counter() - start,
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "config": config.model_dump(mode="json"),
    }
    show(figures, console)
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints the figures as tables."""
    console.print(_breakdown_table(figures["title"], figures["breakdown"]))
    console.print(
        "In the loop, pointer is the gate, the vocabulary layer, its softmax and the mixture. In fastseq all steps of "
        "the decoder, attention and gate included, are one part, and the vocabulary layer, the mixture and the loss "
        "another, which takes their gradients with it.\n"
    )
    console.print(levers_table("a training step", figures["levers"], "texts/s"))
    kept = [name.replace("_", " ") for name, on in figures["kept"].items() if on]
    console.print(
        "Plain is the published loop, random batches padded to the longest, fp32 and torch's AdamW; levers add up.\n"
        f"{disagreement(figures)}\n"
        f"Kept in the other tables, since they paid here: {', '.join(kept) or 'none of bf16 and fused optimizer'}.\n"
    )
    console.print(_beam_table(figures["beam"]))
    console.print(f"The weights: {figures['beam']['weights']}. All of this took {figures['seconds']:.0f} s.")


def _breakdown_table(title: str, breakdown: dict[str, Any]) -> Table:
    table = Table(title=title)
    table.add_column(f"mean of {breakdown['steps']} steps", no_wrap=True)
    for name in ("published loop ms", "share", "fastseq ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    plain, fast = breakdown["plain"], breakdown["fastseq"]
    sums = [sum(value for value in part.values() if value is not None) for part in (plain, fast)]
    for name in PHASES:
        cells = [f"{plain[name]:.1f}", f"{100 * plain[name] / sums[0]:.1f} %"]
        joined = fast[name] is None
        ours = [f"with {JOINED[name]}", ""] if joined else [f"{fast[name]:.1f}", f"{100 * fast[name] / sums[1]:.1f} %"]
        table.add_row(name, *cells, *ours)
    table.add_section()
    table.add_row("a step", f"{sums[0]:.1f}", "", f"{sums[1]:.1f}", f"{sums[0] / sums[1]:.1f}x")
    return table


def _beam_table(beam: dict[str, Any]) -> Table:
    table = Table(
        title=f"beam search: {beam['texts']} texts, beam {beam['beam_size']}, up to {beam['max_steps']} words"
    )
    for i, name in enumerate(("", "s", "in all", "ROUGE-1", "ROUGE-2", "ROUGE-L")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for i, row in enumerate(beam["rows"]):
        gain = f"{beam['rows'][0]['seconds'] / row['seconds']:.1f}x" if i else ""
        scores = (f"{row[kind]:.1f}" for kind in ("rouge1", "rouge2", "rougeL"))
        table.add_row(row["name"], f"{row['seconds']:.2f}", gain, *scores)
    return table
