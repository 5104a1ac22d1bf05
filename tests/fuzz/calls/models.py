"""fastseq.models, tiny ones, in evaluation mode."""

from __future__ import annotations

import functools
from typing import Any

import torch
from harness import Call, Draw, draws
from torch import Tensor, nn

from fastseq import models

WORDS = 12


def tagger(draw: Draw) -> tuple[models.Tagger, dict[str, Any], int]:
    columns, k = draw.choice(1, 2), draw.size(1)
    b, t = draw.sizes(0, 1)
    torch.manual_seed(0)
    decoder = models.SoftmaxDecoder() if draw.chance(0.3) else None
    sizes = {"embedding_dims": [3] * columns, "hidden_size": 4, "num_layers": draw.choice(1, 2)}
    model = models.Tagger([WORDS] * columns, k, decoder=decoder, **sizes).eval()
    shape = (b, t) if columns == 1 and draw.chance(0.5) else (b, t, columns)
    tokens = draw.integers(shape, 0, WORDS, draw.choice(torch.int64, torch.int32))
    return model, {"tokens": tokens, "lengths": draw.integers((b,), 0, t + 1, torch.int64)}, k


@draws("models.Tagger.emissions", "models.Tagger.predict", "models.Tagger.forward")
def tag(draw: Draw, name: str) -> Call:
    model, arguments, k = tagger(draw)
    b, t = arguments["tokens"].shape[:2]
    results = [((b, t), torch.int64)] if name == "predict" else [((b, t, k), torch.float32)]
    if name == "forward" and draw.chance(0.7):
        on = torch.arange(t) < arguments["lengths"][:, None]
        arguments["tags"] = torch.where(on, draw.integers((b, t), 0, k, torch.int64), -100)
        results = [((), torch.float32)]
        draw.finite = draw.finite and b > 0
    return Call(getattr(model, name), arguments, results, exact=False)


@draws("models.Tagger")
def make_tagger(draw: Draw) -> Call:
    columns = draw.choice(1, 2)
    arguments = {"vocab_sizes": [WORDS] * columns, "num_tags": draw.size(1), "embedding_dims": [3] * columns}
    arguments |= {"hidden_size": 4, "num_layers": 1, "dropout": 0.1, "decoder": None, "freeze_vectors": False}
    arguments["vectors"] = torch.zeros(WORDS, 3) if draw.chance(0.5) else None
    return Call(models.Tagger, arguments, spoils=False)


@draws("models.SoftmaxDecoder.forward", "models.SoftmaxDecoder.viterbi")
def softmax(draw: Draw, name: str) -> Call:
    b, t, k = draw.sizes(1, 1, 1)
    emissions = draw.floats((b, t, k), draw.dtype())
    mask = torch.arange(t) < draw.integers((b, 1), 0, t + 1, torch.int64)
    arguments: dict[str, Any] = {"emissions": emissions, "mask": mask}
    if name == "viterbi":
        results = [((b, t), torch.int64), ((b,), torch.float32)]
    else:
        arguments |= {"tags": draw.integers((b, t), 0, k, torch.int64), "reduction": draw.choice("sum", "mean")}
        results = [((), torch.float32)]
    return Call(getattr(models.SoftmaxDecoder(), name), arguments, results, exact=False)


@functools.cache
def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=20, **sizes)).eval()


@functools.cache
def classifier(pooling: Any) -> models.TextClassifier:
    return models.TextClassifier(encoder(), 3, pooling=pooling).eval()


@functools.cache
def regressor(text: bool, categories: int, bags: int) -> models.TextRegressor:
    torch.manual_seed(0)
    sizes = {"category_sizes": [WORDS] * categories, "bags": bags, "bag_size": WORDS, "hidden_size": 4}
    return models.TextRegressor(encoder() if text else None, numeric=2, **sizes).eval()


def text(draw: Draw, b: int) -> dict[str, Tensor]:
    """Right-padded texts of at least one token."""
    s = draw.size(1)
    mask = torch.arange(s) < draw.integers((b, 1), 1, s + 1, torch.int64)
    mask = mask.to(draw.choice(torch.int64, torch.bool, torch.float32))
    return {"input_ids": draw.integers((b, s), 0, WORDS, torch.int64), "attention_mask": mask}


@draws("models.TextClassifier.logits", "models.TextClassifier.predict", "models.TextClassifier.forward")
def classify(draw: Draw, name: str) -> Call:
    b = draw.size(1)
    arguments: dict[str, Any] = text(draw, b)
    results = [((b,), torch.int64)] if name == "predict" else [((b, 3), torch.float32)]
    if name == "forward" and draw.chance(0.7):
        arguments["labels"] = draw.off(draw.integers((b,), 0, 3, torch.int64), -100)
        results = [((), torch.float32)]
        draw.finite = False  # the mean over no label
    return Call(getattr(classifier(draw.choice("mean", "first")), name), arguments, results, exact=False)


@draws("models.TextClassifier")
def make_classifier(draw: Draw) -> Call:
    arguments = {"encoder": encoder(), "num_classes": draw.size(1), "pooling": "mean", "dropout": 0.1}
    return Call(models.TextClassifier, arguments | {"label_smoothing": 0.1, "packed": True}, spoils=False)


