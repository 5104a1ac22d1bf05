"""functional.pointer_generator_* and copynet_nll, and nn.PointerGeneratorDecoder."""

from __future__ import annotations

from typing import Any

import torch
from harness import Call, Draw, draws
from torch import Tensor, nn

from fastseq import functional
from fastseq.nn import PointerGeneratorDecoder


def output_layer(draw: Draw, b: int, t: int) -> dict[str, Any]:
    """hidden, weight and bias."""
    h, v = draw.size(1), draw.size(1)
    dtype = draw.dtype()
    bias = draw.floats((v,), draw.other(dtype)) if draw.chance(0.8) else None
    return {"hidden": draw.floats((b, t, h), dtype), "weight": draw.floats((v, h), draw.other(dtype)), "bias": bias}


def copying(draw: Draw, b: int, t: int, s: int, dtype: torch.dtype) -> dict[str, Any]:
    """attention, gate."""
    attention = draw.probabilities((b, t, s), draw.other(dtype))
    return {"attention": attention, "gate": draw.floats((b, t), draw.other(dtype))}


def result_of(arguments: dict[str, Any]) -> torch.dtype:
    dtypes = [x.dtype for x in arguments.values() if isinstance(x, Tensor)]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def source(draw: Draw, b: int, s: int, words: int) -> Tensor:
    return draw.off(draw.integers((b, s), 0, words, draw.choice(torch.int64, torch.int32, torch.int16)), -1)


def targets(draw: Draw, b: int, t: int, words: int) -> Tensor:
    return draw.off(draw.integers((b, t), 0, words, draw.choice(torch.int64, torch.int32, torch.int16)), -100)


@draws("functional.pointer_generator_nll", "functional.copynet_nll")
def nll(draw: Draw, name: str) -> Call:
    b, t, s = draw.sizes(0, 0, 0)
    arguments = output_layer(draw, b, t)
    words = len(arguments["weight"]) + draw.choice(0, 2)
    if name == "copynet_nll":
        arguments["copy_scores"] = draw.floats((b, t, s), draw.other(arguments["hidden"].dtype))
    else:
        arguments |= copying(draw, b, t, s, arguments["hidden"].dtype)
        arguments["label_smoothing"] = draw.choice(0.0, 0.0, 0.1)
        arguments["z_loss"] = draw.choice(0.0, 0.0, 1e-3)
    result = result_of(arguments)
    arguments |= {"source_ids": source(draw, b, s, words), "target_ids": targets(draw, b, t, words)}
    arguments |= {"ignore_index": -100, "reduction": draw.choice("none", "sum", "mean")}
    draw.finite = False  # a target that can be neither generated nor copied costs inf, and 0 of inf is NaN in a mean
    shape = (b, t) if arguments["reduction"] == "none" else ()
    return Call(getattr(functional, name), arguments, [(shape, result)])


@draws("functional.pointer_generator_distribution")
def distribution(draw: Draw) -> Call:
    b, t, s, v, oov = draw.sizes(0, 0, 0, 1, 0)
    dtype = draw.dtype()
    arguments = {"logits": draw.floats((b, t, v), dtype), **copying(draw, b, t, s, dtype)}
    result = result_of(arguments)
    arguments |= {"source_ids": source(draw, b, s, v + oov), "num_oov": oov}
    return Call(functional.pointer_generator_distribution, arguments, [((b, t, v + oov), result)])


@draws("functional.pointer_generator_topk")
def topk(draw: Draw) -> Call:
    b, t, s = draw.sizes(0, 0, 0)
    arguments = output_layer(draw, b, t)
    arguments |= copying(draw, b, t, s, arguments["hidden"].dtype)
    result, v = result_of(arguments), len(arguments["weight"])
    k = arguments["k"] = 1 + draw.random.randrange(v)
    arguments["source_ids"] = source(draw, b, s, v + 2)
    results = [((b, t, k), result), ((b, t, k), torch.int64)]
    return Call(functional.pointer_generator_topk, arguments, results, exact=False)


