"""fastseq.host: the compiled module against its twins in Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from harness import Call, Draw, draws

from fastseq import _host_python, host


@contextlib.contextmanager
def twins() -> Iterator[None]:
    with mock.patch.object(host, "_implementation", _host_python):
        yield


WAYS = (contextlib.nullcontext, twins)


def lengths(draw: Draw) -> Any:
    array = np.array([draw.random.randrange(20) for _ in range(draw.size())])
    kind = draw.choice(np.int64, np.int32, np.uint8, list)
    return array.tolist() if kind is list else array.astype(kind)


@draws("host.bucket_batches")
def bucket_batches(draw: Draw) -> Call:
    arguments: dict[str, Any] = {"lengths": lengths(draw), "seed": draw.choice(0, 1, 2**64 - 1)}
    if draw.chance(0.7):
        arguments |= {"batch_size": draw.size(1), "drop_last": draw.chance(0.3)}
    else:
        arguments |= {"batch_size": draw.choice(None, 4), "max_tokens": draw.choice(20, 50)}
    arguments["window"] = draw.choice(None, 1, 2, 100)
    return Call(host.bucket_batches, arguments, ways=WAYS)


@draws("host.padding_waste")
def padding_waste(draw: Draw) -> Call:
    array = np.array([draw.random.randrange(20) for _ in range(draw.size())], np.int64)
    batches = [*np.array_split(np.arange(len(array)), draw.size(1))]
    return Call(host.padding_waste, {"lengths": array, "batches": [b for b in batches if len(b)]}, ways=WAYS)


TOKENS = ("a", "b", "the", "", "人", "é", "x" * 40, "🙂", "a b", "\x00")


def rows(draw: Draw, count: int) -> list[list[str]]:
    return [[draw.choice(*TOKENS) for _ in range(draw.size())] for _ in range(count)]


def vocabulary(draw: Draw) -> dict[str, Any]:
    words = list(dict.fromkeys(draw.choice(*TOKENS) for _ in range(draw.size(1))))
    return {"words": words, "unk": draw.random.randrange(len(words)), "padding": draw.choice(0, -1, 7)}


@draws("host.ExtendedVocabulary")
def make(draw: Draw) -> Call:
    return Call(lambda **named: len(host.ExtendedVocabulary(**named)), vocabulary(draw), ways=WAYS)


@draws("host.ExtendedVocabulary.encode_sources", "host.ExtendedVocabulary.encode_targets")
def encode(draw: Draw, name: str) -> Call:
    made, count = vocabulary(draw), draw.size()
    arguments: dict[str, Any] = {"sources": rows(draw, count)}
    if name == "encode_targets":
        arguments = {"targets": rows(draw, count), "oov": rows(draw, count)}

    def call(**named: Any) -> Any:
        return getattr(host.ExtendedVocabulary(**made), name)(**named)

    return Call(call, arguments, ways=WAYS)


@draws("host.multiplies_bf16")
def multiplies_bf16(draw: Draw) -> Call:
    return Call(host.multiplies_bf16, {"device": draw.choice("cpu", "cuda")}, ways=WAYS)


@draws("host.keep_memory")
def keep_memory(draw: Draw) -> Call:
    return Call(host.keep_memory, {"on": draw.chance(0.5)}, spoils=False)
