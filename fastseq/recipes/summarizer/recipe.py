"""The summarizer's configuration, and how a `Task` is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn

from fastseq.models.summarizer import PointerGeneratorSummarizer
from fastseq.recipes import metrics
from fastseq.recipes.config import Probability, RecipeConfig, Section
from fastseq.recipes.summarizer import data
from fastseq.recipes.task import Batch, Evaluation, Task


class DataConfig(Section):
    """Which data, and how much of a text is read."""

    name: Literal["debian-synopsis", "bbc-titles", "jsonl"]
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    max_vocab: Annotated[int, Field(ge=5)] | None = 8000
    min_count: PositiveInt = 1
    max_source: PositiveInt
    max_target: PositiveInt


class ModelConfig(Section):
    """The network."""

    embedding_dim: PositiveInt = 128
    hidden_size: PositiveInt = 256
    encoder_layers: PositiveInt = 2
    dropout: Probability = 0.0
    coverage: bool = True
    coverage_weight: Annotated[float, Field(ge=0)] = 1.0
    chunk: PositiveInt | None = None
    copying: bool = True
    label_smoothing: Probability = 0.0


class DecodingConfig(Section):
    """The beam search."""

    beam_size: PositiveInt = 4
    dev_beam_size: PositiveInt = 1
    max_steps: PositiveInt | None = None
    min_steps: NonNegativeInt = 1
    length_penalty: float = 1.0
    no_repeat_ngram: NonNegativeInt = 0
    early_stopping: bool = True


class Config(RecipeConfig):
    """What ``fastseq train summarizer`` takes."""

    data: DataConfig
    model: ModelConfig
    decoding: DecodingConfig = DecodingConfig()


def build(config: Config) -> Task:
    """Reads the data, and makes the encoder and the model."""
    source = config.data
    splits = data.read(source.name, (source.train, source.dev, source.test))
    encoder = data.Encoder.fit(splits.train, source.max_vocab, source.min_count, source.max_source, source.max_target)
    train, dev, test = (encoder.examples(part) for part in splits)
    return Task(
        name="summarizer",
        model=make_model(config.model, len(encoder)),
        train=train,
        dev=dev,
        test=test,
        collate=data.collate,
        length=lambda example: len(example.source),
        evaluate=Evaluate(encoder, dev, config, config.decoding.dev_beam_size),
        score="rougeL",
        weight=lambda example: len(example.targets),
        artefacts={"encoder": encoder.to_plain()},
        collate_evaluation=data.collate_indexed,
        evaluate_test=Evaluate(encoder, test, config, config.decoding.beam_size),
    )


def make_model(config: ModelConfig, vocab_size: int) -> PointerGeneratorSummarizer:
    """The network with fresh weights."""
    return PointerGeneratorSummarizer(
        vocab_size,
        embedding_dim=config.embedding_dim,
        hidden_size=config.hidden_size,
        encoder_layers=config.encoder_layers,
        dropout=config.dropout,
        coverage=config.coverage,
        coverage_weight=config.coverage_weight,
        chunk=config.chunk,
        copy=config.copying,
        label_smoothing=config.label_smoothing,
    )


def search_settings(config: Config, beam_size: int) -> dict[str, float]:
    """The keywords of `PointerGeneratorSummarizer.summarize` that a configuration asks for."""
    decoding = config.decoding
    return {
        "beam_size": beam_size,
        "max_steps": decoding.max_steps or config.data.max_target,
        "min_steps": decoding.min_steps,
        "length_penalty": decoding.length_penalty,
        "no_repeat_ngram": decoding.no_repeat_ngram,
        "early_stopping": decoding.early_stopping,
    }


class Evaluate(Evaluation):
    """Writes summaries and scores them: ROUGE, and how well words that the vocabulary lacks are copied.

    Args:
        encoder: gives the words of ids.
        examples: those that the batches' index points at.
        config: says how to search.
        beam_size: hypotheses of an example.
    """

    def __init__(self, encoder: data.Encoder, examples: Sequence[data.Example], config: Config, beam_size: int) -> None:
        self.encoder, self.examples = encoder, examples
        self.settings = search_settings(config, beam_size)

    def answers(self, model: nn.Module, batch: Batch) -> list[tuple[int, list[int]]]:
        """The index of each example, and the ids of its summary.

        Args:
            model: has the `summarize` of the summarizer.
            batch: of `collate_indexed`.
        """
        found = cast(PointerGeneratorSummarizer, model).summarize(
            batch["source_ids"],
            batch["source_extended"],
            batch["source_lengths"],
            **self.settings,  # type: ignore[arg-type]
        )
        return list(zip(batch["index"].tolist(), found.ids, strict=True))

    def metrics(self, answers: Sequence[tuple[int, list[int]]]) -> dict[str, float]:
        """See `scores`."""
        return self.scores([self.examples[i] for i, _ in answers], [ids for _, ids in answers])

    def scores(self, examples: Sequence[data.Example], summaries: Sequence[Sequence[int]]) -> dict[str, float]:
        """ROUGE of the ids that were written for examples, and `copying`."""
        texts = [
            data.detokenize(self.encoder.words(ids, example.oov))
            for example, ids in zip(examples, summaries, strict=True)
        ]
        scores = metrics.rouge([example.reference for example in examples], texts)
        return {**scores, **self.copying(examples, summaries)}

    def copying(self, examples: Sequence[data.Example], summaries: Sequence[Sequence[int]]) -> dict[str, float]:
        """How words outside the vocabulary are copied, in per cent.

        Returns:
            "oov_copy_rate": of the words that the reference and the source of an example share and the vocabulary
            lacks, each once, those that its summary has too. "oov_share": of the words written, those that the
            vocabulary lacks. What a model that cannot copy has for both is 0.
        """
        size = len(self.encoder)
        wanted = [{i for i in example.targets.tolist() if i >= size} for example in examples]
        copied = [{i for i in ids if i >= size} for ids in summaries]
        hits = sum(len(a & b) for a, b in zip(wanted, copied, strict=True))
        written = sum(map(len, summaries))
        return {
            "oov_copy_rate": 100 * hits / max(1, sum(map(len, wanted))),
            "oov_share": 100 * sum(i >= size for ids in summaries for i in ids) / max(1, written),
        }
