"""Weights of atulkum/pointer_summarizer, the widely used PyTorch pointer-generator, for fastseq's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastseq.nn import PointerGeneratorDecoder

__all__ = ["load"]

NAMES = {
    "x_context.weight": "decoder.x_context.weight",
    "x_context.bias": "decoder.x_context.bias",
    "lstm.weight_ih": "decoder.lstm.weight_ih_l0",
    "lstm.weight_hh": "decoder.lstm.weight_hh_l0",
    "lstm.bias_ih": "decoder.lstm.bias_ih_l0",
    "lstm.bias_hh": "decoder.lstm.bias_hh_l0",
    "memory_projection.weight": "encoder.W_h.weight",
    "query.weight": "decoder.attention_network.decode_proj.weight",
    "query.bias": "decoder.attention_network.decode_proj.bias",
    "coverage_weight": "decoder.attention_network.W_c.weight",
    "score": "decoder.attention_network.v.weight",
    "gate.weight": "decoder.p_gen_linear.weight",
    "gate.bias": "decoder.p_gen_linear.bias",
    "combine.weight": "decoder.out1.weight",
    "combine.bias": "decoder.out1.bias",
    "output.weight": "decoder.out2.weight",
    "output.bias": "decoder.out2.bias",
    "embedding.weight": "decoder.embedding.weight",
}
"""A parameter of `PointerGeneratorDecoder`: the one that it is in atulkum's model."""

VECTORS = ("coverage_weight", "score")  # the only row or column of a matrix there
MODULES = ("decoder", "encoder")


def load(decoder: PointerGeneratorDecoder, state_dict: Mapping[str, Any]) -> list[str]:
    """Copy the weights of atulkum/pointer_summarizer into `decoder`, all of them or, after an error, none.

    Its embedding is one module with its decoder; here there is one if `decoder` was given one, else the embedding is
    left out. Likewise its layer of coverage where `decoder` has `coverage=False`.

    Args:
        decoder: Where to; it keeps its dtype and device.
        state_dict: The nested dict of its checkpoints, {"encoder_state_dict": ..., "decoder_state_dict": ...}; or one
            dict of tensors, with or without "encoder." and "decoder." before their names.

    Returns:
        The names of the tensors that were not needed, sorted: the encoder's LSTM, and so on.

    Raises:
        KeyError: A tensor is missing.
        ValueError: A tensor has another shape.
        TypeError: `decoder` is no `PointerGeneratorDecoder`, or `state_dict` no such dict.

    Source: github.com/atulkum/pointer_summarizer, training_ptr_gen/model.py.
    """
    if not isinstance(decoder, PointerGeneratorDecoder):
        raise TypeError(f"decoder: got {type(decoder).__name__}, wanted a PointerGeneratorDecoder")
    theirs = _flat(state_dict)
    found = {ours: _find(theirs, NAMES[ours]) for ours, _ in decoder.named_parameters()}
    missing = [NAMES[ours] for ours, name in found.items() if name is None]
    if missing:
        hint = "; a model without coverage is for coverage=False" if NAMES["coverage_weight"] in missing else ""
        raise KeyError(f"state_dict: lacks {', '.join(missing)}{hint}")
    parameters = dict(decoder.named_parameters())
    tensors = {ours: _shaped(ours, name, theirs[name], parameters[ours]) for ours, name in found.items() if name}
    with torch.no_grad():
        for ours, parameter in parameters.items():
            parameter.copy_(tensors[ours])
    return sorted(theirs.keys() - set(found.values()))


def _flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """One dict of tensors; those of a checkpoint get their module's name in front."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, wanted a dict of tensors")
    nested = [name for name in MODULES if isinstance(state_dict.get(f"{name}_state_dict"), Mapping)]
    if not nested:
        return dict(state_dict)
    return {f"{name}.{key}": x for name in nested for key, x in state_dict[f"{name}_state_dict"].items()}


def _find(theirs: Mapping[str, Any], name: str) -> str | None:
    """The name as it is in `theirs`, with or without the module in front."""
    return next((known for known in (name, name.partition(".")[2]) if known in theirs), None)


def _shaped(ours: str, name: str, tensor: Any, parameter: Tensor) -> Tensor:
    """Their tensor in our shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict: {name} is a {type(tensor).__name__}, wanted a tensor")
    vector = ours in VECTORS and tensor.dim() == 2 and 1 in tensor.shape
    shaped: Tensor = tensor.flatten() if vector else tensor
    if shaped.shape != parameter.shape:
        got, wanted = tuple(shaped.shape), tuple(parameter.shape)
        raise ValueError(f"state_dict: {name} has shape {got}, wanted {wanted} for {ours} of this decoder")
    return shaped
