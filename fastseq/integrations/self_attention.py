"""Self-attention of Hugging Face's encoders, as told by a `Plan`; see `fastseq.integrations.transformers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq.integrations.packing import Plan

__all__ = ["BertAttention", "DebertaAttention", "DistilBertAttention"]


def _heads(plan: Plan, count: int, projected: Mapping[Callable[[Tensor], Tensor], Tensor]) -> list[Tensor]:
    """Projections of hidden states, (positions,H,D) or (B,S,H,D)."""
    return [(f(x) if plan.indices is None else f(x)[0]).unflatten(-1, (count, -1)) for f, x in projected.items()]


def _lowered(x: Tensor) -> Tensor:
    """As autocast would convert it, once for all of the layers that take it."""
    device = x.device.type
    lower = torch.is_autocast_enabled(device) and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype(device)) if lower else x


def _attend(x: Tensor, plan: Plan, layers: tuple[Any, Any, Any], heads: int, scale: float, dropout: float) -> Tensor:
    """(1,positions,H*D) or (B,S,H*D), from the layers that project x, or what a plan has beside it."""
    x = _lowered(x)
    context = x if plan.context is None else _lowered(plan.context)
    q, k, v = _heads(plan, heads, dict(zip(layers, (x, context, context), strict=True)))
    cu, longest = plan.cu_seqlens, None if plan.indices is None else plan.longest
    one = cu is not None and plan.context is not None
    out = functional.attention(
        q,
        k,
        v,
        attn_bias=plan.bias(q.dtype),
        key_lengths=plan.key_lengths,
        cu_seqlens_q=torch.arange(len(cu), dtype=torch.int32, device=cu.device) if one and cu is not None else cu,
        cu_seqlens_k=cu,
        max_seqlen_q=1 if one else longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        dropout_p=dropout,
    )
    return _joined(out, plan)


def _joined(out: Tensor, plan: Plan) -> Tensor:
    return out.flatten(-2) if plan.indices is None else out.flatten(-2)[None]


class BertAttention(nn.Module):
    """Mixed into BertSelfAttention."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the class that it is mixed into; a `Plan` comes as the mask."""
        if not isinstance(attention_mask, Plan):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        layer: Any = self
        layers, p = (layer.query, layer.key, layer.value), layer.dropout.p if self.training else 0.0
        return _attend(hidden_states, attention_mask, layers, layer.num_attention_heads, layer.scaling, p), None


class DistilBertAttention(nn.Module):
    """Mixed into DistilBertSelfAttention."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the class that it is mixed into; a `Plan` comes as the mask."""
        if not isinstance(attention_mask, Plan):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        layer: Any = self
        layers, p = (layer.q_lin, layer.k_lin, layer.v_lin), layer.dropout.p if self.training else 0.0
        return layer.out_lin(_attend(hidden_states, attention_mask, layers, layer.n_heads, layer.scaling, p)), None


class DebertaAttention(nn.Module):
    """Mixed into DisentangledSelfAttention."""

    def forward(self, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class that it is mixed into; a `Plan` comes as the mask."""
        if not isinstance(attention_mask, Plan):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        layer: Any = self
        plan, heads = attention_mask, layer.num_attention_heads
        x = _lowered(hidden_states if plan.context is None else plan.context)
        q, k, v = _heads(plan, heads, dict.fromkeys((layer.query_proj, layer.key_proj, layer.value_proj), x))
        pos_key, pos_query = _tables(layer, kwargs["rel_embeddings"])
        out = functional.disentangled_attention(
            q,
            k,
            v,
            pos_key,
            pos_query,
            position_buckets=getattr(layer, "position_buckets", -1),
            max_position=getattr(layer, "max_relative_positions", None),
            lengths=None if plan.key_lengths is None else plan.key_lengths.clamp(min=1),
            cu_seqlens=plan.cu_seqlens,
            max_seqlen=None if plan.indices is None else plan.longest,
            softmax_scale=(layer.attention_head_size * (1 + sum(_terms(layer)))) ** -0.5,
            dropout_p=layer.dropout.p if self.training else 0.0,
        )
        out = _joined(out, plan)
        return (out if plan.context is None else plan.first(out)), None


def _terms(layer: Any) -> tuple[bool, bool]:
    """Whether the scores have a content-to-position and a position-to-content term."""
    return "c2p" in layer.pos_att_type, "p2c" in layer.pos_att_type


def _tables(layer: Any, relative: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What queries and what keys meet at each slot, (P,H,D), or None."""
    if not layer.relative_attention:
        return None, None
    relative = layer.pos_dropout(relative)[: 2 * layer.pos_ebd_size]
    names = ("key_proj", "query_proj") if layer.share_att_key else ("pos_key_proj", "pos_query_proj")
    found = [getattr(layer, name)(relative) if term else None for name, term in zip(names, _terms(layer), strict=True)]
    key, query = [None if x is None else x.unflatten(-1, (layer.num_attention_heads, -1)) for x in found]
    return key, query
