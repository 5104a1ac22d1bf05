"""`fastseq.nn.PointerGeneratorDecoder` against a naive loop on its own parameters; steps, dtypes, compilation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq.nn import PointerGeneratorDecoder

B, T, S, V, E, H, M = 3, 4, 6, 13, 4, 3, 5


def make(dtype: torch.dtype = torch.float64, **options: Any) -> PointerGeneratorDecoder:
    return PointerGeneratorDecoder(V, E, H, M, **options).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    shapes = (B, T, E), (B, S, M), (B, H), (B, H), (B, M)
    words, memory, *state = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    coverage = torch.rand(B, S, dtype=dtype, requires_grad=True)
    return words, memory, torch.arange(S) < torch.tensor([[6], [4], [1]]), (*state, coverage)


def naive(d: PointerGeneratorDecoder, words: Tensor, memory: Tensor, mask: Tensor, state: Any) -> list[Tensor]:
    """The published loop: hidden, attention, gate, coverage loss of each step, then the coverage."""
    h, c, context, coverage = state
    steps = []
    for word in words.unbind(1):
        x = d.x_context(torch.cat((context, word), 1))
        h, c = d.lstm(x, (h, c))
        inside = d.memory_projection(memory) + d.query(torch.cat((h, c), 1))[:, None]
        if d.coverage_weight is not None:
            inside = inside + coverage[..., None] * d.coverage_weight
        attention = (inside.tanh() @ d.score).masked_fill(~mask, -torch.inf).softmax(1)
        context = (attention[:, None] @ memory)[:, 0]
        loss = torch.where(attention <= coverage, attention, coverage).mul(mask).sum(1)
        coverage = coverage + attention
        gate = d.gate(torch.cat((context, h, c, x), 1))[:, 0]
        steps.append((d.combine(torch.cat((h, context), 1)), attention, gate, loss))
    return [*(torch.stack(column, 1) for column in zip(*steps, strict=True)), coverage]


def parts(out: Any) -> list[Tensor]:
    return [out.hidden, out.attention, out.gate, out.coverage_loss, out.coverage]


@pytest.mark.parametrize("coverage", [True, False])
def test_values_and_all_gradients_are_those_of_the_loop(coverage: bool) -> None:
    d, (words, memory, mask, state) = make(coverage=coverage), batch()
    got, want = parts(d(words, memory, mask, state)), naive(d, words, memory, mask, state)
    torch.testing.assert_close(got, want)
    weights = [torch.randn_like(w) for w in want]
    leaves = [words, memory, *state, *(p for name, p in d.named_parameters() if not name.startswith("output"))]
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, weights) for out in (got, want)))


@pytest.mark.parametrize("given", [0, 2, 4])
def test_steps_are_forward(given: int) -> None:
    d, (words, memory, mask, state) = make(), batch()
    first = state[:given] or None
    want, features = d(words, memory, mask, first), d.features(memory)
    outs, last = [], first
    for t in range(T):
        outs.append(d.step(words[:, t], memory, mask, last, features if t else None))
        last = outs[-1].state
    for name in ("hidden", "attention", "gate", "coverage_loss"):
        torch.testing.assert_close(torch.stack([getattr(out, name) for out in outs], 1), getattr(want, name))
    torch.testing.assert_close(outs[-1].state, want.state)
    torch.testing.assert_close(outs[-1].coverage, want.coverage)


def test_no_steps_and_no_state() -> None:
    d, (words, memory, _, _) = make(), batch()
    out = d(words[:, :0], memory)
    assert out.hidden.shape == (B, 0, H)
    assert [s.shape for s in out.state] == [(B, H), (B, H), (B, M), (B, S)]
    torch.testing.assert_close(parts(d(words, memory, None, out.state)), parts(d(words, memory)))


def test_beams_share_their_source_with_and_without_gradients() -> None:
    d, (words, memory, mask, _) = make(), batch()
    words = torch.cat((words, words + 1)).detach()
    want = d(words, *(x.repeat_interleave(2, 0) for x in (memory, mask)))
    got = d(words, memory, mask)
    torch.testing.assert_close(parts(got), parts(want))
    gradients = [torch.autograd.grad(out.hidden.square().sum(), memory)[0] for out in (got, want)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(
            parts(d.step(words[:, 0], memory, mask, None)),
            parts(d.step(words[:, 0], memory, mask, None, d.features(memory))),
        )
        torch.testing.assert_close(parts(d(words, memory, mask)), parts(want))


def test_word_ids_where_there_is_an_embedding() -> None:
    table = nn.Embedding(V, E)
    d, (_, memory, mask, _) = make(embedding=table), batch()
    ids = torch.randint(V, (B, T))
    torch.testing.assert_close(parts(d(ids, memory, mask)), parts(d(table(ids), memory, mask)))
    with pytest.raises(TypeError, match="there is no embedding"):
        make()(ids, memory, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_recur_in_float32(dtype: torch.dtype) -> None:
    d, (words, memory, mask, state) = make(dtype), batch(dtype)
    out = d(words, memory, mask, state)
    assert [x.dtype for x in parts(out)] == [dtype, *[torch.float32] * 4]
    exact = make(torch.float32)
    exact.load_state_dict(d.state_dict())
    want = exact(words.float(), memory.float(), mask, [s.float() for s in state])
    torch.testing.assert_close([x.float() for x in parts(out)], parts(want), atol=3e-2, rtol=3e-2)
    (out.hidden.float().sum() + out.gate.sum()).backward()
    assert {p.grad.dtype for name, p in d.named_parameters() if p.grad is not None} == {dtype}


def test_autocast() -> None:
    d, (words, memory, mask, state) = make(torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = d(words, memory.bfloat16(), mask, state)
        loss = out.hidden.float().sum() + out.gate.sum()
    assert [x.dtype for x in parts(out)] == [torch.bfloat16, *[torch.float32] * 4]
    torch.testing.assert_close(
        [x.float() for x in parts(out)], parts(d(words, memory, mask, state)), atol=5e-2, rtol=5e-2
    )
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for name, p in d.named_parameters() if p.grad is not None)


def test_compiles_whole() -> None:
    d, (words, memory, mask, state) = make(), batch()
    compiled = torch.compile(d, fullgraph=True, backend="aot_eager")
    got, want = parts(compiled(words, memory, mask, state)), parts(d(words, memory, mask, state))
    torch.testing.assert_close(got, want)
    leaves = [words, memory, *(p for name, p in d.named_parameters() if not name.startswith("output"))]
    torch.testing.assert_close(
        *(torch.autograd.grad(sum(x.square().sum() for x in out), leaves) for out in (got, want))
    )


def test_second_derivatives_are_those_of_the_loop() -> None:
    d, (words, memory, mask, state) = make(), batch()
    leaves = [words, memory, *(p for name, p in d.named_parameters() if not name.startswith("output"))]
    found = []
    for out in (parts(d(words, memory, mask, state)), naive(d, words, memory, mask, state)):
        first = torch.autograd.grad(sum(x.square().sum() for x in out), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found)


class Count(TorchDispatchMode):
    """The operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_few_operators_however_many_steps() -> None:
    d, (_, memory, mask, _) = make(), batch()
    memory = memory.detach()
    totals = []
    for steps in (3, 30):
        words = torch.randn(B, steps, E, dtype=torch.float64)
        d.zero_grad()
        with Count() as count:
            out = parts(d(words, memory, mask))
        grads = [torch.ones_like(x) for x in out]
        with count:
            torch.autograd.backward(out, grads)
        totals.append(sum(count.names.values()))
        assert count.names["fastseq.pointer_decoder.default"] == 1
    assert totals[0] == totals[1] <= 140


