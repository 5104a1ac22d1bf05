"""The tagger of the benchmarks of models: a BiLSTM-CRF on Chinese characters and their bigrams, of random weights.

The sizes are those of the recipe. Lengths are uniform in [T/2, T]. The rival is the network as it is usually written,
with pytorch-crf: its LSTM reads padding, so that its results depend on it, and what is checked is a batch without any.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib

import torch
from torch import Tensor, nn

from fastseq.models.tagger import IGNORE, Tagger
from fastseq.recipes.tagger.plain import PlainTagger
from fastseq_benchmarks import crf_truth
from fastseq_benchmarks.crf import PEER, no_peer
from fastseq_benchmarks.runner import Rival, Shape
from fastseq_benchmarks.training import fused_rival, training_step

__all__ = ["ModelInputs", "loss_and_gradients", "make_inputs", "rivals"]

VOCABULARIES, EMBEDDINGS, HIDDEN, DROPOUT = (4_000, 20_000), (64, 32), 200, 0.4
PEER_TOLERANCE = 1e-2  # pytorch-crf's, in float32

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """The first weights; a batch of ragged sentences, which is timed; and one of whole rows, which is checked."""

    model: Tagger
    ragged: Batch
    whole: Batch


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> ModelInputs:
    """B, T, K."""
    B, T, K = shape
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(T // 2, 1), T + 1, (B,), generator=g)
    lengths[0] = T
    tokens = torch.stack([torch.randint(1, size, (B, T), generator=g) for size in VOCABULARIES], -1)
    tags, on = torch.randint(K, (B, T), generator=g), torch.arange(T) < lengths[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Tagger(VOCABULARIES, K, embedding_dims=EMBEDDINGS, hidden_size=HIDDEN, dropout=DROPOUT)
    ragged = {"tokens": tokens * on[..., None], "lengths": lengths, "tags": tags.masked_fill(~on, IGNORE)}
    whole = {"tokens": tokens, "lengths": torch.full((B,), T), "tags": tags}
    batches = ({name: x.to(device) for name, x in batch.items()} for batch in (ragged, whole))
    return ModelInputs(model.to(device, dtype), *batches)


def rivals(inputs: ModelInputs) -> list[Rival]:
    """The usual way, and fastseq's: its tagger, the fused AdamW and kept memory; under bf16 autocast too."""
    missing = no_peer()
    decoder = _Definition(inputs.model) if missing else _peer(inputs.model)
    plain = training_step(PlainTagger(inputs.model, decoder), inputs.ragged, checked=inputs.whole)
    ours = [
        fused_rival("fastseq", copy.deepcopy(inputs.model), inputs.ragged, half=half, checked=inputs.whole)
        for half in (False, True)
    ]
    return [Rival(PEER, *plain, tolerance=PEER_TOLERANCE, missing=missing), *ours]


def _peer(model: Tagger) -> nn.Module:
    crf: nn.Module = (
        importlib.import_module("torchcrf").CRF(model.output.out_features, batch_first=True).to(model.output.weight)
    )
    crf.load_state_dict(model.decoder.state_dict())
    return crf


class _Definition(nn.Module):
    """A CRF by its definition, with pytorch-crf's names."""

    def __init__(self, like: Tagger) -> None:
        super().__init__()
        for name, parameter in like.decoder.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor, reduction: str) -> Tensor:
        assert reduction == "mean"
        parameters = (self.get_parameter(f"{name}transitions") for name in ("", "start_", "end_"))
        return -crf_truth.nll(emissions, tags, mask, *parameters).mean()


def loss_and_gradients(inputs: ModelInputs) -> dict[str, Tensor]:
    """The usual network in float64, its CRF by the definition; of what both networks have under one name."""
    plain = PlainTagger(inputs.model, _Definition(inputs.model)).double()
    names = {"loss", *dict(inputs.model.named_parameters())}
    return {name: x for name, x in training_step(plain, inputs.whole)[1]().items() if name in names}
