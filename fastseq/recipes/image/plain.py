"""The rival of ``fastseq compare image``: an image classifier as it is usually written."""

from __future__ import annotations

import copy
import random
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastseq.models.image_classifier import ImageClassifier
from fastseq.recipes.image.data import Example, Images
from fastseq.recipes.image.folder import load_image
from fastseq.recipes.image.recipe import Config
from fastseq.recipes.task import Task


def plain(config: Config, task: Task) -> PlainClassifier:
    """The task's network with transformers' modules alone; the same weights.

    Args:
        config: of the recipe.
        task: of the image system.
    """
    return PlainClassifier(cast(ImageClassifier, task.model))


class PlainClassifier(nn.Module):
    """The same network for images that a data set has scaled.

    Args:
        like: gives the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, like: ImageClassifier) -> None:
        super().__init__()
        self.encoder, self.output = copy.deepcopy(like.encoder), copy.deepcopy(like.output)
        self.dropout = nn.Dropout(like.dropout.p)
        self.smoothing = like.label_smoothing
        self.register_buffer("mean", like.mean.clone())
        self.register_buffer("std", like.std.clone())

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, or the logits; the pixels are scaled here where they are bytes."""
        if pixels.dtype == torch.uint8:
            pixels = ((pixels - self.mean) / self.std).clone(memory_format=torch.contiguous_format)
        logits: Tensor = self.output(self.dropout(self.encoder(pixels).pooler_output.flatten(1))).float()
        return logits if labels is None else F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """(B,) most likely classes."""
        logits: Tensor = self(pixels)
        return logits.argmax(-1)


class PlainImages(Dataset[dict[str, Any]]):
    """The images one at a time, as a pipeline of torchvision has them: from the file, moved, mirrored, scaled.

    Args:
        images: which.
        config: of the recipe.
        model: gives the means and deviations.
    """

    def __init__(self, images: Images, config: Config, model: ImageClassifier) -> None:
        self.images, self.config = images, config
        self.mean, self.std = model.mean.cpu(), model.std.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        from PIL import Image, ImageOps

        pixels, label = self._example(i)
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        width, height = image.size
        if shift := self.config.model.shift:
            left, top = random.randint(0, 2 * shift), random.randint(0, 2 * shift)
            image = ImageOps.expand(image, shift).crop((left, top, left + width, top + height))
        if self.config.model.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        scaled = torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1).contiguous().float()
        return {"pixels": (scaled - self.mean) / self.std, "labels": label}

    def _example(self, i: int) -> Example:
        """An image as the data set on the disk has it: in a file of its own, or in one array of all."""
        example, file = self.images[i], self.images.file(i)
        if file is None:
            return example
        return Example(load_image(file, self.config.data.mode, self.images.shape[:2]), example.label)
