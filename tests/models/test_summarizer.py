from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq.models import PointerGeneratorSummarizer
from fastseq.models.summarizer import ABSENT, IGNORE, PAD, START, STOP, UNK
from fastseq.registry import OPS

V, OOV = 24, 4
LENGTHS = torch.tensor([13, 4, 7, 1, 10])
SEARCH_OPS = ("pointer_topk", "pointer_decoder")


def summarizer(**options: Any) -> PointerGeneratorSummarizer:
    torch.manual_seed(0)
    options = {"embedding_dim": 6, "hidden_size": 5, "vocab_size": V, **options}
    model = PointerGeneratorSummarizer(**options)
    for parameter in model.parameters():  # far from uniform, so that it matters which words were read
        nn.init.normal_(parameter, std=0.6)
    return model.eval()


def batch(padding: int = 0) -> dict[str, Tensor]:
    """Sources with words beyond the vocabulary, and summaries that copy some; `padding` more columns of it."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    off = torch.arange(13) >= LENGTHS[:, None]
    extended = torch.where(draw(0, 10, 5, 13) < 3, draw(V, V + OOV, 5, 13), draw(4, V, 5, 13)).masked_fill(off, ABSENT)
    source = torch.where(extended >= V, UNK, extended).masked_fill(off, PAD)
    targets = torch.where(draw(0, 2, 5, 6) > 0, extended[:, :1], draw(4, V, 5, 6))
    lengths = torch.tensor([6, 3, 1, 5, 2])
    targets.scatter_(1, lengths[:, None] - 1, STOP)
    targets = targets.masked_fill(torch.arange(6) >= lengths[:, None], IGNORE)
    inputs = torch.cat([torch.full((5, 1), START), targets[:, :-1]], 1)
    inputs = torch.where(inputs >= V, UNK, inputs).masked_fill(inputs < 0, PAD)
    values = {"source_ids": PAD, "source_extended": ABSENT, "target_inputs": PAD, "targets": IGNORE}
    tensors = zip(values, (source, extended, inputs, targets), strict=True)
    padded = {name: nn.functional.pad(x, (0, padding), value=values[name]) for name, x in tensors}
    return {**padded, "source_lengths": LENGTHS}


def sources(padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    b = batch(padding)
    return b["source_ids"], b["source_extended"], b["source_lengths"]


def available(backend: str) -> bool:
    return all(any(b.name == backend and b.available() is None for b in OPS[name].backends) for name in SEARCH_OPS)


def distribution(model: PointerGeneratorSummarizer, out: Any, extended: Tensor) -> Tensor:
    """(B,V+OOV) log-probabilities of one step, written out."""
    words = model.decoder.output(out.hidden).softmax(-1) * out.gate.sigmoid()[:, None]
    final = nn.functional.pad(words, (0, OOV))
    if model.copy:
        final = final.scatter_add(1, extended, out.attention * (-out.gate).sigmoid()[:, None])
    return final.log()


def one_by_one(
    model: PointerGeneratorSummarizer, source: Tensor, extended: Tensor, beam: int, steps: int, penalty: float
) -> tuple[list[int], float, list[Tensor], list[float]]:
    """Beam search of one text: a list of hypotheses, each with a decoder state of its own."""
    memory = model.encode(source, torch.tensor([source.shape[1]]))
    size = memory.states.shape[2]
    zeros = memory.states.new_zeros(1, size), memory.states.new_zeros(1, source.shape[1])
    live: list[Any] = [(0.0, [START], (*memory.first, *zeros), [], [])]
    best: Any = ([], -math.inf, [], [])
    for step in range(steps):
        grown = []
        for total, words, state, weights, copied in live:
            word = torch.tensor([words[-1] if words[-1] < V else UNK])
            out = model.decoder.step(model.embedding(word), memory.states, memory.mask, state)
            values = distribution(model, out, extended)[0]
            for i in values.argsort(descending=True, stable=True).tolist():
                if i in (PAD, UNK, START) or (i == STOP and step < 1) or values[i] == -math.inf:
                    continue
                mass = float((out.attention * (extended == i)).sum() * (-out.gate).sigmoid() / values[i].exp())
                ways = [*weights, out.attention[0]], [*copied, mass]
                grown.append((total + float(values[i]), [*words, i], out.state, *ways))
        grown.sort(key=lambda item: -item[0])
        for total, words, _, weights, copied in grown[:beam]:
            score = total / ((5 + len(words) - 1) / 6) ** penalty
            if words[-1] == STOP and score > best[1]:
                best = words[1:-1], score, weights[:-1], copied[:-1]
        live = [item for item in grown if item[1][-1] != STOP][:beam]
    if best[1] == -math.inf:
        total, words, _, weights, copied = live[0]
        best = words[1:], total / ((5 + steps) / 6) ** penalty, weights, copied
    return best  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("options", [{"beam_size": 1}, {"beam_size": 3}, {"beam_size": 4, "length_penalty": 0.0}])
@torch.no_grad()
def test_summaries_are_those_of_one_text_after_another(options: dict[str, Any], backend: str) -> None:
    if not available(backend):
        pytest.skip(f"no {backend} library here")
    model, (source, extended, lengths) = summarizer(chunk=5).double(), sources()
    with fastseq.use(backend):
        found = model.summarize(source, extended, lengths, max_steps=6, return_attention=True, **options)
    assert found.attention is not None
    assert found.copied_from is not None
    beam, penalty = options["beam_size"], options.get("length_penalty", 1.0)
    for i, n in enumerate(lengths.tolist()):
        ids, score, weights, copied = one_by_one(
            model, source[i : i + 1, :n], extended[i : i + 1, :n], beam, 6, penalty
        )
        assert found.ids[i] == ids
        assert found.scores[i] == pytest.approx(score)
        torch.testing.assert_close(found.attention[i], torch.stack(weights) if weights else torch.zeros(0, n).double())
        for word, position, share, attention in zip(ids, found.copied_from[i], copied, weights, strict=True):
            matches = extended[i, :n] == word
            wanted = int((attention * matches).argmax()) if share >= 0.5 else -1
            assert position == wanted
    assert any(word >= V for row in found.ids for word in row)
    assert {-1} < {position for row in found.copied_from for position in row}


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram": 2, "min_steps": 4}])
def test_a_text_is_summarized_alone_as_in_a_batch(options: dict[str, Any]) -> None:
    model = summarizer().double()
    together = model.summarize(*sources(padding=3), return_attention=True, **options)
    for i, n in enumerate(LENGTHS.tolist()):
        source, extended, lengths = (x[i : i + 1] for x in sources())
        alone = model.summarize(source[:, :n], extended[:, :n], lengths, return_attention=True, **options)
        assert alone.ids[0] == together.ids[i]
        assert alone.copied_from == together.copied_from[i : i + 1]  # type: ignore[index]
        torch.testing.assert_close(alone.attention[0], together.attention[i])  # type: ignore[index]
        assert alone.scores[0] == pytest.approx(together.scores[i])
        if options:
            pairs = list(zip(alone.ids[0], alone.ids[0][1:], strict=False))
            assert len(pairs) >= 3
            assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("chunk", [None, 5])
def test_padding_changes_nothing(chunk: int | None) -> None:
    model = summarizer(chunk=chunk).double()
    results = []
    for padding in (0, 4):
        model.zero_grad()
        loss = model(**batch(padding))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1])
    assert len(results[0][1]) == len(list(model.parameters()))


def test_the_loss_is_that_of_the_steps_written_out() -> None:
    model, b = summarizer(coverage_weight=0.7).double(), batch()
    losses = []
    for i, n in enumerate(LENGTHS.tolist()):
        memory = model.encode(b["source_ids"][i : i + 1, :n], LENGTHS[i : i + 1])
        zeros = memory.states.new_zeros(1, memory.states.shape[2]), memory.states.new_zeros(1, n)
        state = (*memory.first, *zeros)
        for word, target in zip(b["target_inputs"][i], b["targets"][i], strict=True):
            if target != IGNORE:
                seen = state[3]
                out = model.decoder.step(model.embedding(word[None]), memory.states, memory.mask, state)
                state = out.state
                value = distribution(model, out, b["source_extended"][i : i + 1, :n])[0, target]
                losses.append(0.7 * torch.minimum(out.attention, seen).sum() - value)
    torch.testing.assert_close(model(**b), torch.stack(losses).mean())


def test_chunks_do_not_see_each_other() -> None:
    model = summarizer(chunk=5)
    source, _, lengths = sources()
    states = model.encode(source, lengths).states
    for start in (0, 5, 10):
        piece = source[:1, start : start + 5]
        alone = model.encode(piece, torch.tensor([piece.shape[1]])).states
        torch.testing.assert_close(states[:1, start : start + 5], alone)
    whole, long = summarizer(), summarizer(chunk=13)
    torch.testing.assert_close(whole(**batch()), long(**batch()))
    assert not torch.allclose(whole(**batch()), model(**batch()))


def test_without_copying_no_source_word_is_seen_or_written() -> None:
    model, b = summarizer(copy=False), batch()
    loss = model(**b)
    shuffled = {**b, "source_extended": torch.where(b["source_extended"] < 0, ABSENT, 5)}
    targets = torch.where(b["targets"] >= V, UNK, b["targets"])
    torch.testing.assert_close(model(**{**shuffled, "targets": targets}), loss)
    found = model.summarize(*sources(), return_attention=True)
    assert max(word for row in found.ids for word in row) < V
    assert {position for row in found.copied_from for position in row} == {-1}  # type: ignore[union-attr]


def test_it_learns_to_copy_words_that_it_has_never_seen() -> None:
    torch.manual_seed(0)
    model = PointerGeneratorSummarizer(12, embedding_dim=8, hidden_size=16, encoder_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    def draw(count: int) -> dict[str, Tensor]:
        """Among words 5 to 11 one is unknown; the summary is that one, then word 4."""
        extended = torch.randint(5, 12, (count, 6))
        extended.scatter_(1, torch.randint(0, 6, (count, 1)), 12)
        targets = torch.tensor([[12, 4, STOP]]).expand(count, -1)
        return {
            "source_ids": torch.where(extended >= 12, UNK, extended),
            "source_extended": extended,
            "source_lengths": torch.full((count,), 6),
            "target_inputs": torch.tensor([[START, UNK, 4]]).expand(count, -1),
            "targets": targets,
        }

    for _ in range(60):
        optimizer.zero_grad()
        model(**draw(32)).backward()
        optimizer.step()
    b = draw(20)
    sources = (b["source_ids"], b["source_extended"], b["source_lengths"])
    found = model.eval().summarize(*sources, return_attention=True)
    assert found.ids == [[12, 4]] * 20
    wanted = (b["source_extended"] == 12).long().argmax(1).tolist()
    assert [row[0] for row in found.copied_from] == wanted  # type: ignore[union-attr]


def test_bfloat16_autocast() -> None:
    model = summarizer()
    wanted = model(**batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch())
        found = model.summarize(*sources(), return_attention=True)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(math.isfinite(score) for score in found.scores)


def test_the_size_of_the_published_model() -> None:
    with torch.device("meta"):
        model = PointerGeneratorSummarizer(47_500)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.4e6, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"vocab_size": 4}, "vocab_size"), ({"chunk": 0}, "chunk"), ({"hidden_size": 0}, "hidden_size")],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarizer(**options)
    with pytest.raises(ValueError, match="beam_size"):
        summarizer().summarize(*sources(), beam_size=0)
    with pytest.raises(TypeError, match="early_stopping: got a float32 tensor"):
        summarizer().summarize(*sources(), early_stopping=torch.ones(2))  # type: ignore[arg-type]
