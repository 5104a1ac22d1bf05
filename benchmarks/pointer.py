"""The pointer-generator benchmarks: shapes and rivals only.

    loss       the loss and all its gradients, from the decoder's hidden states on
    decoder    all after the encoder: the decoder's steps and the loss, and all gradients
    memory     a table: what a loss adds to the memory, and what the decoder's steps keep for backward

The baseline of `loss` is the loop over the steps as it is published with most code: softmax, a row of zeros for words
out of the vocabulary, scatter_add, gather, log(p + 1e-12). "vectorised" is the same for all steps at once, "log
space" adds two logarithms instead and has no (B,T,V+) distribution, and "linear_cross_entropy" is that with torch's
own fused linear layer and cross-entropy. "three GEMMs" is a probe: the matrix products that an exact method has
(logits, and the gradients of hidden states and weights), by torch.mm. The baseline of `decoder` is the
published step loop of `fastseq compare summarizer`, and so is its truth, in float64. H = 256, E = 128. The whole
summarizer is a suite of `models`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.functional import pointer_generator_nll
from fastseq_benchmarks import measure, pointer_models, pointer_truth
from fastseq_benchmarks.common import HALF, backends_of, cases_of, forced, gradient_error
from fastseq_benchmarks.pointer_models import TOLERANCE
from fastseq_benchmarks.pointer_truth import OUT_OF_VOCABULARY, LossInputs
from fastseq_benchmarks.results import Table
from fastseq_benchmarks.runner import Case, Rival, Shape, Suite

__all__ = ["SUITES", "TABLES"]

LETTERS = "B,S,T,V"
LOSS_SHAPES: list[Shape] = [(4, 400, 100, 50_000), (4, 400, 100, 8_000), (1, 768, 192, 47_500)]
DECODER_SHAPES: list[Shape] = [(4, 400, 100, 50_000), (4, 768, 192, 50_000), (16, 400, 100, 50_000)]
KEPT_SHAPE = (16, 768, 192, 1_000)  # no vocabulary is involved
LOSS_GOALS = {LOSS_SHAPES[0]: (12.0, 25.0)}  # float32, and with bf16 products
DECODER_GOALS: dict[Shape, tuple[float, ...]] = {
    DECODER_SHAPES[0]: (14.0, 25.0),
    DECODER_SHAPES[1]: (10.0,),
    DECODER_SHAPES[2]: (7.0, 12.0),
}


# ---- rivals ---------------------------------------------------------------------------------------------


def step_loop(leaves: dict[str, Tensor], inputs: LossInputs) -> Tensor:
    """The loss as it is published: a step at a time, over the extended distribution."""
    hidden, weight, bias, attention, gate = leaves.values()
    B, T, _ = hidden.shape
    source = inputs.source_ids.clamp(min=0)  # padding has no attention
    zeros = hidden.new_zeros(B, OUT_OF_VOCABULARY)
    losses = []
    for t in range(T):
        vocabulary = F.softmax(F.linear(hidden[:, t], weight, bias), dim=1)
        generate = torch.sigmoid(gate[:, t : t + 1])
        extended = torch.cat([generate * vocabulary, zeros], 1)
        extended = extended.scatter_add(1, source, (1 - generate) * attention[:, t])
        p = extended.gather(1, inputs.target_ids[:, t : t + 1]).squeeze(1)
        losses.append(-torch.log(p + 1e-12))
    return torch.stack(losses, 1).mean()


def vectorised(leaves: dict[str, Tensor], inputs: LossInputs) -> Tensor:
    """The published loss, all steps at once."""
    hidden, weight, bias, attention, gate = leaves.values()
    B, T, _ = hidden.shape
    generate = torch.sigmoid(gate)[:, :, None]
    vocabulary = generate * F.softmax(F.linear(hidden, weight, bias), dim=-1)
    extended = torch.cat([vocabulary, hidden.new_zeros(B, T, OUT_OF_VOCABULARY)], -1)
    source = inputs.source_ids.clamp(min=0)[:, None, :].expand_as(attention)
    extended = extended.scatter_add(2, source, (1 - generate) * attention)
    return -torch.log(extended.gather(2, inputs.target_ids[:, :, None]) + 1e-12).mean()


def log_space(leaves: dict[str, Tensor], inputs: LossInputs) -> Tensor:
    """The loss without the extended distribution, in plain torch."""
    return -pointer_truth.log_likelihood(*leaves.values(), inputs.source_ids, inputs.target_ids).mean()


def linear_cross_entropy(leaves: dict[str, Tensor], inputs: LossInputs) -> Tensor:
    """The same by torch's fused linear layer and cross-entropy."""
    hidden, weight, bias, attention, gate = leaves.values()
    target = inputs.target_ids
    known = target < weight.shape[0]
    rows = F.linear_cross_entropy(
        hidden.flatten(0, 1), weight, target.where(known, 0).flatten(), linear_bias=bias, reduction="none"
    )
    generate = (F.logsigmoid(gate) - rows.view_as(gate)).masked_fill(~known, -torch.inf)
    mass = (attention * (inputs.source_ids[:, None, :] == target[:, :, None])).sum(-1)
    there = mass > 0
    copy = (F.logsigmoid(-gate) + mass.where(there, 1).log()).masked_fill(~there, -torch.inf)
    return -torch.logaddexp(generate, copy).mean()


