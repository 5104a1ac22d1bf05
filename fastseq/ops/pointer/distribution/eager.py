"""The same in plain torch, on any device: softmax and scatter_add; the best words without anything of size V kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastseq.ops.derivatives import pull_back

__all__ = ["CHUNK", "distribution", "distribution_grad", "double_backward", "products", "topk"]

CHUNK = 1 << 22  # logits at a time: 16 MiB of float32
LAST = torch.iinfo(torch.int64).max  # sorts behind every word


@torch.no_grad()
def distribution(logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, num_oov: int) -> Tensor:
    """The mixture; see `fastseq.ops.pointer.distribution`."""
    v = logits.shape[2]
    _check_ids(source_ids, v + num_oov)
    p = torch.softmax(logits, -1, dtype=gate.dtype)
    attention = attention.masked_fill((source_ids < 0)[:, None], 0)
    generate, copy = torch.sigmoid(gate)[..., None], torch.sigmoid(-gate)[..., None]
    poison = (p[..., :1] + generate + attention.sum(-1, keepdim=True)) * 0  # NaN throughout, or 0
    final = gate.new_empty((*gate.shape, v + num_oov))
    torch.mul(p, generate + poison, out=final[..., :v])
    final[..., v:] = poison
    index = source_ids.clamp(min=0)[:, None].expand(attention.shape)
    return final.scatter_add_(-1, index, attention * copy)


@torch.no_grad()
def distribution_grad(
    grad: Tensor, logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor, num_oov: int
) -> tuple[Tensor, ...]:
    """The gradient of <grad, distribution>; see `fastseq.ops.pointer.distribution`."""
    _check_ids(source_ids, logits.shape[2] + num_oov)
    return tuple(g.contiguous() for g in _gradient(grad, logits, attention, gate, source_ids))


def double_backward(grad_grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of sum <grad_grads, distribution_grad(*inputs)> to grad, logits, attention and gate."""

    def objective(*leaves: Tensor) -> Tensor:
        found = zip(grad_grads, _gradient(*leaves), strict=True)
        return torch.stack([(g * gradient).sum().to(leaves[0].dtype) for g, gradient in found if g is not None]).sum()

    return pull_back(objective, inputs, None)[:4]


def _gradient(grad: Tensor, logits: Tensor, attention: Tensor, gate: Tensor, source_ids: Tensor) -> tuple[Tensor, ...]:
    """The formulas of the package docstring, differentiable."""
    absent = (source_ids < 0)[:, None]
    generate, copy = torch.sigmoid(gate)[..., None], torch.sigmoid(-gate)[..., None]
    p, of_words = torch.softmax(logits, -1, dtype=gate.dtype), grad[..., : logits.shape[2]]
    at = grad.gather(-1, source_ids.clamp(min=0)[:, None].expand(attention.shape)).masked_fill(absent, 0)
    mean = (p * of_words).sum(-1, keepdim=True)
    rest = mean - (attention.masked_fill(absent, 0) * at).sum(-1, keepdim=True)
    poison = (rest * generate * 0).detach()  # NaN throughout, or 0
    to_logits = (generate * p * (of_words - mean) + poison).to(logits.dtype)
    return to_logits, (copy * at + poison).masked_fill(absent, 0), (generate * copy * rest + poison)[..., 0]


# ---- the best words --------------------------------------------------------------------------------------------------


@torch.no_grad()
def topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, attention: Tensor, gate: Tensor, source_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best words of each row; see `fastseq.ops.pointer.distribution`."""
    words, mass = _source_words(attention, source_ids)
    found = [
        _merge(z.to(gate.dtype) if bias is None else z.to(gate.dtype) + bias, ids, masses, gates, k)
        for z, ids, masses, gates in products(hidden, weight, k, words, mass, gate.flatten()[:, None])
    ]
    values, ids = (torch.cat(parts).view(*gate.shape, k) for parts in zip(*found, strict=True))
    return values, ids


def products(hidden: Tensor, weight: Tensor, k: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time: their part of hidden weight^T, (some,V), and their part of each of `rows`, (B*T,...).

    Raises:
        ValueError: There are not k words.
    """
    if not 1 <= k <= len(weight):
        raise ValueError(f"k: got {k}, wanted 1 to V = {len(weight)}")
    some = max(1, CHUNK // len(weight))
    parts = (x.split(some) for x in (hidden.flatten(0, 1), *rows))
    with torch.autocast(hidden.device.type, enabled=False):  # which would multiply in bfloat16
        for h, *others in zip(*parts, strict=True):
            yield torch.mm(h.to(weight.dtype), weight.T), *others


def _source_words(attention: Tensor, source_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different words of each row's source, (B*T,S) ascending and then LAST, and the mass of each."""
    ids, order = source_ids.masked_fill(source_ids < 0, LAST).sort(dim=1, stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    number = is_first.cumsum(1) - 1
    words = torch.full_like(ids, LAST).scatter(1, number, ids)
    attention = attention.gather(2, order[:, None].expand(attention.shape)).masked_fill((ids == LAST)[:, None], 0)
    mass = torch.zeros_like(attention).scatter_add(2, number[:, None].expand(attention.shape), attention)
    return words[:, None].expand(attention.shape).flatten(0, 1), mass.flatten(0, 1)


def _merge(z: Tensor, words: Tensor, mass: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of some rows: z (N,V) logits, (N,S) different source words and their mass, gate (N,1)."""
    v = z.shape[1]
    lse = z.logsumexp(1, keepdim=True)
    generate, copy = logsigmoid(gate), logsigmoid(-gate)
    of_source = z.gather(1, words.clamp(max=v - 1))
    generated = (generate + (of_source - lse)).masked_fill(words >= v, -math.inf)
    source = torch.logaddexp(generated, copy + mass.log()).masked_fill(words == LAST, -math.inf)

    best = _largest(z, k)
    is_source = (best[:, :, None] == words[:, None]).any(2)
    others = (generate + (z.gather(1, best) - lse)).masked_fill(is_source, -math.inf)

    values, ids = torch.cat([others, source], 1), torch.cat([best.masked_fill(is_source, LAST), words], 1)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    poisoned = (lse + torch.sigmoid(gate) + mass.sum(1, keepdim=True)).isfinite().logical_not()
    smallest = torch.arange(k, device=z.device)
    ids = torch.where(poisoned, smallest, ids.gather(1, order[:, :k]))
    return values[:, :k].masked_fill(poisoned, math.nan), ids


def _largest(z: Tensor, k: int) -> Tensor:
    """The ids (N,k) of the k largest of z (N,V), ascending; of equal ones those with the smaller ids."""
    v = z.shape[1]
    least = z.topk(k, 1).values[:, -1:]
    above, level = z > least, z == least
    chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    from_the_end = torch.where(chosen, v - torch.arange(v, device=z.device), 0)
    return (v - from_the_end.topk(k, 1).values).clamp(max=v - 1)  # a row with NaN may have chosen none


def _check_ids(source_ids: Tensor, words: int) -> None:
    """On a CPU, where looking at values waits for nothing."""
    if source_ids.device.type == "cpu" and source_ids.numel() and int(source_ids.max()) >= words:
        raise ValueError(f"source_ids: got {int(source_ids.max())}, wanted ids below V + num_oov = {words}")
