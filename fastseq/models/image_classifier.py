"""An image classifier on a convolutional encoder of Hugging Face transformers, such as its ResNet.

Letters: B images, C channels, H height, W width, D size of the encoder's vector, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.models.checks import check_ids


class ImageClassifier(nn.Module):
    """Random shifts and mirror images in training, an encoder, dropout and a linear layer over the classes.

    Equivalent, but for the shifts and mirrors of the whole batch at once::

        pixels = torch.stack([augment(image) for image in pixels])    # in training mode
        vectors = encoder((pixels - mean) / std).pooler_output.flatten(1)
        loss = F.cross_entropy(linear(dropout(vectors)), labels)

    Images are bytes until they are where the model is. After ``.to(memory_format=torch.channels_last)`` the encoder's
    input has that layout too. ResNets: K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016.

    Args:
        encoder: a module with the ``config`` (``num_channels``, ``hidden_sizes``) and the output of a bare image
            model of transformers, such as ``ResNetModel``.
        num_classes: K.
        mean: of each channel of the images, in steps of a byte (0 to 255).
        std: standard deviation of each channel, likewise.
        shift: in training, an image is moved by up to so many pixels each way; its edge fills what is left free.
        flip: in training, half of the images are mirrored left to right.
        dropout: on the encoder's vector.
        label_smoothing: share of a label that is spread over all classes.

    Raises:
        ValueError: no class, a negative shift, or not as many means and positive deviations as channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        shift: int = 0,
        flip: bool = False,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        shape = cast(Any, encoder).config
        self.channels: int = shape.num_channels
        if num_classes < 1:
            raise ValueError(f"num_classes: at least 1 is wanted, got {num_classes}")
        if shift < 0:
            raise ValueError(f"shift: at least 0 is wanted, got {shift}")
        if not len(mean) == len(std) == self.channels or min(std) <= 0:
            wanted = f"{self.channels} numbers are wanted, and positive ones in std"
            raise ValueError(f"mean and std: {wanted}, got {list(mean)} and {list(std)}")
        self.encoder: Any = encoder
        self.shift, self.flip, self.label_smoothing = shift, flip, label_smoothing
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(shape.hidden_sizes[-1], num_classes)

    def augmented(self, pixels: Tensor) -> Tensor:
        """Each image moved and mirrored by chance: one gather for the whole batch.

        The chances are of torch's own generator of the pixels' device.

        Args:
            pixels: (B,C,H,W) of any type.

        Returns:
            The same shape and type, with the memory layout of channels_last.
        """
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not pixels.numel():
            got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(f"pixels: (B,C,H,W), and not empty, is wanted, got {got}")
        B, _, H, W = pixels.shape
        device = pixels.device
        down, right = torch.randint(-self.shift, self.shift + 1, (2, B, 1), device=device)
        rows = (torch.arange(H, device=device) + down).clamp(0, H - 1)
        columns = (torch.arange(W, device=device) + right).clamp(0, W - 1)
        if self.flip:
            columns = torch.where(torch.rand(B, 1, device=device) < 0.5, columns.flip(1), columns)
        images = torch.arange(B, device=device).view(B, 1, 1)
        return pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def logits(self, pixels: Tensor) -> Tensor:
        """The scores of the classes, (B,K) float32.

        Args:
            pixels: (B,C,H,W) uint8; one channel will do for an encoder of several.

        Raises:
            ValueError: of another shape, type or device, or empty.
            TypeError: not a tensor.
        """
        if not isinstance(pixels, Tensor):
            raise TypeError(f"pixels: a tensor is wanted, got {type(pixels).__name__}")
        if pixels.device != self.mean.device:
            raise ValueError(f"pixels: a tensor on {self.mean.device} is wanted, got one on {pixels.device}")
        fits = pixels.dim() == 4 and pixels.numel() and pixels.shape[1] in (1, self.channels)
        if not fits or pixels.dtype != torch.uint8:
            wanted = f"(B,{self.channels},H,W) of uint8 are wanted"
            raise ValueError(f"pixels: {wanted}, got {tuple(pixels.shape)} of {pixels.dtype}")
        if self.training and (self.shift or self.flip):
            pixels = self.augmented(pixels)
        scaled = (pixels - self.mean) / self.std
        # A copy: for one channel, contiguous() leaves strides that convolutions take for channels_last.
        vectors = self.encoder(scaled.clone(memory_format=self._layout())).pooler_output.flatten(1)
        scores: Tensor = self.output(self.dropout(vectors))
        return scores.float()

    def _layout(self) -> torch.memory_format:
        """The memory format of the encoder's kernels: which one it is, a kernel of one channel or pixel cannot say."""
        kernels = (p for p in self.encoder.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1)
        kernel = next(kernels, None)
        last = kernel is not None and not kernel.is_contiguous()
        return torch.channels_last if last else torch.contiguous_format

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of the labels; without them, the logits.

        Args:
            pixels: (B,C,H,W) uint8.
            labels: (B,) int64, -100 where there is none, or None.

        Returns:
            A scalar; (B,K) logits where labels is None.

        Raises:
            ValueError: pixels or labels of another shape or device, or (on a CPU) a label that is no class.
            TypeError: of another type.
        """
        logits = self.logits(pixels)
        if labels is None:
            return logits
        check_ids("labels", labels, "(B,)", (len(logits),), logits, 0, logits.shape[1], -100)
        return F.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """The most likely class of each image, (B,) int64; the argument as of `logits`."""
        return self.logits(pixels).argmax(-1)


def small_stem(encoder: nn.Module) -> None:
    """Gives a ResNet of transformers a first layer for small images: 3x3 at every pixel, and no pooling.

    The first layer as it is, 7x7 at every second pixel and a pooling by two, was made for images of 224 pixels; of
    28, it would leave 7 for all the others. Its weights are lost: this is for encoders that are not trained yet.

    Args:
        encoder: a ``ResNetModel``.

    Raises:
        ValueError: another encoder, whose first layer has other names.
    """
    embedder = getattr(encoder, "embedder", None)
    first = getattr(getattr(embedder, "embedder", None), "convolution", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(embedder, "pooler"):
        raise ValueError(f"encoder: a ResNetModel of transformers is wanted, got {type(encoder).__name__}")
    layer = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # as ResNetModel begins all of them
    layer.to(first.weight)
    cast(Any, embedder).embedder.convolution = layer
    cast(Any, embedder).pooler = nn.Identity()
