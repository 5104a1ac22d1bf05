"""The summarizer of the pointer-generator benchmarks, fused and as a published step loop, and its truth in float64."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastseq.models.summarizer import Memory, PointerGeneratorSummarizer
from fastseq.recipes.summarizer.plain import PlainSummarizer
from fastseq_benchmarks import measure, pointer_truth
from fastseq_benchmarks.common import HALF, backends_of, forced
from fastseq_benchmarks.runner import Rival

__all__ = ["TOLERANCE", "ModelInputs", "kept_by_steps", "loss_and_gradients", "make_inputs", "rivals", "training_step"]

EMBEDDING, HIDDEN, CHUNK = 128, pointer_truth.HIDDEN, 128
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A model and one batch for it; `whole` says whether the encoder and the optimizer belong to a step.

    Attributes:
        model: The first weights.
        batch: The arguments of its forward pass.
        memory, hidden, cell: (B,S,2H), (B,H), (B,H): what stands for the encoder where it is left out.
        mask: (B,S) bool.
    """

    model: PointerGeneratorSummarizer
    batch: dict[str, Tensor]
    memory: Tensor
    hidden: Tensor
    cell: Tensor
    mask: Tensor
    whole: bool

    def fused(self) -> nn.Module:
        """A copy of the model."""
        model = copy.deepcopy(self.model)
        if not self.whole:
            memory, hidden, cell = self._leaves(model)
            encoded = Memory(memory, self.mask, (hidden, cell))
            model.encode = lambda *_: encoded  # type: ignore[method-assign]
        return model

    def plain(self) -> nn.Module:
        """The published loop with its weights."""
        model = PlainSummarizer(self.model)
        if not self.whole:
            memory, hidden, cell = self._leaves(model)
            mask = self.mask.to(memory.dtype)
            model.encode = lambda *_: (memory, mask, (hidden[None], cell[None]))  # type: ignore[method-assign]
        return model

    def _leaves(self, model: nn.Module) -> list[nn.Parameter]:
        """What stands for the encoder, as parameters of a model: their gradients are asked for and compared."""
        leaves = {name: nn.Parameter(getattr(self, name).clone()) for name in ("memory", "hidden", "cell")}
        for name, leaf in leaves.items():
            model.register_parameter(f"first_{name}", leaf)
        return list(leaves.values())


