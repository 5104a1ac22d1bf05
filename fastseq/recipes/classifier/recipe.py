"""The classifier's configuration, and how a `Task` is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fastseq.models.text_classifier import TextClassifier
from fastseq.recipes.classifier import data
from fastseq.recipes.config import Probability, RecipeConfig, Section
from fastseq.recipes.encoders import EncoderConfig, TextEncoder, load_encoder, load_tokenizer, shape_of
from fastseq.recipes.feature_cache import file_hash
from fastseq.recipes.fetch import fetch
from fastseq.recipes.labels import LabelEvaluation
from fastseq.recipes.task import Task

Column = Annotated[str, Field(min_length=1)]


class DataConfig(Section):
    """Which data, and where its text and its label are."""

    name: Literal["movie-snippets", "table"]
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    text: Column = "text"
    label: Column = "label"
    cache: Path | None = None

    def hash_of(self, part: str) -> str:
        """The sha256 of the file that a part of the data comes from."""
        return file_hash(getattr(self, part) if self.name == "table" else fetch(self.name))


class ModelConfig(Section):
    """The network."""

    encoder: EncoderConfig
    dropout: Probability = 0.1
    label_smoothing: Probability = 0.0


class Config(RecipeConfig):
    """What ``fastseq train classifier`` takes."""

    data: DataConfig
    model: ModelConfig


def build(config: Config) -> Task:
    """Reads the data, and makes the tokenizer and the model."""
    source = config.data
    splits = data.read(source.name, (source.train, source.dev, source.test), source.text, source.label)
    labels = data.labels_of(splits.train, source.label)
    tokenizer = load_tokenizer(config.model.encoder)
    encoder = TextEncoder(tokenizer, config.model.encoder.max_length)
    parts = []
    for part, rows in zip(splits._fields, splits, strict=True):
        key = {} if source.cache is None else _key(config, encoder, part)
        cache = (source.cache, f"classifier-{source.name}-{part}", key)
        parts.append(data.examples(rows, source.text, source.label, labels, encoder, cache))
    model = make_model(config.model, len(labels), load_encoder(config.model.encoder, len(encoder)))
    shape = shape_of(model.text.encoder)
    return Task(
        name="classifier",
        model=model,
        train=parts[0],
        dev=parts[1],
        test=parts[2],
        collate=data.collate,
        length=lambda example: len(example.ids),
        evaluate=LabelEvaluation(),
        score="accuracy",
        artefacts={"labels": labels, "tokenizer": tokenizer, "encoder": shape},
    )


def _key(config: Config, encoder: TextEncoder, part: str) -> dict[str, object]:
    """What the ids of a part are a function of."""
    settings = {"part": part, "text": config.data.text, "max_length": config.model.encoder.max_length}
    return {"data": config.data.hash_of(part), "tokenizer": encoder.hash, **settings}


def make_model(config: ModelConfig, num_classes: int, encoder: nn.Module) -> TextClassifier:
    """The network on an encoder, with a fresh layer on top."""
    return TextClassifier(
        encoder,
        num_classes,
        pooling=config.encoder.pooling,
        dropout=config.dropout,
        label_smoothing=config.label_smoothing,
        packed=config.encoder.packed,
    )
