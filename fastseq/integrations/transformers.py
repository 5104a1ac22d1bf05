"""Hugging Face's encoders on real tokens only, and `attn_implementation="fastseq"`. transformers is imported when used.

`patch(model, packed=True)` gives BertModel, DistilBertModel and DebertaV2Model (version 3 too), wherever they are in
`model`, a forward pass that leaves padding out, from the embeddings to the last layer: hidden states are (1,total,H),
the rows of the batch one after another, and attention is told where each begins (`Plan`). The layers stay Hugging
Face's, with their hooks, dropout and gradient checkpointing; of them only self-attention is another. What callers get
has the usual shapes, with zeros at padding. Loss and gradients are those of the padded model to rounding; dropout draws
other numbers. A model for sequence classification reads the last layer at the first positions only, so this layer runs
on no other (unless layers are checkpointed). With `packed=False` padding runs along, and only attention changes.

A call that asks for what this has not (attentions, all hidden states, masks of pairs of positions, decoding) runs as
Hugging Face wrote it, with a warning that says why. So does one of DeBERTa with a mask that is not right padding.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.integrations import attention_interface as interface
from fastseq.integrations.packing import Plan

__all__ = [
    "Classifier",
    "DebertaEncoder",
    "Encoder",
    "prepare",
    "register",
    "why_not_encoder",
    "why_not_head",
]

Options = Mapping[str, Any]

TENSORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
"""The arguments of an encoder that its packed forward pass knows."""


# ---- what can be patched ---------------------------------------------------------------------------------------------


def why_not_encoder(model: Any, options: Options) -> str | None:
    """The reason to leave an encoder as it is, or None."""
    config, version = model.config, sys.modules["transformers"].__version__
    if int(version.split(".")[0]) < 5:
        return f"needs transformers 5, whose layers are other than those of {version}"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "is a decoder"
    if getattr(config, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward cuts positions into equal chunks"
    return "z_steps repeats its last layer" if getattr(model, "z_steps", 0) > 1 else None


def why_not_head(model: Any, options: Options) -> str | None:
    """The reason to leave a question answering model and all in it: its softmax is over padding too."""
    deberta = model.config.model_type == "deberta-v2"
    if not deberta and not options.get("packed", True):
        return None
    return "its loss reads the hidden states of padding, which are not computed" + ("" if deberta else " if packed")


def register() -> None:
    """Make `attn_implementation="fastseq"` known to transformers; `patch` calls it too.

    Any model whose attention goes through transformers' AttentionInterface can then be loaded with it, or be given it
    by `model.set_attn_implementation("fastseq")`, with the semantics of "sdpa". Beside those it returns attention
    weights if they are asked for, takes softcap and a position_bias with a gradient, and makes no (S,S) masks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("fastseq", interface.attention)
    AttentionMaskInterface.register("fastseq", interface.mask)


def prepare(model: Any, options: Options) -> None:
    """What `Encoder` expects beside what a base model has."""
    model.fastseq_packed = bool(options.get("packed", True))
    register()


# ---- the forward pass of an encoder ----------------------------------------------------------------------------------


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)  # type: ignore[attr-defined]


def _why_padded(model: Any, call: Mapping[str, Any]) -> str | None:
    """The reason why this call has to run as Hugging Face wrote it, or None."""
    for name in ("output_attentions", "output_hidden_states"):
        wanted = call.get(name)
        if getattr(model.config, name, False) if wanted is None else wanted:
            return f"{name} is set"
    known = (*TENSORS, "return_dict", "use_cache", "output_attentions", "output_hidden_states")
    other = [name for name, value in call.items() if name not in known and value is not None]
    if other:
        return f"{other[0]} was given"
    ids, embeds, mask = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
    given = ids if embeds is None else embeds
    if given is None or (ids is not None and embeds is not None):
        return "it needs either input_ids or inputs_embeds"
    if mask is not None and mask.shape != given.shape[:2]:
        return f"attention_mask has shape {tuple(mask.shape)}, not {tuple(given.shape[:2])}"
    return None