def make_inputs(whole: bool, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> ModelInputs:
    """B, S, T, V: a fresh model and ids by Zipf's law; no target is padding."""
    B, S, _, V = shape
    g = torch.Generator().manual_seed(seed)
    source, target, lengths = pointer_truth.make_ids(shape, g)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PointerGeneratorSummarizer(
            V, embedding_dim=EMBEDDING, hidden_size=HIDDEN, encoder_layers=2, chunk=CHUNK
        )
    inputs = torch.cat([torch.full((B, 1), 2), target[:, :-1]], 1)
    batch = {
        "source_ids": source.where(source < V, 1).clamp(min=0),
        "source_extended": source,
        "source_lengths": lengths,
        "target_inputs": inputs.where(inputs < V, 1),
        "targets": target,
    }
    floats = (torch.randn(B, *rest, generator=g).mul_(0.5) for rest in ((S, 2 * HIDDEN), (HIDDEN,), (HIDDEN,)))
    memory, hidden, cell = (t.to(device, dtype) for t in floats)
    mask = (torch.arange(S) < lengths[:, None]).to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    return ModelInputs(model.to(device, dtype), batch, memory, hidden, cell, mask, whole)


def training_step(
    model: nn.Module, inputs: ModelInputs
) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    """(a call: the loss, its gradients and, of a whole model, an update; a call that gives loss and gradients)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if inputs.whole else None

    def backward() -> Tensor:
        for p in model.parameters():
            p.grad = None
        loss = cast(Tensor, model(**inputs.batch))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step() -> Tensor:
        loss = backward()
        if optimizer is not None:
            optimizer.step()
        return loss

    def named() -> dict[str, Tensor]:
        return {"loss": backward().detach().clone()} | _gradients(model)

    return step, named


def rivals(inputs: ModelInputs) -> list[Rival]:
    """The published step loop, and the model on each backend, and with bf16 products on a CPU."""
    plain = Rival("step loop", *training_step(inputs.plain(), inputs))
    device = inputs.memory.device.type
    backends = backends_of("pointer_decoder", device)
    found = [plain]
    for b in backends:
        step = training_step(inputs.fused(), inputs)
        found.append(Rival(f"fastseq {b.name}", *step, functools.partial(forced, b.name), missing=b.available() or ""))
    if device == "cpu" and inputs.memory.dtype == torch.float32:
        half = functools.partial(forced, "cpu", half=True)
        step = training_step(inputs.fused(), inputs)
        allowed = 4 * TOLERANCE[torch.bfloat16]  # of small gradients, behind hundreds of steps
        missing = backends[0].available() or ""
        found.append(Rival("fastseq cpu" + HALF, *step, half, tolerance=allowed, missing=missing))
    return found


def model_rivals(inputs: ModelInputs) -> list[Rival]:
    """The published step loop, and the model; under bf16 autocast too."""
    half = functools.partial(torch.autocast, inputs.memory.device.type, torch.bfloat16)
    allowed = 4 * TOLERANCE[torch.bfloat16]
    return [
        Rival("step loop", *training_step(inputs.plain(), inputs)),
        Rival("fastseq", *training_step(inputs.fused(), inputs)),
        Rival("fastseq" + HALF, *training_step(inputs.fused(), inputs), half, tolerance=allowed),
    ]


SAME = ("embedding.", "query.", "gate.", "combine.", "output.", "x_context.", "first_", "memory_projection.", "reduce_")


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the names that both models have; the encoders lie in memory in another way."""
    named = ((name.removeprefix("decoder."), p.grad) for name, p in model.named_parameters())
    return {name: grad for name, grad in named if grad is not None and name.startswith(SAME)}


def loss_and_gradients(inputs: ModelInputs) -> dict[str, Tensor]:
    """The step loop in float64."""
    double = dataclasses.replace(
        inputs,
        model=copy.deepcopy(inputs.model).double(),
        **{name: getattr(inputs, name).double() for name in ("memory", "hidden", "cell")},
    )
    return training_step(double.plain(), double)[1]()


def kept_by_steps(inputs: ModelInputs) -> dict[str, int]:
    """The bytes that the decoder's steps alone keep for backward, beyond their inputs and the weights."""
    model, plain = inputs.model, PlainSummarizer(inputs.model)
    embedded = model.embedding(inputs.batch["target_inputs"]).detach().requires_grad_()
    memory = inputs.memory.clone().requires_grad_()

    def fused() -> Any:
        return model.decoder(embedded, memory, inputs.mask, (inputs.hidden, inputs.cell))

    def loop() -> Any:
        features, mask = plain.memory_projection(memory), inputs.mask.to(memory.dtype)
        state = inputs.hidden.unsqueeze(0), inputs.cell.unsqueeze(0)
        context, seen, outputs = torch.zeros_like(memory[:, 0]), torch.zeros_like(mask), []
        for t in range(embedded.shape[1]):
            x = plain.x_context(torch.cat([context, embedded[:, t]], 1))
            _, state = plain.lstm(x.unsqueeze(1), state)
            context, attention = plain.attend(torch.cat([state[0][0], state[1][0]], 1), memory, features, mask, seen)
            seen = seen + attention
            outputs.append((context, attention))
        return outputs

    given = [embedded, memory, inputs.hidden, inputs.cell, inputs.mask]
    found = {}
    for name, call, owner in (("step loop", loop, plain), ("fastseq", fused, model)):
        found[name] = measure.kept_bytes(call, but=[*given, *owner.parameters()])
    return found
