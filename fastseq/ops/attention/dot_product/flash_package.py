"""Attention by the flash_attn package, where it is installed: an adapter of its kernels' own functions."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product import kernels_of_others as others
from fastseq.ops.attention.dot_product.arguments import Arguments
from fastseq.reasons import no_cuda

__all__ = ["attention", "attention_grad", "limits", "limits_of_grad", "missing"]

OLDEST = (2, 7)  # since then a window is two arguments, and the forward pass returns four tensors


@functools.cache
def missing() -> str | None:
    """The reason that the package cannot run here, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return "what is installed as flash_attn is no package with a version"
    if _numbers(version) < OLDEST:
        return f"needs flash_attn {'.'.join(map(str, OLDEST))} or later, {version} is installed"
    return no_cuda()


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version; what comes after digits in them is left out."""
    parts = (*version.split("."), "0")[:2]
    return tuple(int("".join(itertools.takewhile(str.isdigit, part)) or 0) for part in parts)


def limits(*arguments: Any) -> str | None:
    """What the kernels lack."""
    return others.limits(Arguments(*arguments), softcap=True)


def limits_of_grad(grad_out: Any, grad_lse: Any, out: Any, lse: Any, *arguments: Any) -> str | None:
    """The same of the backward pass."""
    return others.limits_of_grad(grad_out, grad_lse) or limits(*arguments[:17])


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; see `fastseq.ops.attention.dot_product`."""
    from flash_attn import flash_attn_interface as package

    args = Arguments(*arguments)
    if args.cu_seqlens_q is None:
        out, lse, *_ = package._flash_attn_forward(*others.inputs(args), **_options(args), return_softmax=False)
    else:
        out, lse, *_ = package._flash_attn_varlen_forward(*others.inputs(args), **_sequences(args), **_options(args))
    return others.from_theirs(out, lse, args)


def attention_grad(grad_out: Tensor, grad_lse: None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients to q, k and v; see `fastseq.ops.attention.dot_product`."""
    from flash_attn import flash_attn_interface as package

    args = Arguments(*arguments[:17])
    grad_out, out, lse = others.to_theirs(grad_out, out, lse, args)
    inputs = others.inputs(args)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    given = grad_out, *inputs, out, lse, *grads
    deterministic = torch.are_deterministic_algorithms_enabled()
    if args.cu_seqlens_q is None:
        package._flash_attn_backward(*given, **_options(args), deterministic=deterministic)
    else:
        package._flash_attn_varlen_backward(*given, **_sequences(args), **_options(args), deterministic=deterministic)
    return others.grads_from_theirs(grads, args)


def _sequences(args: Arguments) -> dict[str, Any]:
    return {
        "cu_seqlens_q": args.cu_seqlens_q,
        "cu_seqlens_k": args.cu_seqlens_k,
        "max_seqlen_q": args.max_q,
        "max_seqlen_k": args.max_k,
    }


def _options(args: Arguments) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": args.scale,
        "causal": args.causal,
        "window_size_left": args.window_left,
        "window_size_right": others.right(args),
        "softcap": args.softcap,
        "alibi_slopes": None,
    }
