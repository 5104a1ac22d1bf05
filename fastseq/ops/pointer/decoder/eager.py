"""The decoder in plain torch, on any device: a loop over steps forward, and a hand-written one back.

Forward, all that needs no loop is outside it: sums of coverage and its loss are taken once, over all steps. It is made
of differentiable operations only, so under autograd it has derivatives of any order, which keep a (B,S,A) tensor a
step. The reverse loop keeps none: it makes gates and queries of all steps again as large products, and tanh a step at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["decoder", "decoder_grad", "pull_back", "shifted"]


def decoder(
    inputs: Tensor,
    memory: Tensor,
    features: Tensor,
    mask: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
    context: Tensor,
    coverage: Tensor,
    w_context: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor,
    w_query: Tensor,
    b_query: Tensor,
    w_coverage: Tensor | None,
    v: Tensor,
) -> tuple[Tensor, ...]:
    """All steps; see `fastseq.ops.pointer.decoder`."""
    off, memory, features = _without_off(mask, memory, features)
    covered = coverage if off is None else coverage.masked_fill(_rows(off, len(coverage)), 0)
    none, steps = torch.zeros_like(bias), []
    with torch.autocast(inputs.device.type, enabled=False):  # which would multiply matrices in bfloat16
        for part in inputs.unbind(1):
            x = torch.addmm(part, context, w_context.t())
            hidden, cell = torch.lstm_cell(x, (hidden, cell), w_ih, w_hh, bias, none)
            query = torch.addmm(b_query, torch.cat((hidden, cell), 1), w_query.t())
            attention, context = _attend(query, covered, memory, features, off, w_coverage, v)
            if w_coverage is not None:
                covered = covered + attention
            steps.append((x, hidden, cell, context, attention))
    sizes = (w_context.shape[0], hidden.shape[1], hidden.shape[1], context.shape[1], coverage.shape[1])
    x, hiddens, cells, contexts, attention = _stacked(steps, sizes, inputs)
    before = _coverage_before(coverage, attention)
    least = torch.where((attention <= before) | attention.isnan(), attention, before)  # a tie is the attention's
    if off is not None:
        least = least.masked_fill(_rows(off, len(inputs)).unsqueeze(1), 0)
    return x, hiddens, cells, contexts, attention, (coverage + attention.sum(1)).contiguous(), least.sum(2)


def _attend(
    query: Tensor,
    coverage: Tensor,
    memory: Tensor,
    features: Tensor,
    off: Tensor | None,
    w_coverage: Tensor | None,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """The attention (B,S) and the context (B,M) of one step. The rows of a source are beside each other."""
    (sources, positions, size), beam = features.shape, len(query) // max(len(features), 1)
    score = features.unsqueeze(1) + query.view(sources, beam, 1, size)
    if w_coverage is not None:
        score = score.addcmul_(coverage.view(sources, beam, positions, 1), w_coverage)
    energies = score.tanh_() @ v
    if off is None:
        attention = energies.softmax(2)
    else:  # the second fill is for rows with no position on, and for rows with NaN
        off = off.unsqueeze(1)
        attention = energies.masked_fill(off, -torch.inf).softmax(2).masked_fill(off, 0)
    return attention.flatten(0, 1), torch.bmm(attention, memory).flatten(0, 1)


def _without_off(mask: Tensor | None, memory: Tensor, features: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """The positions (Bm,S) that are off, and the memory with zeros there: what it holds may be NaN."""
    if mask is None:
        return None, memory, features
    off = ~mask
    return off, memory.masked_fill(off.unsqueeze(2), 0), features.masked_fill(off.unsqueeze(2), 0)


def _rows(off: Tensor, batch: int) -> Tensor:
    """(B,S) from (Bm,S): a row for each of a source's."""
    return off if len(off) == batch else off.repeat_interleave(batch // max(len(off), 1), 0)


def _coverage_before(coverage: Tensor, attention: Tensor) -> Tensor:
    """(B,T,S): the coverage that each step starts from."""
    return torch.cat((coverage.unsqueeze(1), attention), 1).cumsum(1)[:, :-1]


@torch.no_grad()
def decoder_grad(
    grad_x: Tensor | None,
    grad_hiddens: Tensor | None,
    grad_cells: Tensor | None,
    grad_contexts: Tensor | None,
    grad_attention: Tensor | None,
    grad_coverage: Tensor | None,
    grad_coverage_loss: Tensor | None,
    inputs: Tensor,
    memory: Tensor,
    features: Tensor,
    mask: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
    context: Tensor,
    coverage: Tensor,
    w_context: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor,
    w_query: Tensor,
    b_query: Tensor,
    w_coverage: Tensor | None,
    v: Tensor,
    x: Tensor,
    hiddens: Tensor,
    cells: Tensor,
    contexts: Tensor,
    attention: Tensor,
) -> tuple[Tensor, ...]:
    """The recurrent part of the gradient; see `fastseq.ops.pointer.decoder`."""
    if len(memory) != len(inputs):
        raise ValueError(f"memory: got {len(memory)} rows for {len(inputs)} of inputs, wanted as many for a gradient")
    off, memory, features = _without_off(mask, memory, features)
    with torch.autocast(inputs.device.type, enabled=False):
        cells_of = _Cells(x, hiddens, cells, hidden, cell, w_ih, w_hh, bias)
        queries = torch.cat((hiddens, cells), 2) @ w_query.t() + b_query
        scores_of = _Scores(queries, features, off, coverage, attention, w_coverage, v, grad_coverage_loss)
        d_hidden, d_cell, d_context = torch.zeros_like(hidden), torch.zeros_like(cell), torch.zeros_like(context)
        d_coverage = torch.zeros_like(coverage) if grad_coverage is None else grad_coverage.clone()
        steps = []
        for t in reversed(range(inputs.shape[1])):
            d_context = _plus(d_context, grad_contexts, t)
            d_attention = _plus(d_coverage, grad_attention, t)
            d_attention = torch.baddbmm(d_attention.unsqueeze(2), memory, d_context.unsqueeze(2)).squeeze(2)
            d_query, d_coverage = scores_of.back(t, d_attention, d_coverage)
            d_state = torch.addmm(torch.cat((d_hidden, d_cell), 1), d_query, w_query)
            d_hidden, d_cell = d_state.split(hidden.shape[1], 1)
            d_gates, d_cell = cells_of.back(t, _plus(d_hidden, grad_hiddens, t), _plus(d_cell, grad_cells, t))
            d_x = _plus(d_gates @ w_ih, grad_x, t)
            steps.append((d_x, d_gates, d_query, d_context))
            d_hidden, d_context = d_gates @ w_hh, d_x @ w_context
        sizes = (w_context.shape[0], bias.shape[0], v.shape[0], context.shape[1])
        d_inputs, d_gates, d_query, d_contexts = _stacked(steps[::-1], sizes, inputs)
        d_memory = attention.transpose(1, 2) @ d_contexts
    if off is not None:
        d_memory.masked_fill_(off.unsqueeze(2), 0)
    return (
        d_inputs,
        d_gates,
        d_query,
        d_memory,
        scores_of.d_features(),
        d_hidden.contiguous(),
        d_cell.contiguous(),
        d_context.contiguous(),
        d_coverage.contiguous(),
        scores_of.d_w_coverage(),
        scores_of.d_v,
    )


class _Cells:
    """The way back through LSTM cells: gates of all steps are made again at once, and what is local is taken there."""

    def __init__(
        self,
        x: Tensor,
        hiddens: Tensor,
        cells: Tensor,
        hidden: Tensor,
        cell: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor,
    ) -> None:
        before, previous = shifted(hidden, hiddens), shifted(cell, cells)
        gates = torch.addmm(bias, x.flatten(0, 1), w_ih.t()).addmm_(before.flatten(0, 1), w_hh.t())
        i, f, g, o = gates.view(*x.shape[:2], 4, hidden.shape[1]).unbind(2)
        i, f, g, o, tanh = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), cells.tanh()
        self.forget = f
        self.by_cell = torch.stack((g * i * (1 - i), previous * f * (1 - f), i * (1 - g * g)), 2)
        self.by_hidden = tanh * o * (1 - o)
        self.cell_by_hidden = o * (1 - tanh * tanh)

    def back(self, t: int, d_hidden: Tensor, d_cell: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the gates (B,4H), before their nonlinearities, and of the cell before."""
        d_cell = torch.addcmul(d_cell, d_hidden, self.cell_by_hidden[:, t])
        others = (d_cell.unsqueeze(1) * self.by_cell[:, t]).flatten(1)
        return torch.cat((others, d_hidden * self.by_hidden[:, t]), 1), d_cell * self.forget[:, t]


class _Scores:
    """The way back through softmax and tanh of the scores: tanh is made again, and sums over steps are kept.

    With u = 1 - tanh^2, all of d_features, d_query and d_w_coverage have v as a factor, which is put in at the end.
    """

    def __init__(
        self,
        queries: Tensor,
        features: Tensor,
        off: Tensor | None,
        coverage: Tensor,
        attention: Tensor,
        w_coverage: Tensor | None,
        v: Tensor,
        grad_loss: Tensor | None,
    ) -> None:
        self.queries, self.features, self.attention, self.off = queries, features, attention, off
        self.w_coverage, self.v, self.one = w_coverage, v, torch.ones_like(v)
        if off is not None:
            coverage = coverage.masked_fill(off, 0)
        self.before = _coverage_before(coverage, attention)
        self.loss_by_attention = self.loss_by_coverage = None
        if grad_loss is not None:
            theirs = self.attention <= self.before
            self.loss_by_attention = grad_loss.unsqueeze(2) * theirs
            self.loss_by_coverage = grad_loss.unsqueeze(2) * ~theirs
        self.sum = torch.zeros_like(features, memory_format=torch.contiguous_format)
        self.d_v, self.sum_coverage = torch.zeros_like(self.one), torch.zeros_like(self.one)

    def back(self, t: int, d_attention: Tensor, d_coverage: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the query (B,A) and of the coverage before this step, from those of what it made."""
        a, before = self.attention[:, t], self.before[:, t]
        weighted = a * _plus(d_attention, self.loss_by_attention, t)
        d = torch.addcmul(weighted, a, weighted.sum(1, keepdim=True), value=-1)
        if self.off is not None:
            d.masked_fill_(self.off, 0)  # 0 already, but for rows with NaN
        tanh = self.features + self.queries[:, t].unsqueeze(1)
        if self.w_coverage is not None:
            tanh.addcmul_(before.unsqueeze(2), self.w_coverage)
        tanh.tanh_()
        self.d_v += d.flatten() @ tanh.flatten(0, 1)
        u = torch.addcmul(self.one, tanh, tanh, value=-1, out=tanh)
        self.sum.addcmul_(u, d.unsqueeze(2))
        d_coverage = _plus(d_coverage, self.loss_by_coverage, t)
        if self.w_coverage is None:
            return torch.bmm(d.unsqueeze(1), u).squeeze(1) * self.v, d_coverage
        both = torch.stack((d, d * before), 1) @ u
        self.sum_coverage += both[:, 1].sum(0)
        return both[:, 0] * self.v, torch.addcmul(d_coverage, d, u @ (self.v * self.w_coverage))

    def d_features(self) -> Tensor:
        """(B,S,A)."""
        return self.sum * self.v if self.off is None else (self.sum * self.v).masked_fill_(self.off.unsqueeze(2), 0)

    def d_w_coverage(self) -> Tensor:
        """(A,); (0,) where there is no such weight."""
        return self.v.new_empty(0) if self.w_coverage is None else self.sum_coverage * self.v


def shifted(first: Tensor, later: Tensor) -> Tensor:
    """(B,T,·): what each step starts from, given that of the first step (B,·) and what each step leaves (B,T,·)."""
    return torch.cat((first.unsqueeze(1)[:, : later.shape[1]], later[:, :-1]), 1)


def _plus(x: Tensor, more: Tensor | None, t: int) -> Tensor:
    """The sum of x and the part of step t of a gradient that may be absent."""
    return x if more is None else x + more[:, t]


def _stacked(steps: Sequence[tuple[Tensor, ...]], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
    """The tensors of each step, (B,·), as (B,T,·); there may be no step."""
    if not steps:
        return [like.new_empty((len(like), 0, size)) for size in sizes]
    return [torch.stack(column, 1) for column in zip(*steps, strict=True)]


def pull_back(inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of sum_i <grads_i, decoder(*inputs)_i>, differentiable again; None for inputs without one."""
    leaves = [t if t is None or not t.requires_grad else t.view_as(t) for t in inputs]  # see ops.derivatives
    wanted = {i: t for i, t in enumerate(leaves) if t is not None and t.requires_grad}
    given = [(output, grad) for output, grad in zip(decoder(*leaves), grads, strict=True) if grad is not None]
    given = [(output, grad) for output, grad in given if output.requires_grad]
    if not given:
        return (None,) * len(leaves)
    outputs, weights = zip(*given, strict=True)
    found = torch.autograd.grad(outputs, list(wanted.values()), weights, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(i) for i in range(len(leaves)))