def fused(leaves: dict[str, Tensor], inputs: LossInputs) -> Tensor:
    """Fastseq's."""
    return pointer_generator_nll(*leaves.values(), inputs.source_ids, inputs.target_ids)


def training_step(loss: Callable[..., Tensor], inputs: Any) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """(a call: the loss, then its gradients; the same call, giving them by name)."""
    leaves = inputs.leaves()

    def step() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        value = loss(leaves, inputs)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    def named() -> dict[str, Tensor]:
        value = step().detach().clone()
        return {"loss": value} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    return step, named


def fastseq_rivals(op: str, args: Sequence[Any], loss: Callable[..., Tensor], inputs: Any) -> list[Rival]:
    """Each backend that the op has for the device, and the compiled one of a CPU with bf16 products too."""
    device = args[0].device.type
    backends = backends_of(op, device)
    rivals = [
        Rival(
            f"fastseq {b.name}",
            *training_step(loss, inputs),
            functools.partial(forced, b.name),
            missing=b.refusal(*args) or "",
        )
        for b in backends
    ]
    if device == "cpu" and args[0].dtype == torch.float32:
        half = functools.partial(forced, "cpu", half=True)
        allowed = TOLERANCE[torch.bfloat16]
        missing = backends[0].refusal(*args) or ""
        rivals.append(
            Rival("fastseq cpu" + HALF, *training_step(loss, inputs), half, tolerance=allowed, missing=missing)
        )
    return rivals


def _loss_rivals(inputs: LossInputs) -> list[Rival]:
    plain = {
        "step loop": step_loop,
        "vectorised": vectorised,
        "log space": log_space,
        "linear_cross_entropy": linear_cross_entropy,
    }
    tensors = (inputs.hidden, inputs.weight, inputs.bias, inputs.attention, inputs.gate)
    args = (*tensors, inputs.source_ids, inputs.target_ids, -100, 0.0, 0.0, None)
    return [
        *(Rival(name, *training_step(loss, inputs)) for name, loss in plain.items()),
        *fastseq_rivals("pointer_nll_grad", args, fused, inputs),
        Rival("three GEMMs", three_products(inputs.hidden, inputs.weight), probe=True),
    ]


def three_products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """The logits, and the gradients of hidden states and weights, of every row."""
    x, w = hidden.detach().flatten(0, 1), weight.detach().to(hidden.dtype)
    z, dx, dw = x.new_zeros(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.t(), x, out=dw)

    return run


# ---- suites ---------------------------------------------------------------------------------------------


def _goals(goals: Mapping[Shape, tuple[float, ...]], shape: Shape) -> dict[str, float]:
    return dict(zip(("fastseq cpu", "fastseq cpu" + HALF), goals.get(shape, ()), strict=False))


def loss_cases(shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> list[Case]:
    """The loss and all its gradients."""
    return cases_of(
        shapes,
        dtype,
        device,
        family="pointer",
        suite="loss",
        letters=LETTERS,
        make_inputs=pointer_truth.make_loss_inputs,
        rivals=_loss_rivals,
        truth=pointer_truth.loss_and_gradients,
        check=gradient_error,
        tolerance=TOLERANCE[dtype],
        work=lambda inputs: 3.0 * inputs.gate.numel() * inputs.weight.numel(),
        goals=functools.partial(_goals, LOSS_GOALS),
    )


def decoder_cases(shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> list[Case]:
    """All after the encoder."""
    return cases_of(
        shapes,
        dtype,
        device,
        family="pointer",
        suite="decoder",
        letters=LETTERS,
        make_inputs=functools.partial(pointer_models.make_inputs, False),
        rivals=pointer_models.rivals,
        truth=pointer_models.loss_and_gradients,
        check=gradient_error,
        tolerance=TOLERANCE[dtype],
        goals=functools.partial(_goals, DECODER_GOALS),
    )


def memory(dtype: torch.dtype, device: str) -> Table:
    """What a loss and its gradients add to the memory, and what the decoder's steps keep of it for backward."""
    table = Table(
        f"pointer memory, MiB   {dtype} on {device}",
        ["what", LETTERS, "rival", "peak, gradients not counted", "kept for backward"],
        [],
    )
    shape, kept_shape = (",".join(map(str, s)) for s in (LOSS_SHAPES[0], KEPT_SHAPE))
    inputs = pointer_truth.make_loss_inputs(LOSS_SHAPES[0], dtype, device, seed=0)
    for rival in _loss_rivals(inputs):
        if rival.probe or rival.missing:
            continue
        with rival.context():
            rival.call()  # libraries set themselves up; and the gradients are there, to be replaced
            peak, kept = measure.peak_bytes(rival.call, device), measure.kept_bytes(rival.call)
        table.rows.append(["loss", shape, rival.name, *map(_mebibytes, (peak, kept))])
    steps = pointer_models.make_inputs(False, KEPT_SHAPE, dtype, device, seed=0)
    for name, bytes_ in pointer_models.kept_by_steps(steps).items():
        table.rows.append(["decoder's steps", kept_shape, name, "", _mebibytes(bytes_)])
    return table


def _mebibytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.1f}"


SUITES = {
    "loss": Suite(loss_cases, LETTERS, LOSS_SHAPES),
    "decoder": Suite(decoder_cases, LETTERS, DECODER_SHAPES),
}
TABLES: dict[str, Callable[[torch.dtype, str], Table]] = {"memory": memory}
