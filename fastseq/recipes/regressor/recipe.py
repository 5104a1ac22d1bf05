"""The regressor's configuration, and how a `Task` is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field, PositiveInt
from torch import nn

from fastseq.models.text_regressor import Loss, TextRegressor
from fastseq.recipes import metrics, table
from fastseq.recipes.config import Probability, RecipeConfig, Section
from fastseq.recipes.encoders import EncoderConfig, TextEncoder, load_encoder, load_tokenizer, shape_of
from fastseq.recipes.feature_cache import cached, file_hash
from fastseq.recipes.fetch import fetch
from fastseq.recipes.regressor import data
from fastseq.recipes.regressor.features import FORMAT, Features
from fastseq.recipes.task import Batch, Evaluation, Task

Names = tuple[Annotated[str, Field(min_length=1)], ...]


class DataConfig(Section):
    """Which data, and what its columns are."""

    name: Literal["debian-size", "table"]
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    target: Annotated[str, Field(min_length=1)]
    text: Names = ()
    numeric: Names = ()
    categorical: Names = ()
    bags: Names = ()
    cache: Path | None = None

    @property
    def columns(self) -> data.Columns:
        """The columns by what is made of them."""
        return data.Columns(self.target, self.text, self.numeric, self.categorical, self.bags)

    def hash_of(self, part: str) -> str:
        """The sha256 of the file that a part of the data comes from."""
        return file_hash(getattr(self, part) if self.name == "table" else fetch(self.name))


class ModelConfig(Section):
    """The network."""

    encoder: EncoderConfig | None
    category_dim: PositiveInt = 16
    bag_dim: PositiveInt = 64
    bag_size: Annotated[int, Field(ge=2)] = 1 << 16
    hidden_size: Annotated[int, Field(ge=2)] = 256
    dropout: Probability = 0.2
    bag_dropout: Probability = 0.2
    loss: Loss = "smape"


class Config(RecipeConfig):
    """What ``fastseq train regressor`` takes."""

    data: DataConfig
    model: ModelConfig


def build(config: Config) -> Task:
    """Reads the data, fits the features, and makes the tokenizer and the model."""
    source, encoder_config = config.data, config.model.encoder
    splits = data.read(source.name, (source.train, source.dev, source.test), source.columns)
    features = Features.fit(splits.train, source.columns, config.model.bag_size)
    tokenizer, text_encoder, encoder, shape = "", None, None, ""
    if encoder_config is not None:
        tokenizer = load_tokenizer(encoder_config)
        text_encoder = TextEncoder(tokenizer, encoder_config.max_length)
        encoder = load_encoder(encoder_config, len(text_encoder))
    model = make_model(config.model, features, encoder)
    if encoder is not None:
        shape = shape_of(encoder)
    parts = [examples(config, part, rows, features, text_encoder) for part, rows in splits._asdict().items()]
    return Task(
        name="regressor",
        model=model,
        train=cast(Sequence[Any], parts[0]),
        dev=cast(Sequence[Any], parts[1]),
        test=cast(Sequence[Any], parts[2]),
        collate=data.collate,
        length=lambda example: len(example.ids),
        evaluate=Evaluate(),
        score="smape",
        lower_is_better=True,
        artefacts={"features": features.to_plain(), "tokenizer": tokenizer, "encoder": shape},
    )


def examples(
    config: Config, part: str, rows: Sequence[table.Row], features: Features, encoder: TextEncoder | None
) -> data.Examples:
    """The examples of a part of the data, from the cache where there is a good one."""
    source, key = config.data, dict[str, object]()
    if source.cache is not None:
        key = {
            "encoding": FORMAT,
            "part": part,
            "data": source.hash_of(part),
            "features": features.hash,  # fitted to the training set: they change with it
            "tokenizer": encoder.hash if encoder is not None else None,
            "max_length": config.model.encoder.max_length if config.model.encoder is not None else None,
        }
    arrays = cached(
        source.cache, f"regressor-{source.name}-{part}", key, lambda: features.arrays(rows, encoder), say=print
    )
    return data.Examples(arrays, np.log([data.number(row, source.target) for row in rows]))


def make_model(config: ModelConfig, features: Features, encoder: nn.Module | None) -> TextRegressor:
    """The network on an encoder, with fresh weights for all else."""
    text = {} if config.encoder is None else {"pooling": config.encoder.pooling, "packed": config.encoder.packed}
    return TextRegressor(
        encoder,
        numeric=features.width,
        category_sizes=features.category_sizes,
        bags=len(features.columns.bags),
        bag_size=config.bag_size,
        category_dim=config.category_dim,
        bag_dim=config.bag_dim,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        bag_dropout=config.bag_dropout,
        loss=config.loss,
        center=features.center,
        scale=features.scale,
        **cast(Any, text),
    )


class Evaluate(Evaluation):
    """SMAPE on the scale of the target, and the mean error of the logarithms, of a `TextRegressor`."""

    def answers(self, model: nn.Module, batch: Batch) -> list[tuple[float, float]]:
        """Of each example, the logarithm of its target and what was predicted."""
        predicted = model(**{**batch, "targets": None})
        return list(zip(batch["targets"].tolist(), predicted.tolist(), strict=True))

    def metrics(self, answers: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Of all examples."""
        actual, predicted = (np.array([answer[i] for answer in answers]) for i in (0, 1))
        scores = metrics.smape(np.exp(actual).tolist(), np.exp(predicted).tolist())
        return {**scores, "log_error": float(np.abs(actual - predicted).mean())}
