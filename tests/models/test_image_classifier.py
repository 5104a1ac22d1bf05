"""The image classifier on a ResNet of transformers: the loss, the augmentation, the memory layouts."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from fastseq.models import ImageClassifier
from fastseq.models.image_classifier import small_stem

K, SIDE = 3, 12


def resnet(channels: int) -> ResNetModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(num_channels=channels, **sizes))


def model(channels: int, **settings: Any) -> ImageClassifier:
    encoder = resnet(channels)
    small_stem(encoder)
    statistics: dict[str, Any] = {"mean": [100.0] * channels, "std": [50.0 + i for i in range(channels)]}
    return ImageClassifier(encoder, K, **{**statistics, **settings})


def pixels(channels: int, count: int = 6) -> Tensor:
    """As collate makes them: the channels of a pixel lie together."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(256, (count, SIDE, SIDE + 1, channels), dtype=torch.uint8, generator=generator)
    return drawn.permute(0, 3, 1, 2)


LABELS = torch.tensor([0, 2, 1, -100, 1, 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_what_the_docstring_says(channels: int) -> None:
    ours, images = model(channels, label_smoothing=0.1).eval(), pixels(channels)
    scaled = (images.double() - ours.mean) / ours.std
    vectors = ours.encoder(scaled.float().contiguous()).pooler_output.flatten(1)
    wanted = F.cross_entropy(ours.output(vectors), LABELS, label_smoothing=0.1)
    torch.testing.assert_close(ours(images, LABELS), wanted)
    torch.testing.assert_close(ours(images), ours.output(vectors))
    assert torch.equal(ours.predict(images), ours.output(vectors).argmax(-1))


def test_each_image_is_moved_and_mirrored_by_itself() -> None:
    ours = model(3, shift=2, flip=True)
    image = pixels(3, 1)
    padded = F.pad(image.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    moved = [padded[:, :, i : i + SIDE, j : j + SIDE + 1] for i, j in itertools.product(range(5), repeat=2)]
    allowed = torch.cat([*moved, *(image.flip(3) for image in moved)])
    torch.manual_seed(2)
    found = ours.augmented(image.expand(600, -1, -1, -1))
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    same = (found[:, None] == allowed).flatten(2).all(-1)
    assert torch.equal(same.sum(1), torch.ones(600, dtype=torch.long))
    assert same.any(0).all()  # none of the 50 is left out


def test_chance_is_asked_in_training_only() -> None:
    ours, images = model(1, shift=1, flip=True), pixels(1)
    state = torch.get_rng_state()
    ours.eval()(images)
    model_without = model(1)
    torch.set_rng_state(state)
    model_without.train()(images)
    assert torch.equal(torch.get_rng_state(), state)
    ours.train()(images)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_layouts_give_the_same_and_reach_every_convolution(channels: int) -> None:
    plain = model(channels)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen: dict[int, list[bool]] = {}
    for network in (plain, last):
        seen[id(network)] = kept = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.is_contiguous()))
    losses = [network(pixels(channels), LABELS) for network in (plain, last)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    assert all(seen[id(plain)])
    assert not any(seen[id(last)])


def test_an_encoder_of_three_channels_takes_grey_images() -> None:
    ours = model(3).eval()
    grey = pixels(1)
    torch.testing.assert_close(ours(grey), ours(grey.expand(-1, 3, -1, -1)))


def test_the_small_stem_keeps_every_pixel() -> None:
    encoder = resnet(1)
    images = torch.zeros(1, 1, SIDE, SIDE)
    assert encoder(images).last_hidden_state.shape[-1] == SIDE // 8 + 1
    small_stem(encoder)
    assert encoder(images).last_hidden_state.shape[-1] == SIDE // 2
    with pytest.raises(ValueError, match="encoder: a ResNetModel of transformers is wanted, got BertModel"):
        small_stem(
            BertModel(BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4))
        )


def test_it_is_one_graph() -> None:
    ours = model(1, shift=1, flip=True).train()
    torch.manual_seed(3)
    wanted = ours(pixels(1), LABELS)
    torch.manual_seed(3)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels(1), LABELS), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -1}, "shift: at least 0 is wanted, got -1"),
        ({"mean": [0.0]}, r"mean and std: 3 numbers are wanted.*got \[0.0\]"),
        ({"std": [1.0, 0.0, 1.0]}, r"positive ones in std"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(3, **settings)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="num_classes: at least 1 is wanted, got 0"):
        ImageClassifier(resnet(1), 0, mean=[0.0], std=[1.0])
    for wrong in (pixels(3).float(), pixels(3)[0], pixels(3)[:, :2]):
        with pytest.raises(ValueError, match=r"pixels: \(B,3,H,W\) of uint8 are wanted, got"):
            model(3)(wrong)
