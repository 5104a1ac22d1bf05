"""A BiLSTM-CRF sequence tagger that pays for real tokens only.

Letters: B batch, T tokens, F id columns a token, E embedding size, H hidden size of one direction, K tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastseq.models.bilstm import BiLSTM, mask_of
from fastseq.models.checks import check_floats, check_ids, check_mask

PAD = 0
"""The id of padding in every id column, and the only id whose embedding stays zero."""

IGNORE = -100
"""The tag of a position that does not exist, in targets and in predictions."""


class SoftmaxDecoder(nn.Module):
    """Every position on its own: the emission-only model to compare a CRF with. It has no parameters."""

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
        """The log-likelihood of the tags.

        Args:
            emissions: (B,T,K) scores.
            tags: (B,T) int64; positions off in the mask are not read.
            mask: (B,T) bool, on where a token exists.
            reduction: "sum", or "mean" over sentences, as the CRF counts.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: 'sum' or 'mean' is wanted, got {reduction!r}")
        _check_scores(emissions, mask)
        check_ids("tags", tags, "(B, T)", tuple(mask.shape), emissions, 0, emissions.shape[2], IGNORE)
        target = tags.long().masked_fill(~mask, IGNORE).flatten()
        total = -nn.functional.cross_entropy(
            emissions.float().flatten(0, 1), target, ignore_index=IGNORE, reduction="sum"
        )
        return total / max(tags.shape[0], 1) if reduction == "mean" else total

    def viterbi(self, emissions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The best tag of each position: (B,T) with -100 where masked, and the summed scores (B,)."""
        _check_scores(emissions, mask)
        scores, tags = emissions.float().log_softmax(-1).max(-1)
        return tags.masked_fill(~mask, IGNORE), (scores * mask).sum(1)


def _check_scores(emissions: Tensor, mask: Tensor) -> None:
    check_floats("emissions", emissions, "(B, T, K)", (-1, -1, -1), emissions)
    if not emissions.shape[2]:
        raise ValueError("emissions: got no tags, wanted K at least 1")
    check_mask("mask", mask, "(B, T)", tuple(emissions.shape[:2]), emissions)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, wanted bool")


class Tagger(nn.Module):
    """Embeddings, dropout, BiLSTM, linear layer, and a CRF (or a softmax) over the tags.

    Args:
        vocab_sizes: ids in each of the F columns of a token, e.g. its character and its bigram.
        num_tags: K.
        embedding_dims: embedding size of each column; the columns are concatenated.
        hidden_size: H, of one direction.
        num_layers: LSTM layers.
        dropout: on the embeddings, between the layers and on the hidden states.
        decoder: the output layer over K tags; `fastseq.nn.CRF(K, batch_first=True)` when None, and
            `SoftmaxDecoder()` for the emission-only model.
        vectors: (V,E) pretrained vectors of column 0, or None.
        freeze_vectors: keep them as they are.
    """

    decoder: Any  # a module with the forward and viterbi of fastseq.nn.CRF

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        num_tags: int,
        *,
        embedding_dims: Sequence[int],
        hidden_size: int = 200,
        num_layers: int = 1,
        dropout: float = 0.5,
        decoder: nn.Module | None = None,
        vectors: Tensor | None = None,
        freeze_vectors: bool = False,
    ) -> None:
        super().__init__()
        if len(vocab_sizes) != len(embedding_dims) or not vocab_sizes:
            raise ValueError(
                f"embedding_dims: a size for each of the {len(vocab_sizes)} columns of vocab_sizes is wanted "
                f"(at least one), got {list(embedding_dims)}"
            )
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, dim, padding_idx=PAD) for size, dim in zip(vocab_sizes, embedding_dims, strict=True)
        )
        for table in self.embeddings:
            with torch.no_grad():  # smaller than PyTorch's: +0.7 entity F1 on peoples-daily-ner
                cast(nn.Embedding, table).weight.mul_(0.3)
        if vectors is not None:
            self._load_vectors(vectors, freeze_vectors)
        self.dropout = nn.Dropout(dropout)
        self.lstm = BiLSTM(sum(embedding_dims), hidden_size, num_layers, dropout)
        self.output = nn.Linear(2 * hidden_size, num_tags)
        self.decoder = decoder if decoder is not None else _crf(num_tags)

    def _load_vectors(self, vectors: Tensor, freeze: bool) -> None:
        weight = cast(nn.Embedding, self.embeddings[0]).weight
        if vectors.shape != weight.shape:
            raise ValueError(f"vectors: shape {tuple(weight.shape)} is wanted, got {tuple(vectors.shape)}")
        with torch.no_grad():
            weight.copy_(vectors)
        weight.requires_grad_(not freeze)

    def emissions(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The scores of every tag at every position, (B,T,K).

        Args:
            tokens: (B,T,F) int64 ids, or (B,T) where a token has one column; right-padded with 0.
            lengths: (B,) int64 real tokens of each row.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        columns = tokens.unbind(-1) if isinstance(tokens, Tensor) and tokens.dim() == 3 else (tokens,)
        if len(columns) != len(self.embeddings):
            raise ValueError(
                f"tokens: shape (B,T,{len(self.embeddings)}) is wanted, one id for each embedding table, "
                f"got {tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__}"
            )
        for table, ids in zip(self.embeddings, columns, strict=True):
            weight = cast(nn.Embedding, table).weight
            check_ids("tokens", ids, "(B, T) of each column", (-1, -1), weight, 0, len(weight))
        if not tokens.shape[1]:
            raise ValueError("tokens: no positions, at least one is wanted")
        check_ids("lengths", lengths, "(B,)", tuple(tokens.shape[:1]), tokens, 0, tokens.shape[1] + 1)
        embedded = torch.cat([table(ids) for table, ids in zip(self.embeddings, columns, strict=True)], -1)
        hidden = self.lstm(self.dropout(embedded), lengths)
        scores: Tensor = self.output(self.dropout(hidden))
        return scores.float()  # decoders count in float32, also under autocast

    def forward(self, tokens: Tensor, lengths: Tensor, tags: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood of a sentence; without tags, the emissions.

        Args:
            tokens: (B,T,F) or (B,T) int64 ids, right-padded with 0.
            lengths: (B,) int64 real tokens of each row.
            tags: (B,T) int64, -100 at padding, or None.

        Returns:
            A scalar; (B,T,K) emissions where tags is None.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        emissions = self.emissions(tokens, lengths)
        if tags is None:
            return emissions
        check_ids("tags", tags, "(B, T)", tuple(tokens.shape[:2]), tokens, 0, emissions.shape[2], IGNORE)
        loss: Tensor = -self.decoder(emissions, tags, mask_of(lengths, tokens.shape[1]), reduction="mean")
        return loss

    @torch.no_grad()
    def predict(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The best tag ids, (B,T) int64, -100 at padding. No host sync.

        Args:
            tokens: (B,T,F) or (B,T) int64 ids, right-padded with 0.
            lengths: (B,) int64 real tokens of each row.
        """
        emissions = self.emissions(tokens, lengths)
        tags: Tensor = self.decoder.viterbi(emissions, mask_of(lengths, tokens.shape[1]))[0]
        return tags


def _crf(num_tags: int) -> nn.Module:
    from fastseq.nn import CRF

    return CRF(num_tags, batch_first=True)
