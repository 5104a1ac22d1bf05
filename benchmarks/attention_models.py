"""The encoders of the attention benchmarks: as transformers runs them on padded texts, and packed.

Lengths are lognormal with the shape's mean, at most its maximum, to which the batch is padded. A step is the loss of a
classifier of two classes, its gradients, and AdamW; dropout is 0.1, and off where results are checked. "Hugging Face"
is transformers' model with its own attention of plain torch, "sdpa" its faster one, both with AdamW as torch makes it
by default; fastseq's have `patch(model, packed=True)`, the fused AdamW and `host.keep_memory()`; "bf16" is autocast.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq import host
from fastseq_benchmarks.attention_truth import BUCKETS, MAX_POSITION, DisentangledInputs
from fastseq_benchmarks.runner import Rival, Shape

__all__ = [
    "GOALS",
    "LETTERS",
    "SHAPES",
    "ModelInputs",
    "disentangled_core",
    "loss_and_gradients",
    "make_inputs",
    "no_transformers",
    "relative_norm",
    "rivals",
]

LETTERS = "B,S,mean"
SHAPES: dict[str, list[Shape]] = {"distilbert": [(8, 128, 40)], "bert": [(8, 512, 40)], "deberta": [(8, 128, 40)]}
PACKED = "fastseq packed"
HALF = PACKED + " bf16"
DISTILBERT = "fastseq packed bf16 DistilBERT"
GOALS = {"distilbert": {HALF: 8.0}, "bert": {DISTILBERT: 60.0}, "deberta": {PACKED: 3.0}}
TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-2
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
    """A name of `CONFIGS`, its first weights, and a batch."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]


def make_model(name: str, seed: int, **options: Any) -> nn.Module:
    """A classifier with random weights."""
    transformers = importlib.import_module("transformers")
    prefix, settings = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{prefix}Config")(**settings, **options)
        model: nn.Module = getattr(transformers, f"{prefix}ForSequenceClassification")(config)
    return model.train()


def make_inputs(name: str, shape: Shape, device: str, seed: int) -> ModelInputs:
    """B, S, mean: ragged texts of random words."""
    B, S, mean = shape
    g = torch.Generator().manual_seed(seed)
    lengths = (mean * torch.exp(0.6 * torch.randn(B, generator=g) - 0.18)).round().long().clamp(4, S)
    mask = (torch.arange(S) < lengths[:, None]).long()
    ids = torch.randint(1000, VOCABULARY, (B, S), generator=g) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (B,), generator=g)}
    model = make_model(name, seed, attn_implementation="eager").to(device)
    return ModelInputs(name, model, {key: value.to(device) for key, value in batch.items()})


def training_step(
    model: nn.Module, batch: dict[str, Tensor], half: bool = False, **adam: Any
) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    """(a step, its update included; a call that gives loss and gradients, without dropout)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **adam)
    device = batch["labels"].device.type

    def backward() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss: Tensor = model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step() -> Tensor:
        loss = backward()
        optimizer.step()
        return loss

    def named() -> dict[str, Tensor]:
        with _evaluated(model):
            loss = backward().detach().clone()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss} | grads

    return step, named


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def rivals(inputs: ModelInputs) -> list[Rival]:
    """Transformers' ways, and fastseq's."""
    model, batch = inputs.model, inputs.batch
    faster = _with_sdpa(copy.deepcopy(model))
    packed, half = copy.deepcopy(model), copy.deepcopy(model)
    for each in (packed, half):
        fastseq.patch(each, packed=True)
    found = [
        Rival("Hugging Face", *training_step(copy.deepcopy(model), batch)),
        Rival("Hugging Face sdpa", *training_step(faster, batch)),
        _packed(PACKED, packed, batch),
        _packed(HALF, half, batch, half=True),
    ]
    if inputs.name == "deberta":
        del found[1]
    if inputs.name == "bert":
        small = make_model("distilbert", 0).to(batch["labels"].device)
        fastseq.patch(small, packed=True)
        # Another model: there is nothing to compare its result with.
        other = functools.partial(loss_and_gradients, inputs)
        found.append(dataclasses.replace(_packed(DISTILBERT, small, batch, half=True), result=other))
    return found


def _packed(name: str, model: nn.Module, batch: dict[str, Tensor], half: bool = False) -> Rival:
    step, named = training_step(model, batch, half=half, fused=True)
    context = functools.partial(_keeping_memory, named)  # which updates no weights
    return Rival(name, step, named, context, HALF_TOLERANCE if half else None)


@contextlib.contextmanager
def _keeping_memory(call: Callable[[], Any]) -> Iterator[None]:
    """`host.keep_memory()`, with memory to keep; then what the C library itself ends up with as blocks are freed."""
    kept = host.keep_memory()
    try:
        call()
        yield
    finally:
        if kept:
            trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            libc = ctypes.CDLL(None)
            libc.mallopt(mmap_threshold, 2**25)
            libc.mallopt(trim_threshold, 2**26)
            libc.malloc_trim(0)


def loss_and_gradients(inputs: ModelInputs) -> dict[str, Tensor]:
    """Transformers' model in float64, without dropout."""
    return training_step(_with_sdpa(copy.deepcopy(inputs.model)).double(), inputs.batch)[1]()


def _with_sdpa(model: nn.Module) -> nn.Module:
    with contextlib.suppress(ValueError):  # DeBERTa has one way only
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


def relative_norm(result: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The error of all gradients together, relative to their norm: some, of biases of keys, are 0 but for rounding."""
    total = math.sqrt(sum(float(t.double().square().sum()) for t in truth.values()))
    error = math.sqrt(sum(float((result[n].double() - t).square().sum()) for n, t in truth.items()))
    return error / total


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
