"""What the derivatives of all op families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["is_one", "pull_back"]


def is_one(grad: Tensor) -> bool:
    """Whether `grad` is known to be 1, without waiting for a device or a tracer: then nothing is multiplied."""
    return type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1.0


def pull_back(
    differentiable: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of <grad, differentiable(*inputs)>, one an input, None for those that have none.

    The function is run again here, so nothing of it was kept. In grad mode the result can itself be
    differentiated; otherwise inputs are cut off from their history first, and the graph is gone when this
    returns.
    """
    again = torch.is_grad_enabled()
    floats = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]
    leaves = list(inputs)
    for i in floats:
        tensor = leaves[i]
        assert tensor is not None
        # A view: an input may depend on another input, and that path is the caller's, not ours.
        leaves[i] = tensor.view_as(tensor) if again and tensor.requires_grad else tensor.detach().requires_grad_()
    with torch.enable_grad():
        output = differentiable(*leaves)
        if not output.requires_grad:  # it depends on none of them, such as a sum over no rows
            return (None,) * len(leaves)
        wanted = [leaf for i in floats if (leaf := leaves[i]) is not None]
        found = torch.autograd.grad(output, wanted, grad, create_graph=again, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(leaves)
    for i, gradient in zip(floats, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
