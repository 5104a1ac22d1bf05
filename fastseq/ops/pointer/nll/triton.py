"""The loss in Triton, for CUDA devices: the vocabulary's linear layer, its softmax and the copying, fused.

nll is two kernels, scores and rows; nll_grad four, and three sums by torch: of the values, and of the parts of the
hidden states' gradient. Nothing here waits for the device or asks it for a size: all can be captured in a CUDA graph.
Scratch: 8 P N bytes for the softmax and 4 P N H for the hidden states' gradient, where P is at most 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from fastseq.ops.pointer.nll import triton_kernels

__all__ = ["COMPILE", "nll", "nll_grad", "options", "products"]

COMPILE: dict[str, Any] = {"enable_fp_fusion": True, "num_stages": 1}
PROGRAMS = 264  # two for each multiprocessor of the largest GPUs
INTERPRETED = triton.knobs.runtime.interpret


def options(kernel: str, H: int, half: bool) -> dict[str, int]:
    """The compile-time sizes and the warps of a kernel: those with which none spills on any architecture."""
    if kernel == "rows":
        return {"BS": 128, "num_warps": 4}
    width = max(16, triton.next_power_of_2(H))
    sizes = {"BN": 64, "BV": 64, "BK": min(width, 64 if half else 32), "num_warps": 8 if half else 4}
    if kernel != "scores":
        sizes |= {"BG": min(width, 256 if half else 128), "num_warps": 8}
        if not half:
            sizes |= {"BN": 32, "BV": 64} if kernel == "weight_gradient" else {"BN": 64, "BV": 32}
    return sizes


def products(hidden: Tensor) -> dict[str, str]:
    """The type of the matrix products, that of the hidden states; float32 by three TF32 products, or one if allowed."""
    kind = {torch.bfloat16: "emulated" if INTERPRETED else "bfloat16", torch.float16: "float16"}.get(hidden.dtype, "")
    tf32 = hidden.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRODUCTS": kind or "float32", "PRECISION": "tf32" if tf32 else "tf32x3"}


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch on the current stream of the current device."""
    kernel[grid](*args, **COMPILE, **constants)


def _bits(tensor: Tensor | None) -> Tensor | None:
    """What a kernel gets for it: dense, and bfloat16 by its bits."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class _Call:
    """The arguments of a call as the kernels take them, and the first two kernels."""

    def __init__(self, args: tuple[Any, ...], weights: Tensor | None, gradient: bool) -> None:
        hidden, weight, bias, copy, gate, source_ids, target_ids, self.ignore_index, _, self.z_loss = args
        self.B, self.T, self.H = hidden.shape
        self.N, self.V, self.S = self.B * self.T, weight.shape[0], source_ids.shape[1]
        self.matrices = _bits(hidden), _bits(weight), _bits(bias)
        self.targets = target_ids.contiguous()
        self.copying = copy.contiguous(), None if gate is None else gate.contiguous(), source_ids.contiguous()
        self.weights = None if weights is None else weights.contiguous()
        self.products = products(hidden)
        self.half = hidden.dtype != torch.float32
        row_blocks = triton.cdiv(self.N, 64)
        self.parts = max(1, min(16, triton.cdiv(self.V, 64), PROGRAMS // max(row_blocks, 1)))
        empty = copy.new_empty
        self.values: Tensor = empty(self.B, self.T)
        self.lses, self.alphas, self.betas = empty(3, self.N).unbind(0)
        self.grad_copy = torch.empty_like(copy, memory_format=torch.contiguous_format) if gradient else None
        self.grad_gate = None if gate is None else empty(gate.shape)

    def options(self, kernel: str) -> dict[str, int]:
        """See `options`."""
        return options(kernel, self.H, self.half)

    def run(self) -> None:
        """The values, and with gradients all that a row needs for them."""
        maxima, sums = self.values.new_empty(2, self.parts, self.N).unbind(0)
        chosen = self.values.new_empty(self.N)
        sizes = self.N, self.V, self.H, self.parts
        blocks = self.options("scores")
        _launch(
            triton_kernels.scores, (triton.cdiv(self.N, blocks["BN"]), self.parts), *self.matrices, self.targets,
            maxima, sums, chosen, *sizes, **self.products, **blocks
        )  # fmt: skip
        copy, gate, source_ids = self.copying
        _launch(
            triton_kernels.rows, (self.N,), copy, gate, source_ids, self.targets, self.weights, maxima, sums, chosen,
            self.values, self.lses, self.alphas, self.betas, self.grad_copy, self.grad_gate, self.ignore_index,
            self.z_loss, self.N, self.V, self.S, self.T, self.parts, PROBABILITIES=gate is not None,
            BP=triton.next_power_of_2(self.parts), **self.options("rows")
        )  # fmt: skip


def nll(*args: Any) -> Tensor:
    """The value of each target, (B,T); see `fastseq.ops.pointer.nll`."""
    call = _Call(args, None, gradient=False)
    if not call.N:
        return call.values
    with torch.cuda.device_of(args[0]):
        call.run()
    return call.values


def nll_grad(*args: Any) -> tuple[Tensor, ...]:
    """The weighted sum and its gradients; see `fastseq.ops.pointer.nll`."""
    *inputs, weights = args
    hidden, weight, bias, copy = inputs[:4]
    call = _Call(tuple(inputs), weights, gradient=True)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = copy.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    grad_gate = copy.new_empty(0) if call.grad_gate is None else call.grad_gate
    if not call.N:
        return (
            copy.new_zeros(()), torch.zeros_like(hidden), grad_weight.zero_(), grad_bias.zero_(), call.grad_copy,
            grad_gate,
        )  # type: ignore[return-value]  # fmt: skip
    with torch.cuda.device_of(hidden):
        call.run()
        slopes = call.targets, call.lses, call.alphas, call.betas
        partial = call.values.new_empty(call.parts, *hidden.shape)
        sizes = call.options("hidden_gradient")
        grid = triton.cdiv(call.N, sizes["BN"]), call.parts, triton.cdiv(call.H, sizes["BG"])
        _launch(
            triton_kernels.hidden_gradient, grid, *call.matrices, *slopes, partial, call.N, call.V, call.H, call.parts,
            **call.products, **sizes
        )  # fmt: skip
        sizes = call.options("weight_gradient")
        grid_w = triton.cdiv(call.V, sizes["BV"]), triton.cdiv(call.H, sizes["BG"])
        _launch(
            triton_kernels.weight_gradient, grid_w, *call.matrices, *slopes, _bits(grad_weight),
            _bits(grad_bias) if bias is not None else None, call.N, call.V, call.H, **call.products, **sizes
        )  # fmt: skip
        total = _weighted_sum(call.values, weights)
        grad_hidden = partial.sum(0).to(hidden.dtype)
    return total, grad_hidden, grad_weight, grad_bias, call.grad_copy, grad_gate  # type: ignore[return-value]


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of weights times values; the kernel has made the values of weight 0 zeros."""
    return values.sum() if weights is None else (values * weights).sum()
