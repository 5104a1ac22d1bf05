"""The decoder of the pointer-generator as a module: its weights, its layout, and one op call for all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.functional.checks import INTEGERS, at_least_one, autocast_dtype, expect
from fastseq.nn.parts import linear_of_parts
from fastseq.ops.pointer.decoder import decoder as decode

__all__ = ["DecoderOutput", "PointerGeneratorDecoder"]

State = tuple[Tensor, Tensor, Tensor, Tensor]


class DecoderOutput(NamedTuple):
    """What a decoder gives: for B rows and T steps, or from `step` for one step, without the dimension T.

    Attributes:
        hidden: (B,T,H) what the vocabulary layer `output` reads.
        attention: (B,T,S) over the memory; 0 where that is off, and it adds up to 1 elsewhere.
        gate: (B,T) the logit of p_gen, the probability to generate and not to copy.
        coverage: (B,S) the attention so far, added up; after the last step.
        coverage_loss: (B,T) sum over S of min(attention, coverage before the step).
        state: hidden (B,H), cell (B,H), context (B,M), coverage (B,S), to go on from.
    """

    hidden: Tensor
    attention: Tensor
    gate: Tensor
    coverage: Tensor
    coverage_loss: Tensor
    state: State


class PointerGeneratorDecoder(nn.Module):
    """The attention decoder of See, Liu & Manning 2017: LSTM, additive attention, coverage, input feeding, gate.

    Letters: B rows, T target steps, S source positions, V vocabulary, E embedding, H hidden, M memory size, A = M. All
    steps are one op, whose gradient keeps nothing of size T S A. A step, with y the embedding of the word before:

        x = x_context([context; y]);  hidden, cell = lstm(x, (hidden, cell));  q = query([hidden; cell])
        attention = softmax over S of score . tanh(memory_projection(memory) + q + coverage_weight * coverage)
        context = attention @ memory;  coverage = coverage + attention
        gate([context; hidden; cell; x])  and  output(combine([hidden; context]))        after the loop, for all steps

    Train it with `functional.pointer_generator_nll(out.hidden, decoder.output.weight, decoder.output.bias,
    out.attention, out.gate, source_ids, target_ids)` plus a weight times the mean of `out.coverage_loss`.

    The recurrence and the gate are computed in float32, or float64 if the parameters are, also where these are half
    types; under autocast the other linear layers run in its dtype, and `hidden` comes out in it.

    Args:
        vocab_size: V.
        embedding_dim: E.
        hidden_size: H.
        memory_size: M, twice the hidden size of a bidirectional encoder.
        coverage: Whether the attention sees the coverage. It is counted, and has its loss, in both cases.
        embedding: A table of V target words to keep in this module; word ids can then stand for their embeddings.

    Raises:
        ValueError: A size is below 1, or the embedding's is another.

    Source: See, Liu & Manning 2017, sections 2.1 to 2.3; atulkum/pointer_summarizer, whose weights
    `fastseq.integrations.pointer_summarizer.load` takes.
    """

    coverage_weight: nn.Parameter | None

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        memory_size: int,
        coverage: bool = True,
        *,
        embedding: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_size": hidden_size,
            "memory_size": memory_size,
        }
        for name, size in sizes.items():
            at_least_one(name, size)
        if embedding is not None and not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: got {type(embedding).__name__}, wanted an nn.Embedding or None")
        if embedding is not None and embedding.embedding_dim != embedding_dim:
            raise ValueError(f"embedding: got vectors of {embedding.embedding_dim}, wanted {embedding_dim}")
        self.embedding = embedding
        self.x_context = nn.Linear(memory_size + embedding_dim, embedding_dim)
        self.lstm = nn.LSTMCell(embedding_dim, hidden_size)
        self.memory_projection = nn.Linear(memory_size, memory_size, bias=False)
        self.query = nn.Linear(2 * hidden_size, memory_size)
        self.coverage_weight = nn.Parameter(torch.empty(memory_size)) if coverage else None
        self.score = nn.Parameter(torch.empty(memory_size))
        self.gate = nn.Linear(memory_size + 2 * hidden_size + embedding_dim, 1)
        self.combine = nn.Linear(hidden_size + memory_size, hidden_size)
        self.output = nn.Linear(hidden_size, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters, but not the embedding's.

        Linear layers and the LSTM are torch's own, uniform in +-1/sqrt(inputs): with atulkum's +-0.02 and 1e-4 the
        LSTM and the vocabulary layer start at almost nothing, and the first steps go into growing them. Kept from
        there is the LSTM's forget bias of 1. `score` and `coverage_weight` are uniform in +-1/sqrt(M): the latter is
        a layer of one input, for which torch's +-1 would let the coverage drown the attention from the start.
        """
        for layer in (self.x_context, self.lstm, self.memory_projection, self.query, self.gate, self.combine):
            layer.reset_parameters()
        self.output.reset_parameters()
        bound = self.score.numel() ** -0.5
        nn.init.uniform_(self.score, -bound, bound)
        if self.coverage_weight is not None:
            nn.init.uniform_(self.coverage_weight, -bound, bound)
        h = self.lstm.hidden_size
        with torch.no_grad():  # the two biases are added up
            self.lstm.bias_ih[h : 2 * h] = 1
            self.lstm.bias_hh[h : 2 * h] = 0

    def features(self, memory: Tensor) -> Tensor:
        """The memory's part of the attention, to compute once before many a `step`.

        Args:
            memory: (B,S,M).

        Returns:
            (B,S,A), float64 if the parameters are, else float32.

        Raises:
            ValueError: A shape or a device is not as above.
            TypeError: A type or dtype is not as above.
        """
        _expect("memory", memory, "(B, S, M)", (None, None, self.score.shape[0]), self.score)
        weight = self.memory_projection.weight
        return self.memory_projection(memory.to(weight.dtype)).to(self._working())  # type: ignore[no-any-return]

    def forward(
        self,
        target_embeddings: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        initial_state: Sequence[Tensor] | None = None,
    ) -> DecoderOutput:
        """All steps, with the words before them given.

        Args:
            target_embeddings: (B,T,E), of the word before each step; or their ids (B,T), if there is an embedding.
            memory: (B,S,M) what the encoder gives; or (Bm,S,M) where B is a multiple of Bm, B // Bm rows beside each
                other to a source.
            memory_mask: (B,S) bool, as many rows as memory; any pattern. None for all on.
            initial_state: hidden (B,H) and cell (B,H), then zeros; or these, context (B,M) and coverage (B,S), as in
                `DecoderOutput.state`; None for zeros.

        Raises:
            ValueError: A shape or a device is not as above.
            TypeError: A type or dtype is not as above.
        """
        return self._run(self._embedded(target_embeddings, 3), memory, memory_mask, initial_state, None)

    def step(
        self,
        target_embedding: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        state: Sequence[Tensor] | None,
        features: Tensor | None = None,
    ) -> DecoderOutput:
        """One step of decoding: `forward` for one word a row.

        Args:
            target_embedding: (B,E), or ids (B,), if there is an embedding.
            memory: (B,S,M), or (Bm,S,M) for beams of B // Bm rows.
            memory_mask: (B,S) or (Bm,S) bool, as many rows as memory; None for all on.
            state: That of the step before, or as in `forward`.
            features: `features(memory)`, else they are computed here.

        Returns:
            One without the dimension T: hidden (B,H), attention (B,S), gate (B,), coverage (B,S), coverage_loss (B,).

        Raises:
            ValueError: A shape or a device is not as above.
            TypeError: A type or dtype is not as above.
        """
        embedded = self._embedded(target_embedding, 2).unsqueeze(1)
        out = self._run(embedded, memory, memory_mask, state, features)
        hidden, attention, gate, loss = (x.squeeze(1) for x in (out.hidden, out.attention, out.gate, out.coverage_loss))
        return DecoderOutput(hidden, attention, gate, out.coverage, loss, out.state)

    def _run(
        self,
        embedded: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        state: Sequence[Tensor] | None,
        features: Tensor | None,
    ) -> DecoderOutput:
        """Steps (B,T,E), which are checked; everything else is not."""
        self._check(embedded, memory, mask, state, features)
        working, size = self._working(), memory.shape[2]
        features = self.features(memory) if features is None else features.to(working)
        memory = memory.to(working)
        if len(memory) != len(embedded) and torch.is_grad_enabled():  # the op's gradient wants a memory for each row
            beam = len(embedded) // len(memory)
            memory, features = memory.repeat_interleave(beam, 0), features.repeat_interleave(beam, 0)
            mask = mask if mask is None else mask.repeat_interleave(beam, 0)
        w_context, w_embedding = self.x_context.weight.split((size, embedded.shape[2]), 1)
        inputs = nn.functional.linear(embedded.to(w_embedding.dtype), w_embedding, self.x_context.bias)
        lstm = self.lstm
        cell = (lstm.weight_ih, lstm.weight_hh, lstm.bias_ih + lstm.bias_hh)
        weights = (w_context, *cell, self.query.weight, self.query.bias, self.coverage_weight, self.score)
        first = self._first(state, embedded, memory)
        x, hiddens, cells, contexts, attention, coverage, loss = decode(
            inputs.to(working), memory, features, mask, *first, *(w if w is None else w.to(working) for w in weights)
        )
        gate, hidden = self._gate(contexts, hiddens, cells, x), self._combined(hiddens, contexts)
        last = (hiddens[:, -1], cells[:, -1], contexts[:, -1]) if inputs.shape[1] else first[:3]
        return DecoderOutput(hidden, attention, gate, coverage, loss, (*last, coverage))

    def _gate(self, *parts: Tensor) -> Tensor:
        """(B,T) logits, in the working precision."""
        working = parts[0].dtype
        return linear_of_parts(self.gate.weight.to(working), self.gate.bias.to(working), *parts).squeeze(2)

    def _combined(self, *parts: Tensor) -> Tensor:
        """(B,T,H), in the precision of the parameters, or that of autocast."""
        combine = self.combine
        dtype = autocast_dtype(parts[0]) or combine.weight.dtype
        return linear_of_parts(combine.weight.to(dtype), combine.bias.to(dtype), *(part.to(dtype) for part in parts))

    def _first(self, state: Sequence[Tensor] | None, embedded: Tensor, memory: Tensor) -> State:
        """The state to begin with, in the working precision; zeros for what is not given."""
        rows, (_, positions, size), hidden = len(embedded), memory.shape, self.lstm.hidden_size
        given = [] if state is None else [x.to(memory.dtype) for x in state]
        zeros = (memory.new_zeros(rows, n) for n in (hidden, hidden, size, positions)[len(given) :])
        return (*given, *zeros)  # type: ignore[return-value]

    def _working(self) -> torch.dtype:
        return torch.float64 if self.score.dtype == torch.float64 else torch.float32

    def _embedded(self, words: Tensor, dims: int) -> Tensor:
        """Embeddings with so many dimensions, from those or from ids."""
        if isinstance(words, Tensor) and words.dtype in INTEGERS:
            if self.embedding is None:
                raise TypeError(f"target_embeddings: got {words.dtype}, wanted embeddings: there is no embedding here")
            table = self.embedding.weight
            expect("target_embeddings", words, "(B, T) or (B,)", tuple(words.shape), table, INTEGERS, lead="the table")
            try:
                words = self.embedding(words.long())
            except IndexError:
                raise ValueError(f"target_embeddings: got an id that is not in [0, {len(table)})") from None
        size, letters = self.lstm.input_size, "(B, T, E)" if dims == 3 else "(B, E)"
        _expect("target_embeddings", words, letters, (None,) * (dims - 1) + (size,), self.score)
        return words

    def _check(
        self,
        embedded: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        state: Sequence[Tensor] | None,
        features: Tensor | None,
    ) -> None:
        """Say what is wrong with the arguments, if anything is."""
        rows, size = len(embedded), self.score.shape[0]
        _expect("memory", memory, "(B, S, M)", (None, None, size), embedded)
        sources, positions = memory.shape[:2]
        if rows != sources and (sources == 0 or rows % sources):
            raise ValueError(f"memory: got {sources} rows, wanted {rows} as of target_embeddings, or a divisor of it")
        if mask is not None:
            _expect("memory_mask", mask, "(B, S) of memory", (sources, positions), embedded, torch.bool)
        if features is not None:
            _expect("features", features, "(B, S, A)", (sources, positions, size), embedded)
        if state is None:
            return
        if not isinstance(state, (tuple, list)):
            raise TypeError(f"state: got {type(state).__name__}, wanted a tuple of tensors")
        if len(state) not in (2, 4):
            raise ValueError(f"state: got {len(state)} tensors, wanted hidden, cell and maybe context, coverage")
        wanted = {
            "hidden": self.lstm.hidden_size,
            "cell": self.lstm.hidden_size,
            "context": size,
            "coverage": positions,
        }
        for (name, width), x in zip(wanted.items(), state, strict=False):
            _expect(f"state: {name}", x, "(B, size)", (rows, width), embedded)


def _expect(
    name: str,
    x: Tensor,
    letters: str,
    shape: tuple[int | None, ...],
    other: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise the error that says what is wrong with an argument; None is any size, or any floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")
    if x.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        sizes = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {letters} = ({sizes})")
    if x.dtype != dtype if dtype is not None else not x.is_floating_point():
        wanted = "a floating-point dtype" if dtype is None else str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: got {str(x.dtype).removeprefix('torch.')}, wanted {wanted}")
    if x.device != other.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, wanted {other.device}")
