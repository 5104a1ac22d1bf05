"""A regressor on a text and on numeric, categorical and multi-valued columns, for targets that span magnitudes.

Letters: B rows, S tokens of the longest text, N numeric columns, C categorical ones, M multi-valued ones (bags).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.models.checks import check_floats, check_ids
from fastseq.models.pooled_encoder import PooledEncoder, Pooling

Loss = Literal["smape", "l1", "huber"]

ABSENT = 0
"""The id of no value, in bags."""


def smape_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """SMAPE of exp(predicted) and exp(target) over 100, so 0 to 2: |a - b| / ((a + b) / 2) is 2 tanh(|log a/b| / 2).

    It neither overflows nor takes an exponential, and far from the target its gradient fades: a row that nothing is
    known of does not pull at the others.

    Args:
        predicted: (B,) logarithms.
        target: (B,) logarithms.
    """
    return 2 * torch.tanh((predicted - target).abs() / 2).mean()


class TextRegressor(nn.Module):
    """Reads a text with an encoder and the other columns with embeddings; a small network makes one number of them.

    Args:
        encoder: of the DeBERTa kind or any other bare encoder, as of `PooledEncoder`; None reads no text.
        numeric: N.
        category_sizes: ids in each of the C categorical columns.
        bags: M multi-valued columns; they share one table.
        bag_size: rows of that table, the one for absent values included.
        category_dim: embedding size of a category.
        bag_dim: embedding size of a value in a bag; a bag is the mean of its values.
        hidden_size: of the network on top.
        dropout: in it.
        bag_dropout: share of a bag's values that a training step does not see.
        loss: "smape", "l1" or "huber", of logarithms.
        pooling: "mean" over the tokens that exist, or the "first" one's vector.
        packed: run the encoder on real tokens only, where `fastseq.patch` knows how.
        center: what the network's 0 stands for: the mean of the targets' logarithms.
        scale: what its 1 stands for: their standard deviation.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        *,
        numeric: int = 0,
        category_sizes: Sequence[int] = (),
        bags: int = 0,
        bag_size: int = 1 << 16,
        category_dim: int = 16,
        bag_dim: int = 64,
        hidden_size: int = 256,
        dropout: float = 0.2,
        bag_dropout: float = 0.2,
        loss: Loss = "smape",
        pooling: Pooling = "mean",
        packed: bool = True,
        center: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.text = PooledEncoder(encoder, pooling, packed) if encoder is not None else None
        self.categories = nn.ModuleList(nn.Embedding(size, category_dim) for size in category_sizes)
        self.bags = nn.ModuleList()  # one, or none
        if bags:
            table = nn.EmbeddingBag(bag_size, bag_dim, mode="mean", padding_idx=ABSENT, include_last_offset=True)
            self.bags.append(table)
        for embedding in (*self.categories, *self.bags):
            nn.init.normal_(cast(Tensor, embedding.weight), std=0.1)
        width = numeric + len(category_sizes) * category_dim + bags * bag_dim
        width += self.text.hidden_size if self.text is not None else 0
        if not width:
            raise ValueError("encoder, numeric, category_sizes, bags: at least one column is wanted, got none")
        self.output = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width, hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size // 2),
            nn.GELU(),
            nn.Linear(hidden_size // 2, 1),
        )
        self.loss, self.bag_dropout, self.numeric, self.bags_of_a_row = loss, bag_dropout, numeric, bags
        self.register_buffer("center", torch.tensor(center))
        self.register_buffer("scale", torch.tensor(scale))

    def logarithms(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        numeric: Tensor,
        categories: Tensor,
        bag_ids: Tensor,
        bag_offsets: Tensor,
    ) -> Tensor:
        """The natural logarithm of each row's prediction, (B,) float32.

        Args:
            input_ids: (B,S) int64, right-padded.
            attention_mask: (B,S), 1 where a token exists.
            numeric: (B,N) float, standardised.
            categories: (B,C) int64 ids.
            bag_ids: (total,) int64, the values of row 0's M bags, of row 1's and so on.
            bag_offsets: (B*M+1,) int64, where each bag begins, and the total.
        """
        self._check(numeric, categories, bag_ids, bag_offsets)
        parts = [numeric]
        if self.text is not None:
            parts.append(self.text(input_ids, attention_mask))
        parts += [table(ids) for table, ids in zip(self.categories, categories.unbind(1), strict=True)]
        if self.training and self.bag_dropout:
            unseen = torch.rand(bag_ids.shape, device=bag_ids.device) < self.bag_dropout
            bag_ids = bag_ids.masked_fill(unseen, ABSENT)
        parts += [table(bag_ids, bag_offsets).view(len(numeric), -1) for table in self.bags]
        outputs: Tensor = self.output(torch.cat([part.float() for part in parts], 1)).squeeze(1)
        return outputs.float() * self.scale + self.center  # type: ignore[operator]

    def _check(self, numeric: Tensor, categories: Tensor, bag_ids: Tensor, bag_offsets: Tensor) -> None:
        check_floats("numeric", numeric, "(B, N)", (-1, self.numeric), self.center)  # type: ignore[arg-type]
        rows, tables = len(numeric), [cast(nn.Embedding, table).num_embeddings for table in self.categories]
        check_ids("categories", categories, "(B, C)", (rows, len(tables)), numeric, 0, max(tables, default=1))
        for ids, size in zip(categories.unbind(1), tables, strict=True):
            check_ids("categories", ids, "(B,)", (rows,), numeric, 0, size)
        for table in self.bags:
            check_ids("bag_ids", bag_ids, "(total,)", (-1,), numeric, 0, cast(nn.EmbeddingBag, table).num_embeddings)
            count, total = rows * self.bags_of_a_row + 1, len(bag_ids)
            check_ids("bag_offsets", bag_offsets, "(B*M+1,)", (count,), numeric, 0, total + 1)
            check_ids("bag_offsets", bag_offsets[:1], "(B*M+1,)", (1,), numeric, 0, 1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        numeric: Tensor,
        categories: Tensor,
        bag_ids: Tensor,
        bag_offsets: Tensor,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The mean loss; without targets, the logarithms of the predictions.

        Args:
            input_ids: this and the following five as of `logarithms`.
            attention_mask: as of `logarithms`.
            numeric: as of `logarithms`.
            categories: as of `logarithms`.
            bag_ids: as of `logarithms`.
            bag_offsets: as of `logarithms`.
            targets: (B,) float, the natural logarithms of the targets, or None.

        Returns:
            A scalar; (B,) logarithms where targets is None.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        predicted = self.logarithms(input_ids, attention_mask, numeric, categories, bag_ids, bag_offsets)
        if targets is None:
            return predicted
        check_floats("targets", targets, "(B,)", tuple(predicted.shape), predicted)
        if self.loss == "l1":
            return F.l1_loss(predicted, targets)
        return F.huber_loss(predicted, targets) if self.loss == "huber" else smape_loss(predicted, targets)

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations inside the encoder's layers: the backward pass computes them again."""
        if self.text is not None:
            self.text.gradient_checkpointing_enable()
