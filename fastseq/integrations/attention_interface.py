"""What transformers calls for `attn_implementation="fastseq"`; see `fastseq.integrations.transformers.register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import functional

__all__ = ["attention", "mask"]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What `attention` gets: bool, on where it looks, broadcastable to (B,1,queries,keys); or None."""
    from transformers import masking_utils

    if mask_function is masking_utils.bidirectional_mask_function:
        padding: Tensor | None = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            return padding[:, None, None, kv_offset : kv_offset + kv_length]
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    made: Tensor | None = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )
    return made


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: query (B,H,Sq,D), key and value (B,Hk,Sk,D); gives (B,Sq,H,D)."""
    if kwargs.get("s_aux") is not None:
        raise ValueError("s_aux: got attention sinks, which fastseq has not; wanted None")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    if causal and key.shape[2] > query.shape[2]:  # a cache that is not full yet: what is after the queries is not there
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    lengths, bias = _lengths_or_bias(attention_mask, query.dtype)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    found = functional.attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attn_bias=bias,
        key_lengths=lengths,
        causal=causal,
        softcap=softcap or 0.0,
        softmax_scale=scaling,
        dropout_p=dropout,
        return_attn_weights=bool(kwargs.get("output_attentions")),
    )
    return found if isinstance(found, tuple) else (found, None)


def _lengths_or_bias(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """How many keys there are, where the mask is right padding and to look does not wait for a device; or a bias."""
    if mask is None or mask.dtype != torch.bool:
        return None, mask
    rows = mask[:, 0, 0]
    if mask.shape[1:3] == (1, 1) and mask.device.type == "cpu" and not (rows[:, 1:] & ~rows[:, :-1]).any():
        return rows.sum(1, dtype=torch.int32), None
    return None, torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
