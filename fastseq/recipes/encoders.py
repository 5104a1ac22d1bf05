"""Text encoders of Hugging Face transformers, and tokenizers: by a name, a folder, or a shape with fresh weights."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

import fastseq
from fastseq.models.pooled_encoder import Pooling
from fastseq.recipes.config import Probability, RecipeConfig, Section
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.feature_cache import Arrays, ragged
from fastseq.recipes.fetch import fetch
from fastseq.recipes.task import Task


class EncoderConfig(Section):
    """The encoder of a text."""

    checkpoint: str | None = None
    tokenizer: str | None = None
    shape: dict[str, Any] = Field(default_factory=dict)
    pooling: Pooling = "mean"
    dropout: Probability | None = None
    max_length: PositiveInt = 128
    packed: bool = True

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        if self.checkpoint is None and ("model_type" not in self.shape or self.tokenizer is None):
            raise ValueError("checkpoint: one is wanted, or a tokenizer and a shape with a model_type; got none")
        if self.checkpoint is not None and self.shape:
            raise ValueError("shape: it is for fresh weights; the checkpoint has its own")
        return self


def place(name: str, key: str) -> str:
    """What transformers loads a name from: "minilm" is fetched, a folder is itself, anything else is the hub's.

    Raises:
        ConfigError: a path where no folder is; names the setting `key`.
    """
    if name == "minilm":
        return str(fetch("minilm"))
    if not Path(name).is_dir() and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise ConfigError(f"{key}: a folder with a checkpoint, minilm, or a name on the hub is wanted, got {name!r}")
    return name


def load_tokenizer(config: EncoderConfig) -> str:
    """The tokenizer of a configuration, as the JSON text that the tokenizers package reads."""
    from transformers import AutoTokenizer

    name = config.tokenizer or cast(str, config.checkpoint)
    where = place(name, "model.encoder.tokenizer" if config.tokenizer else "model.encoder.checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.encoder: no tokenizer from {name!r}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"model.encoder: {name!r} has no tokenizer.json, and none can be made of what it has")
    return cast(str, tokenizer.backend_tokenizer.to_str())


class TextEncoder:
    """Texts to ids.

    Args:
        tokenizer: JSON text, of `load_tokenizer`.
        max_length: tokens of a text that are read, the special ones included.
    """

    def __init__(self, tokenizer: str, max_length: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self.hash = hashlib.sha256(tokenizer.encode("utf-8")).hexdigest()

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, its special tokens included."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def arrays(self, texts: Sequence[str]) -> Arrays:
        """The ids of texts as the arrays "ids" and "offsets", which `Ragged` reads."""
        ids, offsets = ragged(self(texts))
        return {"ids": ids, "offsets": offsets}


class Ragged:
    """Rows of ids in one array.

    Args:
        ids: (total,) of all rows.
        offsets: (rows + 1,) where each begins.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.ids, self.offsets = ids, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


def load_encoder(config: EncoderConfig, vocab_size: int) -> nn.Module:
    """The encoder of a configuration: the weights of its checkpoint, or its shape with fresh ones.

    Args:
        config: says which.
        vocab_size: of the tokenizer; for a shape that does not say it.

    Raises:
        ConfigError: there is no such checkpoint, or no such shape.
    """
    if config.checkpoint is None:
        return make_encoder(json.dumps({"vocab_size": vocab_size, **config.shape, **_dropouts(config)}))
    return from_checkpoint(config.checkpoint, "model.encoder.checkpoint", **_dropouts(config))


def from_checkpoint(name: str, key: str, **settings: Any) -> nn.Module:
    """The bare model of a checkpoint.

    Args:
        name: as of `place`.
        key: the setting that it comes from.
        settings: of the model, in place of the checkpoint's; those that such a model does not have are passed over.

    Raises:
        ConfigError: there is none; names the key.
    """
    from transformers import AutoConfig, AutoModel

    where = place(name, key)
    try:
        # float32 whatever the file holds: the optimizer's small steps need it; autocast multiplies in bf16.
        with _no_progress_bar():
            config = cast(Any, AutoConfig).from_pretrained(where)
            for setting, value in settings.items():
                if hasattr(config, setting):
                    setattr(config, setting, value)
            model = AutoModel.from_pretrained(where, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: no encoder from {name!r}: {_first_line(error)}") from None
    return cast(nn.Module, model)


def make_encoder(shape: str, key: str = "model.encoder.shape") -> nn.Module:
    """An encoder with fresh weights, of the JSON text that `shape_of` gives.

    Args:
        shape: the JSON text.
        key: the setting that it comes from.

    Raises:
        ConfigError: transformers knows no such model type, or not these settings; names the key.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel

    values, models = json.loads(shape), cast(Any, AutoModel)
    try:
        return cast(nn.Module, models.from_config(AutoConfig.for_model(values.pop("model_type"), **values)))
    except StrictDataclassError as error:
        raise ConfigError(f"{key}: {_first_line(error.__cause__ or error)}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from None


def shape_of(encoder: nn.Module) -> str:
    """The configuration of an encoder as JSON text: what a checkpoint keeps of it besides the weights."""
    return cast(str, cast(Any, encoder).config.to_json_string(use_diff=False))


def plain(config: RecipeConfig, task: Task) -> nn.Module:
    """The task's model with its encoder as transformers wrote it; the same weights.

    Args:
        config: of the recipe.
        task: of a recipe with a text encoder.
    """
    model = copy.deepcopy(task.model)
    fastseq.unpatch(model)
    return model


def _dropouts(config: EncoderConfig) -> dict[str, float]:
    """The dropouts inside the layers by the names that BERT and DeBERTa give them, and by DistilBERT's."""
    if config.dropout is None:
        return {}
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    return dict.fromkeys(names, config.dropout)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The recipes show their own."""
    from transformers.utils import logging

    settings = cast(Any, logging)  # parts of it have no annotations
    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ids padded with 0 to the longest, (B,S) int64, and the mask (B,S) of what exists."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int64)
    on = np.arange(ids.shape[1]) < lengths[:, None]
    ids[on] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(on.astype(np.int64))
