"""Attention that keeps no S*S tensor for its backward pass: softmax(q k^T) v with all that flash_attn has and additive
bias (dot_product), and DeBERTa's disentangled attention (disentangled).
"""  # noqa: D205

from fastseq.ops.attention import disentangled, dot_product

__all__ = ["disentangled", "dot_product"]
