"""A linear layer of tensors that lie beside each other, without the copy that puts them there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_of_parts"]


def linear_of_parts(weight: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
    """Compute `torch.nn.functional.linear(torch.cat(parts, -1), weight, bias)`; keeps the parts for backward, no copy.

    All are of one dtype, which is that of the products, also under autocast.

    Args:
        weight: (O, sum of the parts' sizes).
        bias: (O,).
        parts: (..., size) each, with the same leading dimensions.

    Returns:
        (..., O).
    """
    rows = [part.flatten(0, -2) for part in parts]
    with torch.autocast(weight.device.type, enabled=False):
        out: Tensor = _LinearOfParts.apply(weight, bias, *rows)  # type: ignore[no-untyped-call]
    return out.view(*parts[0].shape[:-1], weight.shape[0])


class _LinearOfParts(torch.autograd.Function):
    """One product a part forward; backward one a part for the weight, and one for all parts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
        out = bias
        for part, w in zip(parts, weight.split([part.shape[1] for part in parts], 1), strict=True):
            out = torch.addmm(out, part, w.t())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight, _, *parts = inputs
        ctx.save_for_backward(weight, *parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, *parts = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            columns = grad.t()
            d_weight = torch.cat([columns @ part for part in parts], 1)
            d_parts = (grad @ weight).split([part.shape[1] for part in parts], 1)
        return d_weight, grad.sum(0), *d_parts