class Encoder(nn.Module):
    """Mixed into a base model of Hugging Face: its forward pass on what a `Plan` keeps."""

    fastseq_packed: bool
    needs_right_padding = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that it is mixed into."""
        bound = _signature(type(self).__bases__[1]).bind(self, *args, **kwargs).arguments
        call = {name: x for name, x in bound.items() if name not in ("self", "kwargs")} | bound.get("kwargs", {})
        reason = _why_padded(self, call)
        if reason is None:
            given = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
            plan = Plan((given.shape[0], given.shape[1]), call.get("attention_mask"), self.fastseq_packed)
            if plan.right_padded or not self.needs_right_padding:
                return self._run(plan, call)
            reason = "its relative positions need masks that are on from the first position to a last one"
        warnings.warn(f"fastseq: {type(self).__name__} runs as it was before patch: {reason}", stacklevel=2)
        return super().forward(*args, **kwargs)

    def _run(self, plan: Plan, call: Mapping[str, Any]) -> Any:
        """The output of the model, for tensors of the batch by their names in `call`."""
        inputs = {name: x for name, x in call.items() if name in TENSORS and x is not None}
        mask = inputs.pop("attention_mask", None)
        if plan.indices is not None and "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(plan.shape[1], device=plan.indices.device)[None]
        for name, x in inputs.items():
            inputs[name] = plan.pack(x.expand(*plan.shape, *x.shape[2:]))
        first_only = self.fastseq_packed and _first_only.get()
        hidden, plan = self._layers(plan, inputs, mask, first_only)
        hidden = plan.unpack(hidden) if plan.context is None else hidden.reshape(plan.shape[0], 1, hidden.shape[-1])
        from transformers import modeling_outputs as outputs

        model: Any = self
        output: Any = outputs.BaseModelOutput(last_hidden_state=hidden)
        if hasattr(model, "pooler"):
            pooled = None if model.pooler is None else model.pooler(hidden)
            output = outputs.BaseModelOutputWithPoolingAndCrossAttentions(hidden, pooled)
        wanted = call.get("return_dict")
        return output if (model.config.return_dict if wanted is None else wanted) else output.to_tuple()

    def _layers(
        self, plan: Plan, inputs: dict[str, Tensor], mask: Tensor | None, first_only: bool
    ) -> tuple[Tensor, Plan]:
        """The last layer's output, from what the embeddings take, and the plan that this layer had."""
        model: Any = self
        layers = (model.transformer if hasattr(model, "transformer") else model.encoder).layer
        hidden: Tensor = model.embeddings(**{"input_ids": None, **inputs})
        for layer in layers:
            if first_only and layer is layers[-1]:
                hidden, plan = plan.first(hidden), plan.reading(hidden)
            hidden = layer(hidden, plan)
        return hidden, plan


class DebertaEncoder(Encoder):
    """Mixed into DebertaV2Model."""

    needs_right_padding = True

    def _layers(
        self, plan: Plan, inputs: dict[str, Tensor], mask: Tensor | None, first_only: bool
    ) -> tuple[Tensor, Plan]:
        model: Any = self
        encoder, relative = model.encoder, model.encoder.get_rel_embedding()
        embedded: Tensor = model.embeddings(**inputs, mask=None if mask is None else plan.pack(mask))
        hidden = embedded
        for layer in encoder.layer:
            convolved = encoder.conv is not None and layer is encoder.layer[0]
            if first_only and layer is encoder.layer[-1] and not convolved:
                hidden, plan = plan.first(hidden), plan.reading(hidden)
            hidden = layer(hidden, plan, None, None, relative)[0]
            if convolved:  # with neighbours, which are others when packed
                on = torch.ones(plan.shape, device=hidden.device) if mask is None else mask
                hidden = plan.pack(encoder.conv(plan.unpack(embedded), plan.unpack(hidden), on))
        return hidden, plan


_first_only: ContextVar[bool] = ContextVar("first_only", default=False)


class Classifier(nn.Module):
    """Mixed into models that read the first position of the last layer, so that this layer runs on no other."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that it is mixed into."""
        again = [layer for layer in self.modules() if getattr(layer, "gradient_checkpointing", False)]
        if again or torch.compiler.is_compiling():  # a layer that is run again needs its inputs as arguments
            return super().forward(*args, **kwargs)
        token = _first_only.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _first_only.reset(token)
