"""A text classifier on any encoder of Hugging Face transformers, which pays for real tokens only.

Letters: B texts, S tokens of the longest, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.models.checks import check_ids
from fastseq.models.pooled_encoder import PooledEncoder, Pooling


class TextClassifier(nn.Module):
    """An encoder, pooling, dropout and a linear layer over the classes.

    Equivalent, but for the padding that it does not compute::

        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = F.cross_entropy(linear(dropout(pooled)), labels)

    Args:
        encoder: BERT, DistilBERT, MiniLM or any other bare encoder, as of `PooledEncoder`.
        num_classes: K.
        pooling: "mean" over the tokens that exist, or the "first" one's vector.
        dropout: on the pooled vector.
        label_smoothing: share of a label that is spread over all classes.
        packed: run the encoder on real tokens only, where `fastseq.patch` knows how.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
        label_smoothing: float = 0.0,
        packed: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: at least 1 is wanted, got {num_classes}")
        self.text = PooledEncoder(encoder, pooling, packed)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(self.text.hidden_size, num_classes)
        self.label_smoothing = label_smoothing

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The scores of the classes, (B,K) float32.

        Args:
            input_ids: (B,S) int64, right-padded.
            attention_mask: (B,S), 1 where a token exists.
        """
        scores: Tensor = self.output(self.dropout(self.text(input_ids, attention_mask)))
        return scores.float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of the labels; without them, the logits.

        Args:
            input_ids: (B,S) int64, right-padded.
            attention_mask: (B,S), 1 where a token exists.
            labels: (B,) int64, -100 where there is none, or None. The mean over no label is NaN.

        Returns:
            A scalar; (B,K) logits where labels is None.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        logits = self.logits(input_ids, attention_mask)
        if labels is None:
            return logits
        check_ids("labels", labels, "(B,)", (len(logits),), logits, 0, logits.shape[1], -100)
        return F.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The most likely class of each text, (B,) int64; arguments as of `logits`."""
        return self.logits(input_ids, attention_mask).argmax(-1)

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations inside the encoder's layers: the backward pass computes them again."""
        self.text.gradient_checkpointing_enable()
