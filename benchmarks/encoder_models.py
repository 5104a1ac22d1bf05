"""The encoders of the benchmarks of models: as transformers runs them on padded texts, and packed.

Lengths are lognormal with the shape's mean, at most its maximum, to which the batch is padded. A step is the loss of a
classifier of two classes, or of a regressor on the text and a table's row, its gradients, and AdamW; dropout is on, and
off where results are checked. "Hugging Face" is transformers' model with its own attention of plain torch, "sdpa" its
faster one, both with AdamW as torch makes it by default; fastseq's have `patch(model, packed=True)`, the fused AdamW
and `host.keep_memory()`; "bf16" is autocast.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.models import TextRegressor
from fastseq_benchmarks.attention_truth import BUCKETS, MAX_POSITION, DisentangledInputs
from fastseq_benchmarks.common import HALF
from fastseq_benchmarks.runner import Rival, Shape
from fastseq_benchmarks.training import fused_rival, training_step

__all__ = [
    "DISTILBERT",
    "ModelInputs",
    "disentangled_core",
    "loss_and_gradients",
    "make_inputs",
    "make_regressor_inputs",
    "no_transformers",
    "regressor_loss_and_gradients",
    "rivals",
]

DISTILBERT = "fastseq" + HALF + " DistilBERT"
NUMERIC, CATEGORIES = 8, 50
VOCABULARY = 30_522

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "distilbert": ("DistilBert", {}),
    "bert": ("Bert", {}),
    "deberta": (
        "DebertaV2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "relative_attention": True,
            "position_buckets": BUCKETS,
            "max_relative_positions": MAX_POSITION,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "norm_rel_ebd": "layer_norm",
            "pooler_hidden_size": 768,
        },
    ),
}
"""transformers' class, and what differs from its configuration's defaults: DeBERTa is v3-base with half its layers."""


def no_transformers() -> str:
    """Why the models cannot be made, or nothing."""
    return "" if importlib.util.find_spec("transformers") else "not installed: pip install 'fastseq-kernels[recipes]'"


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A name of `CONFIGS`, the first weights of a model with that encoder, and a batch."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]


def make_model(name: str, seed: int, head: str = "ForSequenceClassification", **options: Any) -> nn.Module:
    """A model with random weights: a classifier, or what another `head` says."""
    transformers = importlib.import_module("transformers")
    prefix, settings = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{prefix}Config")(**settings, **options)
        model: nn.Module = getattr(transformers, prefix + head)(config)
    return model.train()


def _texts(shape: Shape, g: torch.Generator) -> dict[str, Tensor]:
    """B, S, mean: ragged texts of random words."""
    B, S, mean = shape
    lengths = (mean * torch.exp(0.6 * torch.randn(B, generator=g) - 0.18)).round().long().clamp(4, S)
    mask = (torch.arange(S) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1000, VOCABULARY, (B, S), generator=g) * mask, "attention_mask": mask}


def make_inputs(name: str, shape: Shape, dtype: torch.dtype, device: str, seed: int) -> ModelInputs:
    """A classifier of two classes."""
    g = torch.Generator().manual_seed(seed)
    batch = _texts(shape, g) | {"labels": torch.randint(2, shape[:1], generator=g)}
    model = make_model(name, seed, attn_implementation="eager").to(device, dtype)
    return ModelInputs(name, model, {key: value.to(device) for key, value in batch.items()})


def make_regressor_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> ModelInputs:
    """DeBERTa, numeric columns and a categorical one."""
    g = torch.Generator().manual_seed(seed)
    B = shape[0]
    batch = _texts(shape, g) | {
        "numeric": torch.randn(B, NUMERIC, generator=g),
        "categories": torch.randint(CATEGORIES, (B, 1), generator=g),
        "bag_ids": torch.zeros(0, dtype=torch.int64),
        "bag_offsets": torch.zeros(1, dtype=torch.int64),
        "targets": torch.randn(B, generator=g),
    }
    encoder = make_model("deberta", seed, "Model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TextRegressor(encoder, numeric=NUMERIC, category_sizes=(CATEGORIES,), packed=False)
    return ModelInputs("deberta", model.to(device, dtype), {key: value.to(device) for key, value in batch.items()})


def rivals(inputs: ModelInputs) -> list[Rival]:
    """Transformers' ways, and fastseq's."""
    model, batch = inputs.model, inputs.batch
    packed, half = copy.deepcopy(model), copy.deepcopy(model)
    for each in (packed, half):
        fastseq.patch(each, packed=True)
    found = [Rival("Hugging Face", *training_step(copy.deepcopy(model), batch))]
    if inputs.name != "deberta":
        found.append(Rival("Hugging Face sdpa", *training_step(_with_sdpa(copy.deepcopy(model)), batch)))
    found += [fused_rival("fastseq", packed, batch), fused_rival("fastseq", half, batch, half=True)]
    if inputs.name == "bert":
        small = make_model("distilbert", 0).to(batch["labels"].device)
        fastseq.patch(small, packed=True)
        # Another model: there is nothing to compare its result with.
        other = functools.partial(loss_and_gradients, inputs)
        found.append(
            dataclasses.replace(fused_rival("fastseq", small, batch, half=True), name=DISTILBERT, result=other)
        )
    return found


def loss_and_gradients(inputs: ModelInputs) -> dict[str, Tensor]:
    """Transformers' model in float64, without dropout."""
    return training_step(_with_sdpa(copy.deepcopy(inputs.model)).double(), inputs.batch)[1]()


