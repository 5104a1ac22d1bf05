"""The truth of the attention benchmarks: the definitions in float64, by torch and autograd alone.

It shares no code with fastseq.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DisentangledInputs",
    "Inputs",
    "disentangled_outputs_and_gradients",
    "make_disentangled_inputs",
    "make_inputs",
    "outputs_and_gradients",
]

BUCKETS, MAX_POSITION = 256, 512
POSITIONS = 2 * BUCKETS


@dataclasses.dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output, all (B,S,H,D); a bias (1,H,S,S) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        found = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias}
        return {name: x for name, x in found.items() if x is not None}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of that."""
        return {name: x.detach().to(dtype).clone().requires_grad_() for name, x in self.tensors().items()}

    def there(self, out: Tensor) -> Tensor:
        """The part of an output that is compared: all of it."""
        return out

    def arguments(self, dropout: float) -> tuple[Any, ...]:
        """Those of the op `attention`."""
        S, D = self.q.shape[1], self.q.shape[3]
        seed = torch.zeros(1, dtype=torch.int64, device=self.q.device)
        numbers = (S, S, D**-0.5, False, -1, -1, 0.0, dropout)
        return self.q, self.k, self.v, self.bias, None, None, None, None, seed, *numbers

    def multiply_adds(self) -> float:
        """Of two products forward and five backward."""
        B, S, H, D = self.q.shape
        return 7.0 * B * H * S * S * D


def make_inputs(bias: bool, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """B, H, S, D: normal numbers."""
    B, H, S, D = shape
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(B, S, H, D, generator=g).to(device, dtype) for _ in range(4))
    return Inputs(q, k, v, grad, torch.randn(1, H, S, S, generator=g).to(device, dtype) if bias else None)


def outputs_and_gradients(inputs: Inputs) -> dict[str, Tensor]:
    """The output, and the gradients of its product with `grad`."""
    leaves = inputs.leaves(torch.float64)
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if "bias" in leaves:
        scores = scores + leaves["bias"]
    return _backward((scores.softmax(-1) @ v).transpose(1, 2), inputs.grad, leaves)


@dataclasses.dataclass(frozen=True)
class DisentangledInputs:
    """q, k, v and the gradient (B,S,H,D); tables (P,H,D); lengths (B,) int32; slots of distances (2S-1,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    pos_key: Tensor
    pos_query: Tensor
    lengths: Tensor
    slots: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        return {name: getattr(self, name) for name in ("q", "k", "v", "pos_key", "pos_query")}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of that."""
        return {name: x.detach().to(dtype).clone().requires_grad_() for name, x in self.tensors().items()}

    def there(self, out: Tensor) -> Tensor:
        """The part of an output that is compared: that of positions that exist."""
        on = torch.arange(out.shape[1], device=out.device) < self.lengths[:, None]
        return out.masked_fill(~on[:, :, None, None], 0)

    def arguments(self, dropout: float) -> tuple[Any, ...]:
        """Those of the op `disentangled_attention`."""
        S, D = self.q.shape[1], self.q.shape[3]
        seed = torch.zeros(1, dtype=torch.int64, device=self.q.device)
        tables = (self.pos_key, self.pos_query, self.slots)
        return self.q, self.k, self.v, *tables, None, self.lengths, seed, S, (3 * D) ** -0.5, dropout

    def multiply_adds(self) -> float:
        """The seven products of attention, and three forward and backward with each table, at most S slots wide."""
        _, S, H, D = self.q.shape
        n = self.lengths.double()
        return float(((7 * n * n + 6 * n * min(2 * S - 1, POSITIONS)) * H * D).sum())


def make_disentangled_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> DisentangledInputs:
    """B, H, S, D: normal numbers; lengths uniform in [S/2, S]; the gradient of padding is 0."""
    B, H, S, D = shape
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(B, S, H, D, generator=g) for _ in range(4))
    tables = [torch.randn(POSITIONS, H, D, generator=g).to(device, dtype) for _ in range(2)]
    lengths = torch.randint(max(S // 2, 1), S + 1, (B,), generator=g, dtype=torch.int32)
    lengths[0] = S
    grad *= (torch.arange(S) < lengths[:, None])[:, :, None, None]
    q, k, v, grad = (x.to(device, dtype) for x in (q, k, v, grad))
    return DisentangledInputs(q, k, v, grad, *tables, lengths.to(device), log_buckets(S).to(device))


def log_buckets(length: int) -> Tensor:
    """The slots (2 length - 1,) of distances i - j, as DeBERTa-v2 has them: exact when near, logarithmic far off."""
    distance = torch.arange(-(length - 1), length)
    middle = BUCKETS // 2
    far = torch.log(distance.abs() / middle) / math.log((MAX_POSITION - 1) / middle) * (middle - 1)
    bucket = torch.where(distance.abs() < middle, distance, (torch.ceil(far) + middle) * distance.sign())
    return (bucket.long() + BUCKETS).clamp(0, POSITIONS - 1).int()


def disentangled_outputs_and_gradients(inputs: DisentangledInputs) -> dict[str, Tensor]:
    """The output, 0 where there is padding, and the gradients of its product with `grad`."""
    leaves = inputs.leaves(torch.float64)
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    pos_key, pos_query = (leaves[name].transpose(0, 1) for name in ("pos_key", "pos_query"))
    B, H, S, D = q.shape
    here = torch.arange(S, device=q.device)
    index = inputs.slots.long()[here[:, None] - here + S - 1].expand(B, H, S, S)
    c2p = (q @ pos_key.transpose(1, 2)).gather(3, index)
    p2c = (k @ pos_query.transpose(1, 2)).gather(3, index.transpose(2, 3)).transpose(2, 3)
    scores = (q @ k.transpose(2, 3) + c2p + p2c) / math.sqrt(3 * D)
    on = here < inputs.lengths[:, None]
    scores = scores.masked_fill(~on[:, None, None], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return _backward(inputs.there(out), inputs.grad, leaves)


def _backward(out: Tensor, grad: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    out.backward(grad.double())  # type: ignore[no-untyped-call]
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}
