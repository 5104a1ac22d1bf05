"""The image system's configuration, and how a `Task` is made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from fastseq.models.image_classifier import ImageClassifier, small_stem
from fastseq.recipes.config import Probability, RecipeConfig, Section
from fastseq.recipes.encoders import from_checkpoint, make_encoder, place, shape_of
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.fetch import fetch
from fastseq.recipes.image import data
from fastseq.recipes.image.folder import Mode, read_folder
from fastseq.recipes.image.idx import FASHION, read_idx
from fastseq.recipes.labels import LabelEvaluation
from fastseq.recipes.task import Task

SMALL = 64
"""Pixels each way up to which an encoder with fresh weights has the first layer for small images."""


class DataConfig(Section):
    """Which images."""

    name: Literal["fashion-mnist", "folder", "idx"]
    folder: Path | None = None
    size: PositiveInt | None = None
    mode: Mode = "rgb"
    cache: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.folder is None) != (self.name == "fashion-mnist"):
            raise ValueError(f"folder: one is wanted where name is folder or idx, got {self.folder} for {self.name}")
        if self.size is not None and self.name != "folder":
            raise ValueError(
                f"size: images of a folder can be brought to it, those of {self.name} are used as they are"
            )
        return self


class ModelConfig(Section):
    """The network."""

    checkpoint: str | None = None
    shape: dict[str, Any] = Field(default_factory=dict)
    small_stem: bool | None = None
    shift: NonNegativeInt = 0
    flip: bool = False
    dropout: Probability = 0.0
    label_smoothing: Probability = 0.0

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.checkpoint is None and self.shape.get("model_type") != "resnet":
            raise ValueError(f"shape: the model_type resnet is wanted, got {self.shape.get('model_type')}")
        if self.checkpoint is not None and self.small_stem:
            raise ValueError("small_stem: it would take the place of a layer that the checkpoint has trained")
        return self


class Config(RecipeConfig):
    """What ``fastseq train image`` takes."""

    data: DataConfig
    model: ModelConfig


def read(config: DataConfig) -> data.Splits:
    """The images of a configuration, decoded."""
    if config.name == "folder":
        size = None if config.size is None else (config.size, config.size)
        return read_folder(cast(Path, config.folder), config.mode, size, config.cache)
    if config.name == "idx":
        return read_idx(cast(Path, config.folder))
    return read_idx(fetch(config.name), FASHION)


def build(config: Config) -> Task:
    """Reads the images, and makes the model."""
    splits = read(config.data)
    shape, statistics = splits.train.shape, data.statistics(splits.train)
    encoder = load_encoder(config.model, shape[-1])
    small = config.model.small_stem
    if config.model.checkpoint is not None:
        statistics = trained_with(config.model.checkpoint) or statistics
    elif small is None:
        small = max(shape[:2]) <= SMALL
    artefacts = {
        "labels": splits.names,
        "encoder": shape_of(encoder),
        "small_stem": bool(small),
        "statistics": statistics,
        "shape": list(shape),
    }
    return Task(
        name="image",
        model=make_model(config.model, artefacts, encoder),
        train=cast(Sequence[Any], splits.train),
        dev=cast(Sequence[Any], splits.dev),
        test=cast(Sequence[Any], splits.test),
        collate=data.collate,
        length=lambda _: 1,
        evaluate=LabelEvaluation(),
        score="accuracy",
        artefacts=artefacts,
    )


def load_encoder(config: ModelConfig, channels: int) -> nn.Module:
    """The encoder of a configuration: the weights of its checkpoint, or its shape with fresh ones.

    Args:
        config: says which.
        channels: of the images.

    Raises:
        ConfigError: there is no such checkpoint or shape, or it is not for such images; names the key.
    """
    if config.checkpoint is None:
        key = "model.shape"
        encoder = make_encoder(json.dumps({"num_channels": channels, **config.shape}), key)
    else:
        key = "model.checkpoint"
        encoder = from_checkpoint(config.checkpoint, key)
    shape = cast(Any, encoder).config
    if shape.model_type != "resnet":
        raise ConfigError(f"{key}: a ResNet of transformers is wanted, got {shape.model_type}")
    if len(shape.depths) != len(shape.hidden_sizes):
        sizes = f"{shape.depths} and {shape.hidden_sizes}"
        raise ConfigError(f"{key}: as many depths as hidden_sizes are wanted, got {sizes}")
    if channels not in (1, shape.num_channels):
        raise ConfigError(f"{key}: it is for images of {shape.num_channels} channels (data.mode), got {channels}")
    return encoder


def make_model(config: ModelConfig, artefacts: dict[str, Any], encoder: nn.Module) -> ImageClassifier:
    """The network on an encoder, with a fresh layer on top.

    Args:
        config: the network's section.
        artefacts: of the task.
        encoder: is changed where it gets the first layer for small images.
    """
    if artefacts["small_stem"]:
        small_stem(encoder)
    channels: int = cast(Any, encoder).config.num_channels
    mean, std = (list(values) * (channels if len(values) == 1 else 1) for values in artefacts["statistics"])
    return ImageClassifier(
        encoder,
        len(artefacts["labels"]),
        mean=mean,
        std=std,
        shift=config.shift,
        flip=config.flip,
        dropout=config.dropout,
        label_smoothing=config.label_smoothing,
    )


def trained_with(checkpoint: str) -> tuple[list[float], list[float]] | None:
    """The mean and the deviation of the channels that a checkpoint's images had, if a file beside it says so."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(place(checkpoint, "model.checkpoint"))
    except OSError:
        return None
    if values.get("image_mean") is None or values.get("image_std") is None:
        return None
    return [255 * value for value in values["image_mean"]], [255 * value for value in values["image_std"]]
