"""The rivals of ``fastseq compare summarizer``: the pointer-generator as it is usually written.

The training loop and the beam search follow the widely used PyTorch version (atulkum/pointer_summarizer): a
Python loop over the steps, the whole extended distribution in each, and 1e-12 inside the logarithm; one text at a
time in decoding, with a Python object for each hypothesis.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastseq.models.bilstm import mask_of
from fastseq.models.summarizer import IGNORE, START, STOP, UNK, PointerGeneratorSummarizer
from fastseq.recipes.config import RecipeConfig
from fastseq.recipes.errors import ConfigError
from fastseq.recipes.summarizer.phases import Clock
from fastseq.recipes.task import Task

EPSILON = 1e-12

State = tuple[Tensor, Tensor]


def plain(config: RecipeConfig, task: Task) -> PlainSummarizer:
    """The task's network as the published loop; the same weights.

    Args:
        config: of the recipe.
        task: of the summarizer.

    Raises:
        ConfigError: the model does not copy, so that there is no published loop for it.
    """
    like = cast(PointerGeneratorSummarizer, task.model)
    if not like.copy:
        raise ConfigError("model.copying: the published loop is of models that copy, got false")
    return PlainSummarizer(like)


class PlainSummarizer(nn.Module):
    """The same network, loss and first weights as `PointerGeneratorSummarizer`, in plain steps.

    Args:
        like: gives the sizes and the weights; it must be a model that copies.
        clock: is told which phase runs.
    """

    def __init__(self, like: PointerGeneratorSummarizer, clock: Clock | None = None) -> None:
        super().__init__()
        if not like.copy:
            raise ValueError("like: a model that copies is wanted, got one with copy=False")
        self.clock = clock
        self.vocab_size, self.chunk, self.coverage_weight = like.vocab_size, like.chunk, like.coverage_weight
        self.label_smoothing = like.label_smoothing
        self.embedding, self.dropout = copy.deepcopy(like.embedding), nn.Dropout(like.dropout.p)
        self.encoder = like.encoder.as_pytorch()
        self.reduce_hidden, self.reduce_cell = copy.deepcopy(like.reduce_hidden), copy.deepcopy(like.reduce_cell)
        decoder = like.decoder
        self.x_context, self.lstm = copy.deepcopy(decoder.x_context), _one_layer(decoder.lstm)
        self.memory_projection, self.query = copy.deepcopy(decoder.memory_projection), copy.deepcopy(decoder.query)
        self.coverage = _column(decoder.coverage_weight) if decoder.coverage_weight is not None else None
        self.score = _column(decoder.score, transposed=True)
        self.gate, self.combine = copy.deepcopy(decoder.gate), copy.deepcopy(decoder.combine)
        self.output = copy.deepcopy(decoder.output)

    def _phase(self, name: str) -> None:
        if self.clock is not None:
            self.clock.switch(name)

    def encode(self, source_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, State]:
        """The states (B,S,2H), their mask (B,S), and the decoder's first state, (1,B,H) twice."""
        self._phase("embedding")
        embedded = self.dropout(self.embedding(source_ids))
        self._phase("encoder")
        steps = source_ids.shape[1]
        size = self.chunk or steps
        states = torch.cat([self._read(embedded[:, i : i + size], lengths - i) for i in range(0, steps, size)], 1)
        half = states.shape[2] // 2
        ahead = states[torch.arange(len(lengths)), (lengths - 1).clamp(min=0), :half]
        summary = torch.cat([ahead, states[:, 0, half:]], 1)
        hidden, cell = torch.tanh(self.reduce_hidden(summary)), torch.tanh(self.reduce_cell(summary))
        return states, mask_of(lengths, steps).to(states.dtype), (hidden.unsqueeze(0), cell.unsqueeze(0))

    def _read(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """The states of one piece of each source; packed, so that padding is not read."""
        steps = embedded.shape[1]
        rows = (lengths > 0).nonzero()[:, 0]
        counts = lengths[rows].clamp(max=steps).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded[rows], counts, batch_first=True, enforce_sorted=False)
        states = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True, total_length=steps)[0]
        if len(rows) == len(lengths):
            return states
        return states.new_zeros(len(lengths), steps, states.shape[2]).index_copy(0, rows, states)

    def attend(
        self, query: Tensor, states: Tensor, features: Tensor, mask: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The context (B,2H) and the attention (B,S), normalised twice as published."""
        batch, steps, size = states.shape
        expanded = self.query(query).unsqueeze(1).expand(batch, steps, size).contiguous().view(-1, size)
        hidden = features.view(-1, size) + expanded
        if self.coverage is not None:
            hidden = hidden + self.coverage(seen.reshape(-1, 1))
        scores = self.score(torch.tanh(hidden)).view(-1, steps)
        unscaled = torch.softmax(scores, 1) * mask
        attention = unscaled / unscaled.sum(1, keepdim=True)
        return torch.bmm(attention.unsqueeze(1), states).view(-1, size), attention

    def step(
        self,
        words: Tensor,
        state: State,
        context: Tensor,
        seen: Tensor,
        states: Tensor,
        features: Tensor,
        mask: Tensor,
        extended: Tensor,
        extra: int,
    ) -> tuple[Tensor, State, Tensor, Tensor]:
        """One step: the distribution (B,V+extra), the state, the context and the attention."""
        self._phase("embedding")
        embedded = self.dropout(self.embedding(words))
        self._phase("decoder")
        x = self.x_context(torch.cat([context, embedded], 1))
        output, state = self.lstm(x.unsqueeze(1), state)
        both = torch.cat([state[0][0], state[1][0]], 1)
        self._phase("attention")
        context, attention = self.attend(both, states, features, mask, seen)
        self._phase("pointer")
        gate = torch.sigmoid(self.gate(torch.cat([context, both, x], 1)))
        logits = self.output(self.dropout(self.combine(torch.cat([output.view(-1, output.shape[2]), context], 1))))
        words_p = gate * torch.softmax(logits, 1)
        zeros = words_p.new_zeros(len(words), extra)
        final = torch.cat([words_p, zeros], 1).scatter_add(1, extended, (1 - gate) * attention)
        return final, state, context, attention

    def forward(
        self,
        source_ids: Tensor,
        source_extended: Tensor,
        source_lengths: Tensor,
        target_inputs: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """The mean loss of a target word; arguments as of `PointerGeneratorSummarizer`."""
        states, mask, state = self.encode(source_ids, source_lengths)
        features = self.memory_projection(states)
        context, seen = states.new_zeros(len(states), states.shape[2]), torch.zeros_like(mask)
        extended, extra = self._extended(source_extended)
        losses = []
        for t in range(target_inputs.shape[1]):
            final, state, context, attention = self.step(
                target_inputs[:, t], state, context, seen, states, features, mask, extended, extra
            )
            self._phase("loss")
            target = targets[:, t].clamp(min=0)
            loss = -torch.log(final.gather(1, target.unsqueeze(1)).squeeze(1) + EPSILON)
            if self.label_smoothing:
                spread = -torch.log(final[:, : self.vocab_size] + EPSILON).mean(1)
                loss = (1 - self.label_smoothing) * loss + self.label_smoothing * spread
            loss = loss + self.coverage_weight * torch.min(attention, seen).sum(1)
            seen = seen + attention
            losses.append(loss * (targets[:, t] != IGNORE))
        return torch.stack(losses, 1).sum() / (targets != IGNORE).sum()

    def _extended(self, source_extended: Tensor) -> tuple[Tensor, int]:
        """Ids to scatter to (padding has no attention, and goes to 0), and how many are beyond the vocabulary."""
        extra = max(0, int(source_extended.max()) + 1 - self.vocab_size)
        return source_extended.clamp(min=0), extra

    @torch.no_grad()
    def summarize(
        self,
        source_ids: Tensor,
        source_extended: Tensor,
        source_lengths: Tensor,
        beam_size: int = 4,
        max_steps: int = 32,
        min_steps: int = 1,
    ) -> list[list[int]]:
        """Decodes one text after another: the extended ids of each summary."""
        rows = zip(source_ids, source_extended, source_lengths.tolist(), strict=True)
        return [
            self._search(ids[None, :n], extended[None, :n], beam_size, max_steps, min_steps)
            for ids, extended, n in rows
        ]

    def _search(
        self, source_ids: Tensor, source_extended: Tensor, beam_size: int, max_steps: int, min_steps: int
    ) -> list[int]:
        """The published search: the text repeated for each hypothesis, until as many are finished."""
        lengths = torch.full((beam_size,), source_ids.shape[1], device=source_ids.device)
        states, mask, (hidden, cell) = self.encode(source_ids.expand(beam_size, -1), lengths)
        features = self.memory_projection(states)
        extended, extra = self._extended(source_extended.expand(beam_size, -1))
        first = Hypothesis([START], [0.0], (hidden[0, 0], cell[0, 0]), torch.zeros_like(states[0, 0]), mask[0] * 0)
        live, finished, steps = [first] * beam_size, list[Hypothesis](), 0
        while steps < max_steps and len(finished) < beam_size:
            last = [h.words[-1] if h.words[-1] < self.vocab_size else UNK for h in live]
            state = tuple(torch.stack([h.state[i] for h in live]).unsqueeze(0) for i in range(2))
            context, seen = torch.stack([h.context for h in live]), torch.stack([h.seen for h in live])
            words = torch.tensor(last, device=source_ids.device)
            final, state, context, attention = self.step(
                words, cast(State, state), context, seen, states, features, mask, extended, extra
            )
            seen = seen + attention
            values, ids = torch.log(final).topk(2 * beam_size)
            grown = [
                h.extended(ids[i, j].item(), values[i, j].item(), (state[0][0, i], state[1][0, i]), context[i], seen[i])
                for i, h in enumerate(live[:1] if steps == 0 else live)
                for j in range(2 * beam_size)
            ]
            live = []
            for h in sorted(grown, key=lambda h: h.mean, reverse=True):
                if h.words[-1] != STOP:
                    live.append(h)
                elif steps >= min_steps:
                    finished.append(h)
                if len(live) == beam_size or len(finished) == beam_size:
                    break
            steps += 1
        best = max(finished or live, key=lambda h: h.mean)
        return [word for word in best.words[1:] if word != STOP]


@dataclass
class Hypothesis:
    """The published ``Beam``: the words so far, their log-probabilities, and the decoder's state after them."""

    words: list[int]
    log_probs: list[float]
    state: State
    context: Tensor
    seen: Tensor

    def extended(self, word: Any, log_prob: Any, state: State, context: Tensor, seen: Tensor) -> Hypothesis:
        """This one with a word more."""
        return Hypothesis([*self.words, word], [*self.log_probs, log_prob], state, context, seen)

    @property
    def mean(self) -> float:
        """The mean log-probability, which it is judged by."""
        return sum(self.log_probs) / len(self.words)


def _one_layer(cell: nn.LSTMCell) -> nn.LSTM:
    """An LSTM of one layer with a cell's weights."""
    lstm = nn.LSTM(cell.input_size, cell.hidden_size, batch_first=True).to(cell.weight_ih)
    lstm.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return lstm


def _column(vector: Tensor, transposed: bool = False) -> nn.Linear:
    """A linear layer from one number to many, or (transposed) from many to one, with a vector's weights."""
    shape = (len(vector), 1) if transposed else (1, len(vector))
    layer = nn.Linear(*shape, bias=False).to(vector)
    with torch.no_grad():
        layer.weight.copy_(vector.view_as(layer.weight))
    return layer
