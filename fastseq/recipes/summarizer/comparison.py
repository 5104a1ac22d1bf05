"""``fastseq compare summarizer``: the published step loop against fastseq's decoder, loss and beam search."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from rich.table import Table

from fastseq.models.summarizer import PointerGeneratorSummarizer
from fastseq.recipes import checkpoint
from fastseq.recipes.compare import levers
from fastseq.recipes.compare.comparison import Comparison
from fastseq.recipes.compare.levers import Lever, Setup
from fastseq.recipes.compare.show import show, table
from fastseq.recipes.compare.variant import Variant
from fastseq.recipes.settings import wants_bf16
from fastseq.recipes.summarizer.data import Example
from fastseq.recipes.summarizer.phases import PHASES, Clock
from fastseq.recipes.summarizer.plain import PlainSummarizer, plain
from fastseq.recipes.summarizer.recipe import Config, Evaluate, build, make_model
from fastseq.recipes.task import Batch, Task

TRAIN_SECONDS = 40.0
"""How long fastseq trains for the weights of the beam search, where the run directory has none."""

DECODE_SECONDS = 40.0
"""How long the published search may decode."""

RATED = 20
"""Batches that fastseq's speed is taken of, where it need not train."""

TEXTS = 100
"""Texts to decode, if time allows."""

BREAKDOWN_SECONDS = 12.0
"""What the published loop may take for the breakdown, in at most so many steps."""

BREAKDOWN_STEPS = 8

JOINED = {"attention": "decoder", "pointer": "loss"}
"""Phases that are part of one op with another, and cannot be timed alone."""