@draws("models.TextRegressor.logarithms", "models.TextRegressor.forward")
def regress(draw: Draw, name: str) -> Call:
    b, c, m = draw.size(1), draw.choice(0, 2), draw.choice(0, 1, 2)
    arguments: dict[str, Any] = text(draw, b)
    arguments["numeric"] = draw.floats((b, 2), torch.float32)
    arguments["categories"] = draw.integers((b, c), 0, WORDS, torch.int64)
    arguments["bag_offsets"] = draw.bounds(b * m, 3).long()
    arguments["bag_ids"] = draw.integers((int(arguments["bag_offsets"][-1]),), 0, WORDS, torch.int64)
    results = [((b,), torch.float32)]
    if name == "forward" and draw.chance(0.7):
        arguments["targets"] = draw.floats((b,), torch.float32)
        results = [((), torch.float32)]
    return Call(getattr(regressor(draw.chance(0.5), c, m), name), arguments, results)


@draws("models.TextRegressor")
def make_regressor(draw: Draw) -> Call:
    arguments = {"encoder": encoder() if draw.chance(0.3) else None, "numeric": 1, "category_sizes": [3, 4], "bags": 1}
    return Call(
        models.TextRegressor,
        arguments | {"bag_size": 5, "hidden_size": 4, "loss": "smape", "pooling": "mean"},
        spoils=False,
    )


@functools.cache
def summarizer(chunk: int | None, copy: bool, coverage: bool) -> models.PointerGeneratorSummarizer:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 3, "hidden_size": 4, "encoder_layers": 1}
    return models.PointerGeneratorSummarizer(WORDS, **sizes, chunk=chunk, copy=copy, coverage=coverage).eval()


@draws(
    "models.PointerGeneratorSummarizer.encode",
    "models.PointerGeneratorSummarizer.forward",
    "models.PointerGeneratorSummarizer.summarize",
)
def summarize(draw: Draw, name: str) -> Call:
    model = summarizer(draw.choice(None, 2), draw.chance(0.8), draw.chance(0.7))
    b, s, t = draw.sizes(1, 1, 1)
    lengths = draw.integers((b,), 0, s + 1, torch.int64)
    on = torch.arange(s) < lengths[:, None]
    extended = torch.where(on, draw.integers((b, s), 4, WORDS + 2, torch.int64), -1)
    ids = torch.where(extended < WORDS, extended, 1).clamp(min=0)
    arguments: dict[str, Any] = {"source_ids": ids, "source_lengths": lengths}
    if name == "encode":
        shapes = [((b, s, 8), torch.float32), ((b, s), torch.bool), ((b, 4), torch.float32), ((b, 4), torch.float32)]
        return Call(model.encode, arguments, shapes)
    arguments["source_extended"] = extended
    if name == "forward":
        arguments["target_inputs"] = draw.integers((b, t), 0, WORDS, torch.int64)
        arguments["targets"] = draw.off(draw.integers((b, t), 0, WORDS, torch.int64), -100)
        return Call(model.forward, arguments, [((), torch.float32)])
    arguments |= {"beam_size": draw.choice(1, 2, 4), "max_steps": draw.choice(1, 3), "min_steps": draw.choice(0, 1)}
    arguments |= {"length_penalty": 1.0, "no_repeat_ngram": draw.choice(0, 2), "early_stopping": draw.chance(0.5)}
    arguments["return_attention"] = draw.chance(0.5)
    return Call(model.summarize, arguments, exact=False)


@draws("models.PointerGeneratorSummarizer")
def make_summarizer(draw: Draw) -> Call:
    arguments = {"vocab_size": WORDS, "embedding_dim": 3, "hidden_size": 4, "encoder_layers": 1, "dropout": 0.1}
    arguments |= {"coverage": True, "coverage_weight": 1.0, "chunk": None, "copy": True, "label_smoothing": 0.0}
    return Call(models.PointerGeneratorSummarizer, arguments, spoils=False)


@functools.cache
def images(channels: int) -> models.ImageClassifier:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    encoder = ResNetModel(ResNetConfig(num_channels=channels, **sizes))
    return models.ImageClassifier(encoder, 3, mean=[9.0] * channels, std=[5.0] * channels).eval()


@draws("models.ImageClassifier.logits", "models.ImageClassifier.predict", "models.ImageClassifier.forward")
def classify_images(draw: Draw, name: str) -> Call:
    channels = draw.choice(1, 3)
    b, h, w = draw.sizes(1, 1, 1)
    arguments: dict[str, Any] = {"pixels": draw.integers((b, draw.choice(1, channels), h, w), 0, 256, torch.uint8)}
    results = [((b,), torch.int64)] if name == "predict" else [((b, 3), torch.float32)]
    if name == "forward" and draw.chance(0.7):
        arguments["labels"] = draw.off(draw.integers((b,), 0, 3, torch.int64), -100)
        results = [((), torch.float32)]
        draw.finite = False  # the mean over no label
    return Call(getattr(images(channels), name), arguments, results, exact=False)


@draws("models.ImageClassifier.augmented")
def augment(draw: Draw) -> Call:
    pixels = draw.integers((*draw.sizes(1, 1), draw.size(1), draw.size(1)), 0, 256, torch.uint8)
    return Call(images(1).augmented, {"pixels": pixels}, [(tuple(pixels.shape), torch.uint8)])


@draws("models.ImageClassifier")
def make_images(draw: Draw) -> Call:
    arguments = {"encoder": images(1).encoder, "num_classes": draw.size(1), "mean": [1.0], "std": [2.0], "shift": 1}
    return Call(models.ImageClassifier, arguments, spoils=False)
