"""Configuration: YAML defaults, a file, and ``key=value`` on the command line, all checked by pydantic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fastseq.recipes.errors import ConfigError

Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of a configuration. A key that is not declared is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainConfig(Section):
    """The shared loop's settings (recipes/train.py)."""

    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    buckets: bool = True
    accumulate: PositiveInt = 1
    find_batch_size: bool = False
    fraction: Fraction = 1.0
    lr: Positive = 1e-3
    encoder_lr: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    clip: Positive | None = None
    fused: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tf32: bool | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    cudnn_benchmark: bool | None = None
    eval_every: PositiveInt | None = None
    eval_batch_size: PositiveInt = 128
    max_eval_batches: PositiveInt | None = None
    save_every: PositiveInt | None = 500
    patience: PositiveInt | None = None
    workers: NonNegativeInt | None = None
    pin_memory: bool | None = None
    persistent_workers: bool = True
    prefetch: PositiveInt = 4
    device: Literal["auto", "cpu"] = "auto"
    fsdp: bool = False
    threads: PositiveInt | None = None
    tensorboard: bool = True
    progress: bool = True


class RecipeConfig(Section):
    """What every recipe's configuration has; a recipe adds its ``data`` and ``model`` sections."""

    run_dir: Path
    seed: NonNegativeInt = 0
    run_name: Annotated[str, Field(min_length=1)] | None = None
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """A run's name takes the place of the last part of its directory: ``run_name=a`` is ``run_dir=runs/a``."""
        if not isinstance(values, dict):  # pydantic says so
            return values
        name, folder = values.get("run_name"), values.get("run_dir")
        if not isinstance(name, str) or folder is None:
            return values
        if Path(name).name != name:
            raise ValueError(f"run_name: a name without slashes is wanted, got {name!r}")
        return {**values, "run_dir": Path(folder).with_name(name)}


NOT_THE_RESULT: dict[str, Any] = {
    "run_dir": True,
    "run_name": True,
    "train": {"tensorboard", "progress", "workers", "pin_memory", "persistent_workers", "prefetch", "fsdp"},
}
"""What may differ between a run and its resumption: nothing that reaches the weights by more than rounding."""

ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


def load(config_class: type[ConfigT], package: str, file: Path | None, overrides: Sequence[str]) -> ConfigT:
    """The configuration of a run: the recipe's defaults, then a file, then the command line.

    Args:
        config_class: the pydantic class that checks it.
        package: the recipe's package, which holds ``config.yaml``.
        file: a YAML file that changes some keys, or the name of one that the recipe brings ("pos"), or None.
        overrides: ``key=value`` or ``section.key=value``; values are YAML.

    Raises:
        ConfigError: naming the key, what came and what was wanted.
    """
    values = _mapping(resources.files(package).joinpath("config.yaml").read_text("utf-8"), "config.yaml")
    if file is not None:
        values = _merged(values, _mapping(_read(package, file), str(file)))
    for item in overrides:
        values = _merged(values, _override(item))
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, config_class)) from None


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two configurations differ, as ``key: old -> new``."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _read(package: str, file: Path) -> str:
    """The text of a file, or of the one of that name that the recipe brings."""
    if file.is_file():
        return file.read_text("utf-8")
    folder = resources.files(package)
    brought = sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))
    if str(file) not in brought:
        raise ConfigError(f"--config: no file at {file}; the recipe brings {', '.join(brought)}")
    return folder.joinpath(f"{file}.yaml").read_text("utf-8")


def _mapping(text: str, name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: a mapping of keys to values is wanted, got {type(values).__name__}")
    return values


def _override(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"{item!r}: key=value is wanted, for example train.lr=0.001")
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"{key}: the value {text!r} is not YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; on a command line it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it; sections are merged, and anything else is replaced."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = _merged(base[key], value) if both else value
    return result


def _explain(error: ValidationError, config_class: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            known = ", ".join(_siblings(config_class, item["loc"]))
            lines.append(f"{key}: no such key; the keys here are {known}")
        else:
            lines.append(f"{key}: {item['msg'].lower()}, got {item['input']!r}" if key else item["msg"])
    return "\n".join(lines)


def _siblings(config_class: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where `location` points."""
    section: Any = config_class
    for part in location[:-1]:
        if part in section.model_fields:  # else it is the key of a mapping, whose section is already there
            section = _section_in(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> Any:
    """The section that a type holds, such as that of the values of a mapping."""
    if hasattr(annotation, "model_fields"):
        return annotation
    found = [_section_in(part) for part in get_args(annotation)]
    return next((section for section in found if section is not None), None)