def _with_sdpa(model: nn.Module) -> nn.Module:
    with contextlib.suppress(ValueError):  # DeBERTa has one way only
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


class _Regressor(nn.Module):
    """What a TextRegressor computes, in plain torch and one precision; its parameters have the same names."""

    def __init__(self, like: TextRegressor) -> None:
        super().__init__()
        self.text, self.categories, self.output = like.text, like.categories, like.output

    def forward(self, **batch: Tensor) -> Tensor:
        texts: Any = self.text
        mask = batch["attention_mask"]
        states = texts.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        text = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        columns = torch.cat([batch["numeric"], text, self.categories[0](batch["categories"][:, 0])], 1)
        predicted, target = self.output(columns)[:, 0].exp(), batch["targets"].exp()
        return ((predicted - target).abs() / ((predicted + target) / 2)).mean()


def regressor_loss_and_gradients(inputs: ModelInputs) -> dict[str, Tensor]:
    """The regressor's definition in float64, without dropout."""
    model = copy.deepcopy(inputs.model)
    assert isinstance(model, TextRegressor)
    batch = {name: x.double() if x.is_floating_point() else x for name, x in inputs.batch.items()}
    return training_step(_Regressor(model).double(), batch)[1]()


class _Given(nn.Module):
    """Hands on one tensor for the texts and another for the positions, as a projection would."""

    def __init__(self, leaf: Tensor) -> None:
        super().__init__()
        self.given = leaf

    def forward(self, _: Tensor) -> Tensor:
        return self.given


def disentangled_core(inputs: DisentangledInputs) -> Callable[[dict[str, Tensor], float], Tensor]:
    """Transformers' DisentangledSelfAttention between its projections: `call(leaves, dropout) -> (B,S,H,D)`."""
    modeling = importlib.import_module("transformers.models.deberta_v2.modeling_deberta_v2")
    transformers = importlib.import_module("transformers")
    B, S, H, D = inputs.q.shape
    settings = CONFIGS["deberta"][1] | {"hidden_size": H * D, "num_attention_heads": H, "share_att_key": False}
    module = modeling.DisentangledSelfAttention(transformers.DebertaV2Config(**settings)).to(inputs.q)
    module.pos_dropout = nn.Identity()
    names = {"q": "query_proj", "k": "key_proj", "v": "value_proj", "pos_key": "pos_key_proj"}
    names["pos_query"] = "pos_query_proj"
    on = torch.arange(S, device=inputs.q.device) < inputs.lengths[:, None]
    mask = (on[:, None, :, None] & on[:, None, None, :]).to(torch.uint8)
    positions = inputs.q.new_zeros(2 * BUCKETS, H * D)
    for name in names.values():
        setattr(module, name, _Given(positions))

    def call(leaves: dict[str, Tensor], dropout: float) -> Tensor:
        for leaf, name in names.items():
            flat = leaves[leaf].flatten(-2)
            getattr(module, name).given = flat if flat.dim() == 3 else flat[None]
        module.dropout.p = dropout
        hidden = leaves["q"].flatten(-2)
        out = module(hidden, mask, rel_embeddings=positions)
        return (out[0] if isinstance(out, tuple) else out).view(B, S, H, D)

    return call
