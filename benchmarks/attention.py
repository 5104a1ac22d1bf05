"""The attention benchmarks: shapes and rivals only.

    attention      forward and backward of softmax attention, no mask, no dropout
    dropout        the same with dropout 0.1, and beside it fastseq without
    bias           the same with an additive bias (1,H,S,S) that wants a gradient
    disentangled   DeBERTa's attention, dropout 0.1, between the projections, lengths uniform in [S/2, S]

Tensors are (B,S,H,D), as projections leave them; a rival that wants (B,H,S,D) gets a view. "sdpa" is torch's
`scaled_dot_product_attention`, which picks its own kernel; "plain" is a product, a softmax and a product. Dropout masks
differ from one implementation to the next, so a rival of `dropout` and `disentangled` is checked without: that its
mask is the one that is written down is what tests/ops checks. The rival of `disentangled` is transformers' own module,
its projections replaced by what hands on the same tensors. Whole encoders are suites of `models`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import functional
from fastseq_benchmarks import attention_truth, encoder_models
from fastseq_benchmarks.attention_truth import DisentangledInputs, Inputs
from fastseq_benchmarks.common import HALF, backends_of, cases_of, forced, gradient_error
from fastseq_benchmarks.runner import Case, Rival, Shape, Suite

__all__ = ["SUITES", "TABLES"]

LETTERS = "B,H,S,D"
SHAPES: list[Shape] = [(8, 12, 128, 64), (8, 12, 384, 64), (4, 12, 512, 64), (1, 8, 2048, 64)]
LARGE: list[Shape] = [(8, 16, 2048, 64), (4, 16, 4096, 128)]  # for a GPU
MIDDLE: list[Shape] = [(8, 12, 384, 64)]
DROPOUT = 0.1
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GOALS = {"attention": 1.0, "dropout": 2.2, "bias": 2.5, "disentangled": 4.0}
HALF_GOALS = {"disentangled": 6.0}

Leaves = dict[str, Tensor]


# ---- rivals ---------------------------------------------------------------------------------------------


def sdpa(x: Leaves, dropout: float) -> Tensor:
    """Torch's own."""
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, x.get("bias"), dropout).transpose(1, 2)


def plain(x: Leaves, dropout: float) -> Tensor:
    """Plain torch."""
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if "bias" in x:
        scores = scores + x["bias"]
    return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2)


def fused(x: Leaves, dropout: float) -> Tensor:
    """Fastseq's."""
    out = functional.attention(x["q"], x["k"], x["v"], attn_bias=x.get("bias"), dropout_p=dropout)
    assert isinstance(out, Tensor)
    return out


def rival(name: str, call: Callable[..., Tensor], inputs: Any, dropout: float, **options: Any) -> Rival:
    """`call(leaves, dropout)`, forward and backward; what is checked is that without dropout."""
    leaves = inputs.leaves()

    def step(p: float = dropout) -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        out = call(leaves, p)
        out.backward(inputs.grad.to(out.dtype))  # type: ignore[no-untyped-call]
        return out

    def named() -> Leaves:
        return {"out": inputs.there(step(0.0).detach())} | {n: x.grad for n, x in leaves.items() if x.grad is not None}

    return Rival(name, step, named, **options)


def backends(op: str, call: Callable[..., Tensor], inputs: Any, dropout: float) -> list[Rival]:
    """Each backend that the op has for the device, and the compiled one of a CPU on bf16 tensors too."""
    device, dtype = inputs.q.device.type, inputs.q.dtype
    there, found = backends_of(op, device), []
    for b in there:
        refusal = b.refusal(*inputs.arguments(dropout)) or ""
        context = functools.partial(forced, b.name)
        found.append(rival(f"fastseq {b.name}", call, inputs, dropout, context=context, missing=refusal))
    if device == "cpu" and dtype == torch.float32:
        half = dataclasses.replace(inputs, **{n: x.bfloat16() for n, x in inputs.tensors().items()})
        context, allowed = functools.partial(forced, "cpu"), TOLERANCE[torch.bfloat16]
        missing = there[0].refusal(*half.arguments(dropout)) or ""
        found.append(
            rival("fastseq cpu" + HALF, call, half, dropout, context=context, tolerance=allowed, missing=missing)
        )
    return found


def _rivals(dropout: float, inputs: Inputs) -> list[Rival]:
    found = [rival("sdpa", sdpa, inputs, dropout), rival("plain", plain, inputs, dropout)]
    found += backends("attention", fused, inputs, dropout)
    if dropout:
        first = backends_of("attention", inputs.q.device.type)[0]
        context, missing = functools.partial(forced, first.name), first.refusal(*inputs.arguments(0.0)) or ""
        found.append(rival(f"fastseq {first.name}, none", fused, inputs, 0.0, context=context, missing=missing))
    return found


def _disentangled_rivals(inputs: DisentangledInputs) -> list[Rival]:
    missing = encoder_models.no_transformers()
    theirs = encoder_models.disentangled_core(inputs) if not missing else (lambda leaves, dropout: leaves["q"])
    slots = inputs.slots

    def ours(x: Leaves, dropout: float) -> Tensor:
        return functional.disentangled_attention(
            x["q"], x["k"], x["v"], x["pos_key"], x["pos_query"], slots=slots, lengths=inputs.lengths, dropout_p=dropout
        )

    return [
        rival("Hugging Face", theirs, inputs, DROPOUT, missing=missing),
        *backends("disentangled_attention", ours, inputs, DROPOUT),
    ]


# ---- suites ---------------------------------------------------------------------------------------------


def cases(
    suite: str, make: Any, rivals: Any, truth: Any, shapes: Sequence[Shape], dtype: torch.dtype, device: str
) -> list[Case]:
    """One case a shape; the floor counts 7 products of a head: 2 forward, 5 backward (9 more of positions)."""
    goals = {"fastseq cpu": GOALS[suite]} | ({"fastseq cpu" + HALF: HALF_GOALS[suite]} if suite in HALF_GOALS else {})
    return cases_of(
        shapes,
        dtype,
        device,
        family="attention",
        suite=suite,
        letters=LETTERS,
        make_inputs=make,
        rivals=rivals,
        truth=truth,
        check=gradient_error,
        tolerance=TOLERANCE[dtype],
        work=lambda inputs: inputs.multiply_adds(),
        goals=lambda _: goals,
    )


def _dense(suite: str, dropout: float, bias: bool) -> Callable[..., list[Case]]:
    make = functools.partial(attention_truth.make_inputs, bias)
    return functools.partial(
        cases, suite, make, functools.partial(_rivals, dropout), attention_truth.outputs_and_gradients
    )


SUITES = {
    "attention": Suite(_dense("attention", 0.0, bias=False), LETTERS, SHAPES, LARGE),
    "dropout": Suite(_dense("dropout", DROPOUT, bias=False), LETTERS, SHAPES, LARGE),
    "bias": Suite(_dense("bias", 0.0, bias=True), LETTERS, MIDDLE),
    "disentangled": Suite(
        functools.partial(
            cases,
            "disentangled",
            attention_truth.make_disentangled_inputs,
            _disentangled_rivals,
            attention_truth.disentangled_outputs_and_gradients,
        ),
        LETTERS,
        MIDDLE,
    ),
}
TABLES: dict[str, Any] = {}
