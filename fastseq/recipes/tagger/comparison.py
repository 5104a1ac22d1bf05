"""``fastseq compare tagger``: the usual BiLSTM-CRF code against fastseq's, on the same budget."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastseq.models.bilstm import mask_of
from fastseq.models.tagger import SoftmaxDecoder, Tagger
from fastseq.recipes.compare import (
    Variant,
    disagreement,
    left_out,
    levers,
    levers_table,
    paired_share,
    seconds,
    take_turns,
    training_order,
)
from fastseq.recipes.config import TrainConfig
from fastseq.recipes.loading import evaluation_batches
from fastseq.recipes.tagger.plain import PlainTagger
from fastseq.recipes.tagger.recipe import Config, build
from fastseq.recipes.task import Batch, Task
from fastseq.recipes.train import wants_bf16

POOL = 960
"""Training sentences that are batched together: enough for the buckets to find like lengths."""

ROUNDS = 3
PAIRS = 60


class Comparison:
    """The variants of one task, and what is measured of them.

    Args:
        config: of the recipe.
        task: its data, and the first weights of every variant.
        sentences: that the plain and the fastseq version are trained on.
    """

    def __init__(self, config: Config, task: Task, sentences: int) -> None:
        self.config, self.task = config, task
        gpu = config.train.device == "auto" and torch.cuda.is_available()
        self.first = cast(Tagger, task.model).to("cuda" if gpu else "cpu")
        self.sentences = min(sentences, config.train.epochs * len(task.train))
        self.steps = -(-self.sentences // config.train.batch_size)
        self.bf16 = wants_bf16(config.train)
        self.device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"

    def plain(self, name: str, decoder: str = "torchcrf", **changes: Any) -> Variant:
        """The usual code, with one of the decoders."""
        import torchcrf

        ours = self.first.decoder
        if decoder == "torchcrf":
            layer: nn.Module = torchcrf.CRF(self.first.output.out_features, batch_first=True)
            layer.load_state_dict(ours.state_dict())
        else:
            layer = copy.deepcopy(ours) if decoder == "fastseq" else SoftmaxDecoder()
        layer.to(self.first.output.weight.device)
        return self._variant(name, PlainTagger(self.first, layer), buckets=False, fused=False, **changes)

    def fast(self, name: str, decoder: nn.Module | None = None, bf16: bool = False, fused: bool = False) -> Variant:
        """Fastseq's model on length buckets."""
        model = copy.deepcopy(self.first)
        model.decoder = decoder or model.decoder
        return self._variant(name, model, buckets=True, fused=fused, bf16=bf16)

    def _variant(self, name: str, model: nn.Module, *, buckets: bool, fused: bool, bf16: bool = False) -> Variant:
        warmup = min(self.config.train.warmup_steps, self.steps // 10)  # a short budget has a short warmup
        changes = {"buckets": buckets, "fused": fused, "warmup_steps": warmup}
        train: TrainConfig = self.config.train.model_copy(update=changes)
        torch.manual_seed(self.config.seed)
        return Variant(name, model, train, self.steps, bf16)

    def levers(self) -> list[dict[str, Any]]:
        """Switches the levers on one at a time and times them in turns; the plain version runs twice."""
        variants = [
            self.plain("plain"),
            self.plain("plain again (control)"),
            self.plain("+ fused CRF", "fastseq"),
            self.fast("+ length buckets"),
            self.fast("+ bf16 LSTM", bf16=True),
            self.fast("+ fused optimizer", bf16=True, fused=True),
        ]
        pool = min(POOL, len(self.task.train))
        order = self._order(pool // 5 + ROUNDS * pool)
        take_turns(variants, self.task, order, pool, warm=pool // 5)
        return levers(variants, (0, 0, 0, 2, 3, 4), self.task, order[: 8 * self.config.train.batch_size])

    def crf_share(self, bf16: bool, fused: bool) -> dict[str, dict[str, float]]:
        """The CRF's share of a step, plain and fast, measured in two ways.

        Returns:
            "paired": what a step takes less with a softmax instead, by pairs of steps on the same batches.
            "alone": the time of the CRF's loss and gradients alone, against that of the step.
        """
        order = self._order(PAIRS * self.config.train.batch_size)
        pairs = {
            "plain": (self.plain("with"), self.plain("without", "softmax"), PAIRS // 4),
            "fastseq": (
                self.fast("with", bf16=bf16, fused=fused),
                self.fast("without", SoftmaxDecoder(), bf16=bf16, fused=fused),
                PAIRS,
            ),
        }
        shares = {}
        for name, (one, other, count) in pairs.items():
            batches = list(one.batches(self.task, order, 0))[:count]
            alone = [_crf_seconds(one, b) / seconds(partial(one.step, b), one) for b in batches]
            shares[name] = {"paired": paired_share(one, other, batches), "alone": statistics.median(alone)}
        return shares

    def quality(self, bf16: bool, fused: bool) -> list[dict[str, Any]]:
        """Trains both versions on the whole budget, in turns, and scores them."""
        variants = [self.plain("plain"), self.fast("fastseq", bf16=bf16, fused=fused)]
        take_turns(variants, self.task, self._order(self.sentences), POOL * 2)
        rows = []
        for variant in variants:
            variant.model.eval()
            row: dict[str, Any] = {"name": variant.name, "examples": variant.examples}
            row |= {
                "seconds": sum(variant.seconds),
                "examples_per_s": variant.rate,
                "step_ms": variant.step_ms,
            }
            with (
                torch.inference_mode(),
                torch.autocast(variant.device.type, torch.bfloat16, enabled=variant.bf16),
            ):
                for part in ("dev", "test"):
                    batches = evaluation_batches(self.task, getattr(self.task, part), variant.device)
                    start = time.perf_counter()
                    row[part] = self.task.evaluate(variant.model, batches)
                    row[f"{part}_seconds"] = time.perf_counter() - start
            rows.append(row)
        return rows

    def _order(self, count: int) -> list[int]:
        """The training examples of a run, epoch after epoch."""
        return training_order(count, len(self.task.train), self.config.seed)


def _crf_seconds(variant: Variant, batch: Batch) -> float:
    """The time of the decoder's loss and gradients on the emissions of a batch."""
    batch = {name: value.to(variant.device) for name, value in batch.items()}
    model = cast(Tagger, variant.model)
    with torch.no_grad():
        emissions = model(**{**batch, "tags": None})
    emissions = emissions.detach().requires_grad_()
    tags, mask = batch["tags"].clamp(min=0), mask_of(batch["lengths"], emissions.shape[1])
    return seconds(lambda: model.decoder(emissions, tags, mask=mask, reduction="mean").backward(), variant)


def compare(config: Config, sentences: int) -> dict[str, Any]:
    """Measures the levers, the CRF's share and the quality of both versions; prints and returns the figures.

    Args:
        config: of the recipe; its model and training settings hold for both versions.
        sentences: the training budget of each version.
    """
    start = time.perf_counter()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    console = Console()
    console.print("reading the data ...")
    run = Comparison(config, build(config), sentences)
    console.print("timing each lever, in turns on the same sentences ...")
    rows = run.levers()
    # The fastseq version keeps the levers that paid on this machine.
    bf16, fused = rows[4]["gain"] > 1 and run.bf16, rows[5]["gain"] > 1
    console.print("timing a step with the CRF and without ...")
    share = run.crf_share(bf16, fused)
    console.print(f"training both versions on {run.sentences} sentences ...")
    quality = run.quality(bf16, fused)
    figures = {
        "title": f"fastseq compare tagger: {config.data.name}, {run.device}",
        "levers": rows,
        "control_disagreement": abs(rows[1]["examples_per_s"] / rows[0]["examples_per_s"] - 1),
        "crf_share_of_step": share,
        "quality": quality,
        "kept": {"bf16": bf16, "fused_optimizer": fused},
        "seconds": time.perf_counter() - start,
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "config": config.model_dump(mode="json"),
    }
    show(figures, console)
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints the figures as tables."""
    console.print(levers_table(figures["title"], figures["levers"], "sent/s"))
    console.print(
        "Per step. Plain is pytorch-crf, random batches padded to the longest, fp32 and torch's AdamW; levers add up."
    )
    share, kept = figures["crf_share_of_step"], figures["kept"]
    console.print(
        f"{disagreement(figures)}\n"
        "The CRF's share of a step, by its own time (and by steps with it and with a softmax instead): "
        + ", ".join(
            f"{name} {100 * both['alone']:.1f} % ({100 * both['paired']:.1f} %)" for name, both in share.items()
        )
    )
    if (note := left_out(kept)) is not None:
        console.print(note)
    console.print(_quality_table(figures["quality"]))
    plain, fast = figures["quality"]
    console.print(
        f"{fast['examples_per_s'] / plain['examples_per_s']:.1f}x the sentences a second. "
        f"All of this took {figures['seconds']:.0f} s."
    )


def _quality_table(rows: Sequence[dict[str, Any]]) -> Table:
    score = next(iter(rows[0]["dev"]))
    table = Table(title=f"the same {rows[0]['examples']} training sentences, the same first weights")
    names = ("", "train s", "sent/s", "ms/step", f"dev {score}", f"test {score}", "scoring s")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds']:.1f}",
            f"{row['examples_per_s']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{row['dev'][score]:.2f}",
            f"{row['test'][score]:.2f}",
            f"{row['dev_seconds'] + row['test_seconds']:.1f}",
        )
    return table
