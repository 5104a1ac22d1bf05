"""The tagger's configuration, and how a `Task` is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from fastseq.models.tagger import SoftmaxDecoder, Tagger
from fastseq.recipes import metrics
from fastseq.recipes.config import Probability, RecipeConfig, Section
from fastseq.recipes.tagger import data
from fastseq.recipes.task import Batch, Evaluation, Task

Scheme = Literal["BIO", "IOB1", "BIOES", "BILOU", "BMES"]
Feature = Literal["token", "lower", "bigram", "first", "last", "prefix", "suffix"]


class DataConfig(Section):
    """Which data, and what its tags are."""

    name: Literal["peoples-daily-ner", "peoples-daily-pos", "conll"]
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    token_column: int = 0
    tag_column: int = -1
    unit: Literal["auto", "character", "word"] = "auto"
    scheme: Scheme | Literal["auto", "none"] = "auto"

    @property
    def by_character(self) -> bool:
        """Whether the tokens are characters, so that raw text needs no word boundaries."""
        return self.unit == "character" or (self.unit == "auto" and self.name == "peoples-daily-ner")


class FeatureConfig(Section):
    """One embedding table: its width, how often a string must occur to get a row, how many rows at most."""

    size: PositiveInt
    min_count: PositiveInt = 1
    max_ids: PositiveInt | None = None


class ModelConfig(Section):
    """The network."""

    features: Annotated[dict[Feature, FeatureConfig | None], Field(min_length=1)]
    hidden_size: PositiveInt
    layers: PositiveInt = 1
    dropout: Probability = 0.5
    decoder: Literal["crf", "softmax"] = "crf"
    vectors: Path | None = None
    freeze_vectors: bool = False

    @property
    def columns(self) -> dict[str, FeatureConfig]:
        """The features in use: one set to null is off."""
        return {name: feature for name, feature in self.features.items() if feature is not None}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if not self.columns:
            raise ValueError("at least one feature is wanted")
        if self.vectors is not None and next(iter(self.columns)) != "token":
            raise ValueError("vectors: they are for the feature token, which must come first")
        return self


class Config(RecipeConfig):
    """What ``fastseq train tagger`` takes."""

    data: DataConfig
    model: ModelConfig


def build(config: Config) -> Task:
    """Reads the data, and makes the encoder and the model."""
    source = config.data
    splits = data.read(source.name, (source.train, source.dev, source.test), source.token_column, source.tag_column)
    limits = {name: (feature.min_count, feature.max_ids) for name, feature in config.model.columns.items()}
    encoder = data.Encoder.fit(splits.train, limits)
    scheme = scheme_of(source, encoder.labels)
    train, dev, test = ([encoder.example(s) for s in part] for part in splits)
    return Task(
        name="tagger",
        model=make_model(config.model, encoder, scheme),
        train=train,
        dev=dev,
        test=test,
        collate=data.collate,
        length=lambda example: len(example[1]),
        evaluate=Evaluate(encoder.labels, scheme),
        score="f1" if scheme else "accuracy",
        artefacts={"encoder": encoder.to_plain(), "scheme": scheme, "by_character": source.by_character},
    )


def scheme_of(source: DataConfig, labels: Sequence[str]) -> Scheme | None:
    """How the labels write spans, or None where each stands for itself."""
    if source.scheme == "auto":
        return "BIO" if all(label == "O" or label[:2] in ("B-", "I-") for label in labels) else None
    return None if source.scheme == "none" else source.scheme


def make_model(
    config: ModelConfig, encoder: data.Encoder, scheme: Scheme | None, decoder: nn.Module | None = None
) -> Tagger:
    """The network for an encoder, with fresh weights.

    Args:
        config: the network's section.
        encoder: gives the sizes of the tables and the labels.
        scheme: which tags may follow which, or None.
        decoder: takes the place of the configured one.
    """
    sizes = [feature.size for feature in config.columns.values()]
    vectors = None
    if config.vectors is not None:
        vectors = data.read_vectors(config.vectors, encoder.columns["token"], sizes[0])
    return Tagger(
        encoder.sizes,
        len(encoder.labels),
        embedding_dims=sizes,
        hidden_size=config.hidden_size,
        num_layers=config.layers,
        dropout=config.dropout,
        decoder=decoder or make_decoder(config.decoder, encoder.labels, scheme),
        vectors=vectors,
        freeze_vectors=config.freeze_vectors,
    )


def make_decoder(kind: str, labels: Sequence[str], scheme: Scheme | None) -> nn.Module:
    """The output layer: a softmax, or a CRF that knows which tags may follow which."""
    from fastseq.nn import CRF, tag_constraints

    if kind == "softmax":
        return SoftmaxDecoder()
    if scheme is None:
        return CRF(len(labels), batch_first=True)
    names = ("allowed_transitions", "allowed_start", "allowed_end")
    allowed: dict[str, Any] = dict(zip(names, tag_constraints(labels, scheme), strict=True))
    return CRF(len(labels), batch_first=True, **allowed)


class Evaluate(Evaluation):
    """Predicts and scores: entity F1 where the tags write spans, else token accuracy.

    Args:
        labels: the K tags.
        scheme: how they write spans, or None.
    """

    def __init__(self, labels: Sequence[str], scheme: Scheme | None) -> None:
        # One more, for a gold tag that training has not seen (-100): it is never predicted.
        self.labels, self.scheme = [*labels, "B-unseen"], scheme

    def answers(self, model: nn.Module, batch: Batch) -> list[tuple[list[int], list[int]]]:
        """Of each text, its tags and what was predicted, by a model with the `predict` of a `Tagger`."""
        predicted = cast(Tagger, model).predict(batch["tokens"], batch["lengths"])
        rows = zip(batch["tags"].tolist(), predicted.tolist(), batch["lengths"].tolist(), strict=True)
        return [(gold[:length], found[:length]) for gold, found, length in rows]

    def metrics(self, answers: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
        """Of all texts."""
        gold, predicted = ([self._strings(answer[i]) for answer in answers] for i in (0, 1))
        if self.scheme is None:
            return metrics.token_accuracy(gold, predicted)
        return metrics.entity_scores(metrics.to_bio(gold), metrics.to_bio(predicted))

    def _strings(self, tags: Sequence[int]) -> list[str]:
        return [self.labels[max(tag, -1)] for tag in tags]
