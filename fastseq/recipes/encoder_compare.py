"""``fastseq compare`` of the recipes with a text encoder: Hugging Face as it is usually run, and each lever on top."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fastseq
from fastseq.models.pooled_encoder import PooledEncoder
from fastseq.recipes.compare import Variant, disagreement, left_out, levers, levers_table, take_turns, training_order
from fastseq.recipes.config import RecipeConfig
from fastseq.recipes.encoders import EncoderConfig
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.loading import evaluation_batches, evaluation_sample
from fastseq.recipes.task import Batch, Task
from fastseq.recipes.train import prepare, wants_bf16

LEVER_SECONDS = 20.0
"""What each of the two plain runs may train while the levers are timed."""

QUALITY_SECONDS = 35.0
"""What the plain version may train for the comparison of the scores."""

SCORED = 512
"""Examples of dev that both versions are scored on."""

Collate = Callable[[list[Any]], Batch]


class Comparison:
    """The variants of one task, and what is measured of them.

    Args:
        config: of the recipe.
        encoder: its section of the text encoder.
        task: its data, and the first weights of every variant.
        examples: the most that a variant is trained on.
    """

    def __init__(self, config: RecipeConfig, encoder: EncoderConfig, task: Task, examples: int) -> None:
        self.config, self.task = config, task
        gpu = config.train.device == "auto" and torch.cuda.is_available()
        self.first = task.model.to("cuda" if gpu else "cpu")
        fastseq.unpatch(self.first)
        prepare(self.first, config.train)
        self.size = config.train.batch_size
        self.most = max(2, examples // self.size)
        self.order = training_order((self.most + 1) * self.size, len(task.train), config.seed)
        self.fixed = padded_to(task.collate, encoder.max_length)
        self.device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
        self.bf16 = wants_bf16(config.train)
        self.report: list[Any] = []

    def variant(
        self,
        name: str,
        *,
        fixed: bool = False,
        buckets: bool = False,
        packed: bool = False,
        bf16: bool = False,
        fused: bool = False,
    ) -> Variant:
        """The model with these levers: `fixed` pads to the maximum, and `packed` runs on real tokens only."""
        model = copy.deepcopy(self.first).train()
        if packed:
            encoders = [module.encoder for module in model.modules() if isinstance(module, PooledEncoder)]
            self.report = [fastseq.patch(encoder, packed=True) for encoder in encoders]
        # A comparison is short: no warmup, which would be all of it.
        train = self.config.train.model_copy(update={"buckets": buckets, "fused": fused, "warmup_steps": 0})
        torch.manual_seed(self.config.seed)
        return Variant(name, model, train, self.most, bf16, collate=self.fixed if fixed else None)

    def levers(self) -> list[dict[str, Any]]:
        """Switches the levers on one at a time and times them in turns; the plain version runs twice."""
        variants = [
            self.variant("plain Hugging Face", fixed=True),
            self.variant("the same again (control)", fixed=True),
            self.variant("+ padding to the longest"),
            self.variant("+ length buckets", buckets=True),
            self.variant("+ real tokens only", buckets=True, packed=True),
            self.variant("+ bf16", buckets=True, packed=True, bf16=True),
            self.variant("+ fused optimizer", buckets=True, packed=True, bf16=True, fused=True),
        ]
        pool = self._steps(variants[0], LEVER_SECONDS) * self.size
        order = self.order[: self.size + pool]
        take_turns(variants, self.task, order, pool, warm=self.size)
        return levers(variants, (0, 0, 0, 2, 3, 4, 5), self.task, order[: self.size])

    def _steps(self, variant: Variant, budget: float) -> int:
        """How many steps of a variant fit into so many seconds; at least 2."""
        batches = list(variant.batches(self.task, self.order[: 2 * self.size], 0))
        variant.step(batches[0])
        start = time.perf_counter()
        variant.step(batches[-1])
        taken = time.perf_counter() - start
        return max(2, min(int(budget / taken), self.most))

    def quality(self, packed: bool, bf16: bool, fused: bool) -> list[dict[str, Any]]:
        """Trains both versions on the same examples, in turns, and scores them on the same part of dev."""
        variants = [
            self.variant("plain Hugging Face", fixed=True),
            self.variant("fastseq", buckets=True, packed=packed, bf16=bf16, fused=fused),
        ]
        count = self._steps(self.variant("probe", fixed=True), QUALITY_SECONDS) * self.size
        for variant in variants:  # the schedule ends where this training does
            variant.restart(count // self.size)
        take_turns(variants, self.task, self.order[:count], count)
        some = self.config.train.model_copy(update={"max_eval_batches": 1, "eval_batch_size": SCORED})
        sample = evaluation_sample(self.task.dev, some, self.config.seed)
        return [{**_figures(variant), **self._score(variant, sample)} for variant in variants]

    def _score(self, variant: Variant, sample: Sequence[Any]) -> dict[str, Any]:
        variant.model.eval()
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(variant.device.type, torch.bfloat16, enabled=variant.bf16):
            size = self.config.train.eval_batch_size
            scores = self.task.evaluate(variant.model, evaluation_batches(self.task, sample, variant.device, size))
        return {"dev": scores, "scoring_seconds": time.perf_counter() - start}


def padded_to(collate: Collate, length: int) -> Collate:
    """Batches whose texts are padded to a fixed length, as a tokenizer with ``padding="max_length"`` makes them."""

    def fixed(examples: list[Any]) -> Batch:
        batch = collate(examples)
        room = (0, length - batch["input_ids"].shape[1])
        return batch | {name: nn.functional.pad(batch[name], room) for name in ("input_ids", "attention_mask")}

    return fixed


def _figures(variant: Variant) -> dict[str, Any]:
    rate = {"examples_per_s": variant.rate, "step_ms": variant.step_ms, "seconds": sum(variant.seconds)}
    return {"name": variant.name, "examples": variant.examples, **rate}


def compare(
    recipe: str,
    config: RecipeConfig,
    data: str,
    encoder: EncoderConfig | None,
    build: Callable[[], Task],
    examples: int,
) -> dict[str, Any]:
    """Measures the levers and the quality of both versions; prints and returns the figures.

    Args:
        recipe: its name.
        config: its configuration; the model and training settings hold for both versions.
        data: the name of the data set, for the title.
        encoder: the configuration's section of the text encoder.
        build: makes the task.
        examples: the most that a version is trained on; the time of the plain one is limited too.

    Raises:
        ConfigError: there is no text encoder, which is what the levers are of.
    """
    if encoder is None:
        raise ConfigError("model.encoder: the comparison is of models that read a text, got null")
    start = time.perf_counter()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    console = Console()
    console.print("reading the data ...")
    run = Comparison(config, encoder, build(), examples)
    console.print("timing each lever, in turns on the same examples ...")
    rows = run.levers()
    # The fastseq version keeps the levers that paid on this machine.
    packed, fused = rows[4]["gain"] > 1, rows[6]["gain"] > 1
    bf16 = rows[5]["gain"] > 1 and run.bf16
    console.print("training both versions on the same examples ...")
    figures = {
        "title": f"fastseq compare {recipe}: {data}, {run.device}",
        "levers": rows,
        "control_disagreement": abs(rows[1]["examples_per_s"] / rows[0]["examples_per_s"] - 1),
        "patched": [str(report) for report in run.report],
        "quality": run.quality(packed, bf16, fused),
        "score": run.task.score,
        "kept": {"real_tokens_only": packed, "bf16": bf16, "fused_optimizer": fused},
        "seconds": time.perf_counter() - start,
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "config": config.model_dump(mode="json"),
    }
    show(figures, console)
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints the figures as tables."""
    console.print(levers_table(figures["title"], figures["levers"], "ex/s"))
    console.print(
        "Per step. Plain is transformers' own model on random batches padded to the most tokens, fp32 and torch's "
        f"AdamW; levers add up.\n{disagreement(figures)}"
    )
    if (note := left_out(figures["kept"])) is not None:
        console.print(note)
    console.print(_quality_table(figures["quality"], figures["score"]))
    plain, fast = figures["quality"]
    console.print(
        f"{fast['examples_per_s'] / plain['examples_per_s']:.1f}x the examples a second. "
        f"All of this took {figures['seconds']:.0f} s."
    )


def _quality_table(rows: Sequence[dict[str, Any]], score: str) -> Table:
    table = Table(title=f"the same {rows[0]['examples']} training examples, the same first weights")
    for i, name in enumerate(("", "train s", "ex/s", "ms/step", f"dev {score}", "scoring s")):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds']:.1f}",
            f"{row['examples_per_s']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{row['dev'][score]:.2f}",
            f"{row['scoring_seconds']:.1f}",
        )
    return table
