"""A text encoder of Hugging Face transformers with one vector of a text as its result.

Letters: B texts, S tokens of the longest, H hidden size.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import fastseq
from fastseq.models.checks import check_ids, check_mask

Pooling = Literal["mean", "first"]


class PooledEncoder(nn.Module):
    """An encoder, and the mean of its tokens' vectors or the first of them.

    Args:
        encoder: a module with the ``config`` and ``forward(input_ids=, attention_mask=)`` of a bare model of
            transformers, such as ``AutoModel.from_pretrained(...)``; its own pooler is taken off.
        pooling: "mean" over the tokens that exist, or the "first" one's vector.
        packed: run it on the tokens that exist only, where `fastseq.patch` knows how; what it did is `report`.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling = "mean", packed: bool = True) -> None:
        super().__init__()
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling: 'mean' or 'first' is wanted, got {pooling!r}")
        self.encoder: Any = encoder
        self.pooling = pooling
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # type: ignore[assignment]  # BERT's: it would be trained by nothing
        self.report = fastseq.patch(encoder, packed=True) if packed else None

    @property
    def hidden_size(self) -> int:
        """H."""
        return cast(int, self.encoder.config.hidden_size)  # DistilBERT's dim has this name too

    @property
    def layers(self) -> nn.ModuleList:
        """Its layers of attention and feed-forward network, one after another."""
        lists = (module for module in self.encoder.modules() if isinstance(module, nn.ModuleList))
        return max(lists, key=len)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The vector of each text, (B,H) float32.

        Args:
            input_ids: (B,S) int64, right-padded.
            attention_mask: (B,S), 1 where a token exists.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        words = self.encoder.get_input_embeddings().weight
        check_ids("input_ids", input_ids, "(B, S)", (-1, -1), words, 0, len(words))
        check_mask("attention_mask", attention_mask, "(B, S)", tuple(input_ids.shape), input_ids)
        if not input_ids.numel():
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, wanted at least one token")
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "first":
            return states[:, 0].float()
        on = attention_mask.to(states.dtype).unsqueeze(1)
        summed = torch.matmul(on, states).squeeze(1).float()
        return summed / attention_mask.sum(1, keepdim=True, dtype=torch.float32).clamp(min=1)

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations inside the layers: the backward pass computes them again."""
        # The newer versions of transformers 5 warn of the older name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(self.encoder, name) for name in names if hasattr(self.encoder, name))({"use_reentrant": False})
