"""Attention in Triton, for CUDA devices from sm_80 on: float32, bfloat16 and float16, and head sizes up to 256.

One kernel forward, three backward, and one more for a gradient of the bias; see `triton_kernels`, `triton_gradients`
and `triton_bias`. Scratch: 4 bytes a query and head, and for a bias that is broadcast up to 64 partial sums of it in
float32. float32 products are three TF32 products, as exact as float32 and on an H100 four times as fast as its own
units, or one where torch allows TF32. Older GPUs (sm_75) have no tensor cores that Triton uses: torch's own attention
or `eager` is for them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq.ops.attention.triton_call import Call

__all__ = ["attention", "attention_grad"]


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """The output (B,Sq,Hq,D) and lse (B,Hq,Sq); see `fastseq.ops.attention.dot_product`."""
    return Call(args).forward()


def attention_grad(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the bias; see `fastseq.ops.attention.dot_product`."""
    *inputs, bias_grad = args
    return Call(tuple(inputs)).backward(grad_out, grad_lse, out, lse, bias_grad)
