"""The image classifier of the benchmarks of models: a ResNet on small grey images, of random weights.

The rival is the same network in float32, with images as PyTorch lays them out, channel by channel. What is checked is
in evaluation mode: no shifts, and batch norms do not see their batch.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib

import torch
from torch import Tensor

from fastseq.models.image_classifier import ImageClassifier, small_stem
from fastseq_benchmarks.runner import Rival, Shape
from fastseq_benchmarks.training import fused_rival, training_step

__all__ = ["ModelInputs", "loss_and_gradients", "make_inputs", "rivals"]

CLASSES, STEM, WIDTHS, DEPTHS = 10, 32, (64, 128, 256), (1, 1, 1)  # the recipe's


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """The first weights, and a batch."""

    model: ImageClassifier
    batch: dict[str, Tensor]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> ModelInputs:
    """B, side: noise, as bytes."""
    B, side = shape
    transformers = importlib.import_module("transformers")
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(
            num_channels=1,
            embedding_size=STEM,
            hidden_sizes=WIDTHS,
            depths=DEPTHS,
            layer_type="basic",
            downsample_in_first_stage=True,
        )
        encoder = transformers.ResNetModel(config)
        small_stem(encoder)
        model = ImageClassifier(encoder, CLASSES, mean=[73.0], std=[90.0], shift=2, flip=True)
    pixels = torch.randint(256, (B, 1, side, side), generator=g, dtype=torch.uint8)
    batch = {"pixels": pixels, "labels": torch.randint(CLASSES, (B,), generator=g)}
    return ModelInputs(model.to(device, dtype), {name: x.to(device) for name, x in batch.items()})


def rivals(inputs: ModelInputs) -> list[Rival]:
    """As PyTorch lays images out, and channels last with the fused AdamW and kept memory; under bf16 autocast too."""
    last = [copy.deepcopy(inputs.model).to(memory_format=torch.channels_last) for _ in range(2)]  # type: ignore[call-overload]
    return [
        Rival("NCHW", *training_step(copy.deepcopy(inputs.model), inputs.batch)),
        fused_rival("fastseq", last[0], inputs.batch),
        fused_rival("fastseq", last[1], inputs.batch, half=True),
    ]


def loss_and_gradients(inputs: ModelInputs) -> dict[str, Tensor]:
    """The network in float64."""
    return training_step(copy.deepcopy(inputs.model).double(), inputs.batch)[1]()
