"""A pointer-generator summarizer: BiLSTM encoder, attention decoder that copies, coverage, beam search.

Letters: B batch, S source positions, T target steps, V vocabulary, E embedding size, H hidden size, K beam size.
Ids below V are the vocabulary's. Extended ids from V on are the words of one source that the vocabulary lacks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq.functional.checks import flag
from fastseq.models.beam import Found, Search, Settings
from fastseq.models.bilstm import BiLSTM, mask_of
from fastseq.models.checks import check_ids

PAD, UNK, START, STOP = range(4)
"""The vocabulary's first ids: padding, a word that it lacks, and what begins and ends a summary."""

IGNORE = -100
"""The target of a step that does not exist."""

ABSENT = -1
"""The extended id of a source position that does not exist."""

MANY = 1 << 62
"""More than any extended id."""

ALWAYS_GENERATE = 1e4  # a gate whose sigmoid is 1 in every float type


class Memory(NamedTuple):
    """An encoded source: the states (B,S,2H), the mask (B,S), and the decoder's first state (B,H) twice."""

    states: Tensor
    mask: Tensor
    first: tuple[Tensor, Tensor]


class Summaries(NamedTuple):
    """What `summarize` gives, a list item for each row.

    Attributes:
        ids: the words, extended ids, without START and STOP.
        scores: log-probability / length penalty; -inf where nothing may be written.
        attention: (words, source length) weights at each word; None where it was not asked for.
        copied_from: of each word, the source position that it was copied from, or -1 where it is more likely
            to have been generated; None where attention was not asked for.
    """

    ids: list[list[int]]
    scores: list[float]
    attention: list[Tensor] | None = None
    copied_from: list[list[int]] | None = None