def compare(config: Config, examples: int) -> dict[str, Any]:
    """Measures a step's phases, the levers and the beam search; prints and returns the figures.

    Args:
        config: of the recipe; its model and training settings hold for both versions.
        examples: the most that a version is trained on; the time of the published loop is limited too.

    Raises:
        ConfigError: the model does not copy, so that there is no published loop for it.
    """
    words = "the published loop on random batches padded to the longest, fp32 and torch's AdamW"
    run = Comparison("summarizer", config, build, examples, unit="texts", plain=words)
    task, train = run.task, config.train
    ours = cast(PointerGeneratorSummarizer, task.model)
    plain(config, task)  # raises where there is no published loop, before anything is timed
    first = levers.plain_setup(task, train, partial(plain, config, task))
    steps = [
        Lever("fused decoder and loss", lambda setup: replace(setup, model=partial(copy.deepcopy, ours)), base=True),
        levers.buckets(train),
        *levers.numerics(train, run.device),
    ]
    kept = run.waterfall(first, steps)
    run.figures["breakdown"] = breakdown(run, first, kept)
    half = config.model.model_copy(update={"hidden_size": -(-config.model.hidden_size // 2)})
    others = [
        *levers.batch_levers(train),
        *levers.loop_levers(task.model, train, run.device),
        *levers.convolutions(task.model, run.device),
        levers.shorter(_cut, task),
        levers.smaller("half the hidden size", lambda _: make_model(half, ours.vocab_size).to(run.device)),
    ]
    run.alone(kept, others, levers.loader_levers(run.device))
    trained, weights = _trained(run, config, kept)
    run.figures["beam"] = beam(run, cast(PointerGeneratorSummarizer, trained.model), weights)
    run.evaluation(trained)
    figures = run.finish()
    show(figures, run.console)
    run.console.print(_breakdown_table(figures["breakdown"]))
    run.say(
        "In the loop, pointer is the gate, the vocabulary layer, its softmax and the mixture. In fastseq all steps of "
        "the decoder, attention and gate included, are one part, and the vocabulary layer, the mixture and the loss "
        "another, which takes their gradients with it."
    )
    run.console.print(_beam_table(figures["beam"]))
    run.say(f"The weights: {figures['beam']['weights']}.")
    return figures


def _cut(example: Example, length: int) -> Example:
    """An example whose source is read up to a length; words further on can no longer be copied."""
    return replace(example, source=example.source[:length], extended=example.extended[:length])


def breakdown(run: Comparison, first: Setup, kept: Setup) -> dict[str, Any]:
    """The milliseconds of a step by phase, of both versions on the same batches, in turns.

    Returns:
        "steps", and for "plain" and "fastseq" the phases; None where a phase is part of an op with another.
    """
    run.say("timing the parts of a step ...")
    clocks = [Clock(run.device) for _ in range(2)]
    count = min(BREAKDOWN_STEPS, run.steps(first, BREAKDOWN_SECONDS))
    order = run.order((count + 1) * run.size)
    variants = [run.variant("", setup, len(order)) for setup in (first, kept)]
    cast(PlainSummarizer, variants[0].model).clock = clocks[0]
    model = cast(PointerGeneratorSummarizer, variants[1].model)
    parts = {"embedding": "embedding", "encoder": "encoder", "reduce_hidden": "encoder", "reduce_cell": "encoder"}
    for name, phase in {**parts, "decoder": "decoder"}.items():
        clocks[1].watch(getattr(model, name), phase)
    for at in range(0, len(order), run.size):
        for variant, clock in zip(variants, clocks, strict=True):
            if at == run.size:  # the first batch was to warm up
                clock.reset()
            _timed_step(variant, clock, run.task, order[at : at + run.size])
    plain, fast = ({name: 1e3 * clock.seconds[name] / count for name in PHASES} for clock in clocks)
    joined: dict[str, float | None] = {**fast, **dict.fromkeys(JOINED)}
    return {"steps": count, "plain": plain, "fastseq": joined}


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


def _trained(run: Comparison, config: Config, kept: Setup) -> tuple[Variant, str]:
    """A model whose summaries end where they should, and what its weights are."""
    count = run.steps(kept, TRAIN_SECONDS) * run.size
    variant = run.variant("trained", kept, count)
    file = config.run_dir / "best.pt"
    if file.exists():
        state = checkpoint.load(file)
        same = state["artefacts"] == run.task.artefacts
        if same and state["config"]["model"] == config.model.model_dump(mode="json"):
            variant.timed(variant.plan(run.order(count), 0)[:RATED])  # before, since it trains
            variant.model.load_state_dict(state["model"])
            return variant, f"of {file}"
    run.say("training ...")
    variant.timed(variant.plan(run.order(count), 0))
    return variant, f"after {variant.steps} steps of training, {sum(variant.seconds):.0f} s"


def beam(run: Comparison, model: PointerGeneratorSummarizer, weights: str) -> dict[str, Any]:
    """Decodes test texts with the published search and with fastseq's, with the same weights."""
    run.say("decoding ...")
    model.eval()
    published = PlainSummarizer(model).eval()
    evaluate = cast(Evaluate, run.task.evaluate_test)
    settings: dict[str, Any] = evaluate.settings
    usual = {name: settings[name] for name in ("beam_size", "max_steps", "min_steps")}
    examples = cast(Sequence[Example], run.task.test[:TEXTS])
    single = [_sources(run, [example]) for example in examples]
    published.summarize(*single[0], **usual)
    outputs, start = list[list[int]](), time.perf_counter()
    for source in single:
        outputs += published.summarize(*source, **usual)
        if time.perf_counter() - start > DECODE_SECONDS:
            break
    taken = time.perf_counter() - start
    examples = examples[: len(outputs)]
    rows = [{"name": "published, one text at a time", "seconds": taken, **evaluate.scores(examples, outputs)}]
    halves = [("fastseq, all together", False), ("the same in bf16", True)]
    for name, half in halves[: 1 + wants_bf16(run.config.train)]:
        found, seconds = _decoded(run, model, examples, half, settings)
        rows.append({"name": name, "seconds": seconds, **evaluate.scores(examples, found)})
    return {"texts": len(examples), "weights": weights, **usual, "rows": rows}


def _decoded(
    run: Comparison,
    model: PointerGeneratorSummarizer,
    examples: Sequence[Example],
    bf16: bool,
    settings: dict[str, Any],
) -> tuple[list[list[int]], float]:
    """The summaries, and the seconds that they take once all is warm: the median of three times."""
    size = run.config.train.eval_batch_size
    batches = [_sources(run, examples[i : i + size]) for i in range(0, len(examples), size)]
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            found = [ids for batch in batches for ids in model.summarize(*batch, **settings).ids]
        times.append(time.perf_counter() - start)
    return found, sorted(times[1:])[1]


def _sources(run: Comparison, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = run.task.collate(list(examples))
    source_ids, source_extended, source_lengths = (
        batch[name].to(run.device) for name in ("source_ids", "source_extended", "source_lengths")
    )
    return source_ids, source_extended, source_lengths


def _breakdown_table(breakdown: dict[str, Any]) -> Table:
    head = ("published loop ms", "share", "fastseq ms", "share")
    made = table("the parts of a step", f"mean of {breakdown['steps']} steps", *head)
    plain, fast = breakdown["plain"], breakdown["fastseq"]
    sums = [sum(value for value in part.values() if value is not None) for part in (plain, fast)]
    for name in PHASES:
        cells = [f"{plain[name]:.1f}", f"{100 * plain[name] / sums[0]:.1f} %"]
        joined = fast[name] is None
        ours = [f"with {JOINED[name]}", ""] if joined else [f"{fast[name]:.1f}", f"{100 * fast[name] / sums[1]:.1f} %"]
        made.add_row(name, *cells, *ours)
    made.add_section()
    made.add_row("a step", f"{sums[0]:.1f}", "", f"{sums[1]:.1f}", f"{sums[0] / sums[1]:.1f}x")
    return made


def _beam_table(beam: dict[str, Any]) -> Table:
    title = f"beam search: {beam['texts']} texts, beam {beam['beam_size']}, up to {beam['max_steps']} words"
    made = table(title, "", "s", "in all", "ROUGE-1", "ROUGE-2", "ROUGE-L")
    for i, row in enumerate(beam["rows"]):
        gain = f"{beam['rows'][0]['seconds'] / row['seconds']:.1f}x" if i else ""
        scores = (f"{row[kind]:.1f}" for kind in ("rouge1", "rouge2", "rougeL"))
        made.add_row(row["name"], f"{row['seconds']:.2f}", gain, *scores)
    return made
