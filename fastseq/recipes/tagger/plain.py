"""The rival of ``fastseq compare tagger``: the BiLSTM-CRF as it is usually written."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastseq.models.bilstm import mask_of
from fastseq.models.tagger import SoftmaxDecoder, Tagger
from fastseq.recipes.config import RecipeConfig
from fastseq.recipes.task import Task


def plain(config: RecipeConfig, task: Task) -> PlainTagger:
    """The task's network with pytorch-crf's CRF, or with the softmax that it has; the same weights.

    Args:
        config: of the recipe.
        task: of the tagger.
    """
    ours = cast(Tagger, task.model)
    if isinstance(ours.decoder, SoftmaxDecoder):
        return PlainTagger(ours, SoftmaxDecoder())
    import torchcrf

    layer = torchcrf.CRF(ours.output.out_features, batch_first=True).to(ours.output.weight)
    layer.load_state_dict(ours.decoder.state_dict())
    return PlainTagger(ours, layer)


class PlainTagger(nn.Module):
    """The same network as it is usually written: a padded bidirectional LSTM, a CRF with pytorch-crf's names.

    Args:
        like: gives the sizes and the first weights.
        decoder: the output layer.
    """

    decoder: Any  # pytorch-crf's, or one with its names

    def __init__(self, like: Tagger, decoder: nn.Module) -> None:
        super().__init__()
        self.embeddings = copy.deepcopy(like.embeddings)
        self.dropout = nn.Dropout(like.dropout.p)
        self.lstm = like.lstm.as_pytorch()
        self.output = copy.deepcopy(like.output)
        self.decoder = decoder

    def emissions(self, tokens: Tensor) -> Tensor:
        """(B,T,K) scores of (B,T,F) ids; the LSTM runs over the padding, as is usual."""
        embedded = torch.cat([table(ids) for table, ids in zip(self.embeddings, tokens.unbind(-1), strict=True)], -1)
        scores: Tensor = self.output(self.dropout(self.lstm(self.dropout(embedded))[0]))
        return scores

    def forward(self, tokens: Tensor, lengths: Tensor, tags: Tensor | None) -> Tensor:
        """The mean negative log-likelihood, or the emissions; arguments as of `Tagger`."""
        mask = mask_of(lengths, tokens.shape[1])
        emissions = self.emissions(tokens)
        if tags is None:
            return emissions
        loss: Tensor = -self.decoder(emissions, tags.clamp(min=0), mask=mask, reduction="mean")
        return loss

    @torch.no_grad()
    def predict(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B,T) best tags; what stands at padding is not read."""
        paths = self.decoder.decode(self.emissions(tokens), mask=mask_of(lengths, tokens.shape[1]))
        rows = [torch.tensor(path) for path in paths]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