@draws("nn.PointerGeneratorDecoder")
def make(draw: Draw) -> Call:
    names = ("vocab_size", "embedding_dim", "hidden_size", "memory_size")
    arguments: dict[str, Any] = dict(zip(names, draw.sizes(1, 1, 1, 1), strict=True))
    arguments["coverage"] = draw.chance(0.5)
    arguments["embedding"] = nn.Embedding(5, arguments["embedding_dim"]) if draw.chance(0.3) else None
    return Call(PointerGeneratorDecoder, arguments)


def decoder(draw: Draw) -> tuple[PointerGeneratorDecoder, dict[str, Any]]:
    """A decoder, and a memory with its mask."""
    v, e, h, m = (draw.choice(1, 2, 5, 9) for _ in range(4))
    torch.manual_seed(draw.random.randrange(100))
    embedding = nn.Embedding(v, e) if draw.chance(0.3) else None
    module = PointerGeneratorDecoder(v, e, h, m, draw.chance(0.7), embedding=embedding).to(draw.dtype())
    b, s = draw.sizes(0, 0)
    return module, {"memory": draw.floats((b, s, m), draw.dtype()), "memory_mask": draw.mask((b, s), bytes_too=False)}


def words(draw: Draw, module: PointerGeneratorDecoder, shape: tuple[int, ...]) -> Tensor:
    """Ids, where there is a table, or embeddings."""
    if module.embedding is not None and draw.chance(0.7):
        return draw.integers(shape, 0, module.embedding.num_embeddings, draw.choice(torch.int64, torch.int32))
    return draw.floats((*shape, module.lstm.input_size), draw.dtype())


def state(draw: Draw, module: PointerGeneratorDecoder, b: int, s: int) -> Any:
    """Hidden and cell, or these, context and coverage, or None."""
    h, m, dtype = module.lstm.hidden_size, module.score.shape[0], draw.dtype()
    parts = [draw.floats((b, n), dtype) for n in (h, h, m)] + [draw.floats((b, s), dtype).abs()]
    return draw.choice(None, tuple(parts[:2]), tuple(parts))


def documented(module: PointerGeneratorDecoder, b: int, s: int, steps: tuple[int, ...]) -> list[Any]:
    """Hidden, attention, gate, coverage, coverage_loss and the state of four."""
    h, m, own = module.lstm.hidden_size, module.score.shape[0], module.score.dtype
    working = torch.float64 if own == torch.float64 else torch.float32
    shapes = [(b, *steps, s), (b, *steps), (b, s), (b, *steps), (b, h), (b, h), (b, m), (b, s)]
    return [((b, *steps, h), own), *((shape, working) for shape in shapes)]


@draws("nn.PointerGeneratorDecoder.forward", "nn.PointerGeneratorDecoder.step")
def decode(draw: Draw, name: str) -> Call:
    module, arguments = decoder(draw)
    (sources, s), b = arguments["memory"].shape[:2], arguments["memory"].shape[0] * draw.choice(1, 1, 3)
    del sources
    if name == "forward":
        steps: tuple[int, ...] = (draw.size(),)
        arguments["target_embeddings"] = words(draw, module, (b, *steps))
        arguments["initial_state"] = state(draw, module, b, s)
    else:
        steps = ()
        arguments["target_embedding"] = words(draw, module, (b,))
        arguments["state"] = state(draw, module, b, s)
        if draw.chance(0.3):
            arguments["features"] = draw.floats(tuple(arguments["memory"].shape), draw.dtype())
    results = documented(module, b, s, steps)
    return Call(getattr(module, name), arguments, results, words=("target_embeddings", "state"))


@draws("nn.PointerGeneratorDecoder.features")
def features(draw: Draw) -> Call:
    module, arguments = decoder(draw)
    working = torch.float64 if module.score.dtype == torch.float64 else torch.float32
    shape = tuple(arguments["memory"].shape)
    return Call(module.features, {"memory": arguments["memory"]}, [(shape, working)])