class PointerGeneratorSummarizer(nn.Module):
    """The pointer-generator network of See et al. 2017, with one embedding for sources and summaries.

    Args:
        vocab_size: V, the four special ids included.
        embedding_dim: E.
        hidden_size: H of the decoder, and of each direction of the encoder.
        encoder_layers: of the BiLSTM.
        dropout: on the embeddings, between the encoder's layers, and on what the vocabulary layer reads.
        coverage: let the attention see what it has read (section 2.3).
        coverage_weight: of the coverage loss, where there is coverage.
        chunk: encode the source in pieces of this many tokens, each on its own; None: whole. A piece is a
            row of the encoder's batch, so that a long source takes as many steps as a piece.
        copy: False gives the same network without copying: the attention model to compare with, for which
            every word beyond the vocabulary is UNK.
        label_smoothing: the share of the loss that is spread over the vocabulary.

    Raises:
        ValueError: a size is not positive.
    """

    decoder: Any  # fastseq.nn.PointerGeneratorDecoder

    def __init__(
        self,
        vocab_size: int,
        *,
        embedding_dim: int = 128,
        hidden_size: int = 256,
        encoder_layers: int = 2,
        dropout: float = 0.0,
        coverage: bool = True,
        coverage_weight: float = 1.0,
        chunk: int | None = None,
        copy: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        from fastseq.nn import PointerGeneratorDecoder

        super().__init__()
        if vocab_size <= STOP + 1:
            raise ValueError(f"vocab_size: more than the {STOP + 1} special ids is wanted, got {vocab_size}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: at least 1 token, or None, is wanted, got {chunk}")
        self.vocab_size, self.chunk, self.copy = vocab_size, chunk, copy
        self.coverage_weight, self.label_smoothing = coverage_weight if coverage else 0.0, label_smoothing
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.encoder = BiLSTM(embedding_dim, hidden_size, encoder_layers, dropout)
        self.reduce_hidden = nn.Linear(2 * hidden_size, hidden_size)
        self.reduce_cell = nn.Linear(2 * hidden_size, hidden_size)
        self.decoder = PointerGeneratorDecoder(vocab_size, embedding_dim, hidden_size, 2 * hidden_size, coverage)
        self.decoder.gate.requires_grad_(copy)  # else it gets no gradient, for which DDP would wait

    def encode(self, source_ids: Tensor, source_lengths: Tensor) -> Memory:
        """Reads the sources.

        Args:
            source_ids: (B,S) int64 ids below V, right-padded with PAD.
            source_lengths: (B,) int64 real tokens of each row.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        check_ids("source_ids", source_ids, "(B, S)", (-1, -1), self.embedding.weight, 0, self.vocab_size)
        rows, steps = source_ids.shape
        if not rows * steps:
            raise ValueError(f"source_ids: got shape {(rows, steps)}, wanted at least one token")
        check_ids("source_lengths", source_lengths, "(B,)", (rows,), source_ids, 0, steps + 1)
        embedded = self.dropout(self.embedding(source_ids))
        states = self._encoded(embedded, source_lengths).to(self.embedding.weight.dtype)
        # What the encoder has read last: ahead at the end of the source, back at its beginning.
        last = (source_lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, states.shape[2])
        ahead, back = states.gather(1, last)[:, 0].chunk(2, 1)[0], states[:, 0].chunk(2, 1)[1]
        summary = torch.cat([ahead, back], 1)
        first = torch.tanh(self.reduce_hidden(summary)), torch.tanh(self.reduce_cell(summary))
        return Memory(states, mask_of(source_lengths, steps), first)

    def _encoded(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """(B,S,2H) states, in one piece or in several that do not see each other."""
        batch, steps, size = embedded.shape
        if self.chunk is None or steps <= self.chunk:
            return self.encoder(embedded, lengths)  # type: ignore[no-any-return]
        pieces = -(-steps // self.chunk)
        padded = nn.functional.pad(embedded, (0, 0, 0, pieces * self.chunk - steps))
        starts = torch.arange(pieces, device=lengths.device) * self.chunk
        parts = (lengths[:, None] - starts).clamp(0, self.chunk).flatten()
        states = self.encoder(padded.reshape(batch * pieces, self.chunk, size), parts)
        return states.reshape(batch, pieces * self.chunk, -1)[:, :steps]  # type: ignore[no-any-return]

    def forward(
        self,
        source_ids: Tensor,
        source_extended: Tensor,
        source_lengths: Tensor,
        target_inputs: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """The mean loss of a target word: its negative log-likelihood, and the weighted coverage loss.

        Args:
            source_ids: (B,S) int64 ids below V, right-padded with PAD.
            source_extended: (B,S) int64 extended ids of the same words; -1 at padding.
            source_lengths: (B,) int64 real tokens of each row.
            target_inputs: (B,T) int64 ids below V: START and the summary.
            targets: (B,T) int64 extended ids: the summary and STOP; -100 at padding.

        Returns:
            A scalar, in nats a word.

        Raises:
            ValueError: A shape, a device or (on a CPU) an id is not as above.
            TypeError: A type or dtype is not as above.
        """
        memory = self.encode(source_ids, source_lengths)
        rows, words = len(source_ids), self.vocab_size
        check_ids("source_extended", source_extended, "(B, S)", tuple(source_ids.shape), source_ids, ABSENT, MANY)
        check_ids("target_inputs", target_inputs, "(B, T)", (rows, -1), source_ids, 0, words)
        check_ids("targets", targets, "(B, T)", tuple(target_inputs.shape), source_ids, 0, MANY, IGNORE)
        embedded = self.dropout(self.embedding(target_inputs))
        out = self.decoder(embedded, memory.states, memory.mask, memory.first)
        if not self.copy:
            targets = targets.masked_fill(targets >= self.vocab_size, UNK)
        attention, gate, source = self._copying(out.attention, out.gate, source_extended)
        output = self.decoder.output
        loss: Tensor = functional.pointer_generator_nll(
            self.dropout(out.hidden),
            output.weight,
            output.bias,
            attention,
            gate,
            source,
            targets,
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
        )
        if self.coverage_weight:
            on = targets != IGNORE
            coverage = torch.where(on, out.coverage_loss, 0.0).sum() / on.sum().clamp(min=1)
            loss = loss + self.coverage_weight * coverage
        return loss

    def _copying(self, attention: Tensor, gate: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the mixture is made of; without copying, a gate that is always open and a source of no words."""
        if self.copy:
            return attention, gate, source
        return attention[..., :0], torch.full_like(gate, ALWAYS_GENERATE), source[:, :0]

    @torch.no_grad()
    def summarize(
        self,
        source_ids: Tensor,
        source_extended: Tensor,
        source_lengths: Tensor,
        *,
        beam_size: int = 4,
        max_steps: int = 32,
        min_steps: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        early_stopping: bool = False,
        return_attention: bool = False,
    ) -> Summaries:
        """The best summaries that a beam search finds, for all rows at once. PAD, UNK and START are never written.

        Args:
            source_ids: (B,S) int64 ids below V, right-padded with PAD.
            source_extended: (B,S) int64 extended ids of the same words; -1 at padding.
            source_lengths: (B,) int64 real tokens of each row.
            beam_size: hypotheses of a row.
            max_steps: the most words of a summary.
            min_steps: the fewest.
            length_penalty: a score is log-probability / ((5 + words) / 6) ** length_penalty, STOP counted
                (Wu et al. 2016).
            no_repeat_ngram: no so many words in a row come twice in a summary; 0 lets them.
            early_stopping: a row is done once beam_size summaries of it have ended, as in most code; else once none
                that goes on could beat the best.
            return_attention: also say where each word comes from.

        Returns:
            The summaries.

        Raises:
            ValueError: A shape, a device, an id or a setting is not as above.
            TypeError: A type or dtype is not as above.
        """
        early, return_attention = flag("early_stopping", early_stopping), flag("return_attention", return_attention)
        limits = (beam_size, max_steps, min_steps, length_penalty, no_repeat_ngram, early)
        settings = Settings(START, STOP, (PAD, UNK, START), *limits)
        memory = self.encode(source_ids, source_lengths)
        check_ids("source_extended", source_extended, "(B, S)", tuple(source_ids.shape), source_ids, ABSENT, MANY)
        decoding = _Decoding(self, memory, source_extended, return_attention)
        found = Search(decoding, len(source_ids), settings, source_ids.device).run()
        rows = zip(found.words.tolist(), found.lengths.tolist(), strict=True)
        ids, scores = [row[:count] for row, count in rows], found.scores.tolist()
        if not return_attention:
            return Summaries(ids, scores)
        attention, copied = _sources(found, decoding, source_extended)
        lengths = source_lengths.tolist()
        weights = [a[: len(row), :n] for a, row, n in zip(attention, ids, lengths, strict=True)]
        return Summaries(ids, scores, weights, [c[: len(row)] for c, row in zip(copied.tolist(), ids, strict=True)])


class _Decoding:
    """The decoder as `beam.Model`: the hypotheses of a row share its memory.

    Args:
        model: in evaluation mode, if dropout is not wanted.
        memory: the encoded sources.
        source: (B,S) extended ids.
        keep: remember the attention and the gate of every step.
    """

    def __init__(self, model: PointerGeneratorSummarizer, memory: Memory, source: Tensor, keep: bool) -> None:
        self.model, self.limit, self.source = model, model.vocab_size, source
        self.states, self.mask = memory.states, memory.mask
        self.features = model.decoder.features(memory.states)
        hidden, cell = (part.to(memory.states.dtype) for part in memory.first)
        batch, steps, size = memory.states.shape
        zeros = memory.states.new_zeros
        self.state = (hidden, cell, zeros(batch, size), zeros(batch, steps))
        self.width = 1
        self.kept: list[tuple[Tensor, Tensor]] | None = [] if keep else None
        output, device = model.decoder.output, memory.states.device.type
        halves = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if halves else output.weight.dtype
        self.weight, self.bias = output.weight.to(self.dtype), output.bias  # converted once, not at each step

    def step(self, words: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `beam.Model`."""
        model, shape = self.model, words.shape
        words = words.masked_fill(words >= model.vocab_size, UNK).flatten()
        out = model.decoder.step(model.embedding(words), self.states, self.mask, self.state, self.features)
        self.state = out.state
        attention, gate = out.attention.unflatten(0, shape), out.gate.unflatten(0, shape)
        if self.kept is not None:
            self.kept.append((attention, gate))
        attention, gate, source = model._copying(attention, gate, self.source)
        hidden = out.hidden.unflatten(0, shape).to(self.dtype)
        return functional.pointer_generator_topk(hidden, self.weight, self.bias, attention, gate, source, count)

    def follow(self, rows: Tensor | None, beams: Tensor) -> None:
        """See `beam.Model`."""
        if rows is None:
            places = torch.arange(len(self.mask), device=beams.device)
        else:
            places, beams = rows, beams[rows]
            self.states, self.features = self.states[rows], self.features[rows]
            self.mask, self.source = self.mask[rows], self.source[rows]
        chosen = (places[:, None] * self.width + beams).flatten()
        self.state = tuple(part.index_select(0, chosen) for part in self.state)  # type: ignore[assignment]
        self.width = beams.shape[1]


def _sources(found: Found, decoding: _Decoding, source: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of each word, (B,L,S), and the position that it was copied from, (B,L)."""
    places, beams, log_probs = found.path()
    batch, steps = places.shape
    attention = decoding.states.new_zeros(batch, steps, source.shape[1])
    gates = decoding.states.new_zeros(batch, steps)
    for t, (weights, gate) in enumerate(decoding.kept or ()):
        rows = (places[:, t] >= 0).nonzero()[:, 0]
        at = places[rows, t], beams[rows, t]
        attention[rows, t], gates[rows, t] = weights[at], gate[at]
    matches = source[:, None] == found.words[:, :steps, None]
    mass = torch.where(matches, attention, 0.0)
    best, position = mass.max(2) if source.shape[1] else (gates.new_zeros(batch, steps), found.words[:, :steps])
    copied = torch.sigmoid(-gates).double() * mass.sum(2)
    likely = (best > 0) & (2 * copied >= log_probs.exp()) & bool(decoding.model.copy)
    return attention, position.masked_fill(~likely, -1)
