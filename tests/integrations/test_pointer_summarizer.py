"""The loader of atulkum/pointer_summarizer's weights, held to a module with its names and its mathematics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.integrations.pointer_summarizer import load
from fastseq.nn import PointerGeneratorDecoder

B, T, S, V, E, H = 2, 3, 5, 11, 4, 3
M = 2 * H


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_c = nn.Linear(1, M, bias=False)
        self.decode_proj = nn.Linear(M, M)
        self.v = nn.Linear(M, 1, bias=False)


class Decoder(nn.Module):
    """The published decoder: the same names, and the same computations in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_network = Attention()
        self.embedding = nn.Embedding(V, E)
        self.x_context = nn.Linear(M + E, E)
        self.lstm = nn.LSTM(E, H, batch_first=True)
        self.p_gen_linear = nn.Linear(4 * H + E, 1)
        self.out1 = nn.Linear(3 * H, H)
        self.out2 = nn.Linear(H, V)

    def forward(self, words: Tensor, memory: Tensor, features: Tensor, mask: Tensor) -> list[Tensor]:
        net, steps = self.attention_network, []
        state = torch.zeros(1, B, H), torch.zeros(1, B, H)
        context, coverage = torch.zeros(B, M), torch.zeros(B, S)
        for word in words.unbind(1):
            x = self.x_context(torch.cat((context, self.embedding(word)), 1))
            out, state = self.lstm(x.unsqueeze(1), state)
            both = torch.cat((state[0].view(-1, H), state[1].view(-1, H)), 1)
            scores = features + net.decode_proj(both).unsqueeze(1) + net.W_c(coverage.unsqueeze(2))
            attention = F.softmax(net.v(torch.tanh(scores)).squeeze(2), dim=1) * mask
            attention = attention / attention.sum(1, keepdim=True)
            context = torch.bmm(attention.unsqueeze(1), memory).squeeze(1)
            coverage_loss = torch.min(attention, coverage).sum(1)
            coverage = coverage + attention
            p_gen = torch.sigmoid(self.p_gen_linear(torch.cat((context, both, x), 1))).squeeze(1)
            words_out = F.softmax(self.out2(self.out1(torch.cat((out.squeeze(1), context), 1))), dim=1)
            steps.append((words_out, attention, p_gen, coverage_loss))
        return [torch.stack(column, 1) for column in zip(*steps, strict=True)]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        self.lstm = nn.LSTM(E, H, batch_first=True, bidirectional=True)
        self.W_h = nn.Linear(M, M, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()


def nested(model: Model) -> dict[str, Any]:
    halves = {f"{name}_state_dict": getattr(model, name).state_dict() for name in ("encoder", "decoder")}
    return {"iter": 1, "current_loss": 0.5, **halves}


def without_prefix(model: Model) -> dict[str, Any]:
    return {**model.decoder.state_dict(), "W_h.weight": model.encoder.W_h.weight}


def make(**options: Any) -> PointerGeneratorDecoder:
    return PointerGeneratorDecoder(V, E, H, M, **options)


@pytest.mark.parametrize("form", [nested, Model.state_dict, without_prefix])
def test_it_computes_what_the_published_one_does(form: Any) -> None:
    model, decoder = Model(), make(embedding=nn.Embedding(V, E))
    load(decoder, form(model))
    words, memory = torch.randint(V, (B, T)), torch.randn(B, S, M)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    want = model.decoder(words, memory, model.encoder.W_h(memory), mask)
    out = decoder(words, memory, mask.bool())
    got = [decoder.output(out.hidden).softmax(2), out.attention, out.gate.sigmoid(), out.coverage_loss]
    torch.testing.assert_close(got, want)


def test_what_was_not_needed_is_named() -> None:
    model = Model()
    spare = load(make(coverage=False), nested(model))
    assert {"decoder.attention_network.W_c.weight", "decoder.embedding.weight", "encoder.embedding.weight"} < set(spare)
    assert not {"encoder.W_h.weight", "decoder.out2.bias"} & set(spare)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d.pop("decoder.out2.bias"), KeyError, "lacks decoder.out2.bias"),
        (lambda d: d.pop("encoder.W_h.weight"), KeyError, "lacks encoder.W_h.weight"),
        (lambda d: d.pop("decoder.attention_network.W_c.weight"), KeyError, "coverage=False"),
        (lambda d: d.update({"decoder.out2.bias": torch.zeros(7)}), ValueError, r"out2.bias has shape \(7,\), wanted"),
        (lambda d: d.update({"decoder.out2.bias": "no"}), TypeError, "out2.bias is a str"),
    ],
)
def test_an_error_names_the_tensor_and_changes_nothing(change: Any, error: type[Exception], words: str) -> None:
    decoder, tensors = make(), Model().state_dict()
    change(tensors)
    before = {name: x.clone() for name, x in decoder.state_dict().items()}
    with pytest.raises(error, match=words):
        load(decoder, tensors)
    for name, x in decoder.state_dict().items():
        assert x.equal(before[name]), name


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="decoder: got Linear"):
        load(nn.Linear(1, 1), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_dict: got list"):
        load(make(), [])  # type: ignore[arg-type]
