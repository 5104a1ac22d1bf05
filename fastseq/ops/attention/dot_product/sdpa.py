"""Attention by the flash attention kernels that torch has inside, where they are this op exactly: an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product import kernels_of_others as others
from fastseq.ops.attention.dot_product.arguments import Arguments
from fastseq.reasons import no_cuda

__all__ = ["attention", "attention_grad", "limits", "limits_of_grad", "missing"]


def missing() -> str | None:
    """The reason that torch cannot run these kernels here, or None."""
    if (reason := no_cuda()) is not None:
        return reason
    return None if torch.backends.cuda.is_flash_attention_available() else "this torch has no flash attention inside"


def limits(*arguments: Any) -> str | None:
    """What the kernels lack."""
    return others.limits(Arguments(*arguments), softcap=False)


def limits_of_grad(grad_out: Any, grad_lse: Any, out: Any, lse: Any, *arguments: Any) -> str | None:
    """The same of the backward pass."""
    return others.limits_of_grad(grad_out, grad_lse) or limits(*arguments[:17])


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; see `fastseq.ops.attention.dot_product`."""
    args = Arguments(*arguments)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *others.inputs(args), *_sequences(args), 0.0, args.causal, False, **_window(args)
    )
    return others.from_theirs(out, lse, args)


def attention_grad(grad_out: Tensor, grad_lse: None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients to q, k and v; see `fastseq.ops.attention.dot_product`."""
    args = Arguments(*arguments[:17])
    grad_out, out, lse = others.to_theirs(grad_out, out, lse, args)
    random = torch.empty(2, dtype=torch.uint64, device=out.device), torch.empty(0, device=out.device)  # that of dropout
    inputs = (grad_out, *others.inputs(args), out, lse, *_sequences(args))
    grads = torch.ops.aten._flash_attention_backward(*inputs, 0.0, args.causal, *random, **_window(args))
    return others.grads_from_theirs(grads, args)


def _sequences(args: Arguments) -> tuple[Any, ...]:
    return args.cu_seqlens_q, args.cu_seqlens_k, args.max_q, args.max_k


def _window(args: Arguments) -> dict[str, Any]:
    return {"scale": args.scale, "window_size_left": args.window_left, "window_size_right": others.right(args)}