def test_parameters_have_the_names_that_others_rely_on() -> None:
    d = make(torch.float32)
    assert {name: tuple(p.shape) for name, p in d.state_dict().items()} == {
        "coverage_weight": (M,),
        "score": (M,),
        "x_context.weight": (E, M + E),
        "x_context.bias": (E,),
        "lstm.weight_ih": (4 * H, E),
        "lstm.weight_hh": (4 * H, H),
        "lstm.bias_ih": (4 * H,),
        "lstm.bias_hh": (4 * H,),
        "memory_projection.weight": (M, M),
        "query.weight": (M, 2 * H),
        "query.bias": (M,),
        "gate.weight": (1, M + 2 * H + E),
        "gate.bias": (1,),
        "combine.weight": (H, H + M),
        "combine.bias": (H,),
        "output.weight": (V, H),
        "output.bias": (V,),
    }
    assert "coverage_weight" not in make(coverage=False).state_dict()
    assert (d.lstm.bias_ih + d.lstm.bias_hh)[H : 2 * H].eq(1).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"target_embeddings": torch.zeros(B, T, E + 1)},
            ValueError,
            r"target_embeddings: got shape \(3, 4, 5\), wanted",
        ),
        ({"memory": torch.zeros(2, S, M)}, ValueError, "memory: got 2 rows, wanted 3"),
        ({"memory": torch.zeros(B, S, M + 1)}, ValueError, r"memory: got shape .* wanted \(B, S, M\)"),
        ({"memory_mask": torch.ones(B, S)}, TypeError, "memory_mask: got float32, wanted bool"),
        ({"memory_mask": torch.ones(B, S + 1).bool()}, ValueError, "memory_mask: got shape"),
        ({"initial_state": [torch.zeros(B, H)]}, ValueError, "state: got 1 tensors"),
        ({"initial_state": [torch.zeros(B, H), torch.zeros(B, M)]}, ValueError, "state: cell: got shape"),
        ({"memory": None}, TypeError, "memory: got NoneType"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"target_embeddings": torch.zeros(B, T, E), "memory": torch.zeros(B, S, M), **change}
    with pytest.raises(error, match=words):
        make(torch.float32)(**arguments)


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="hidden_size: got 0"):
        PointerGeneratorDecoder(V, E, 0, M)
    with pytest.raises(ValueError, match="embedding: got vectors of 9"):
        make(embedding=nn.Embedding(V, 9))
