"""`fastseq.functional.attention`: the documented torch, results asked for, dtypes, seeds, and every complaint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq.functional import attention

B, SQ, SK, HQ, HK, D = 2, 5, 7, 4, 2, 8
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def qkv() -> Inputs:
    q, k, v = torch.randn(B, SQ, HQ, D), torch.randn(B, SK, HK, D), torch.randn(B, SK, HK, D)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def as_documented(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor, key_lengths: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """The lines of torch in the docstring, and the weights."""
    k, v = (x.repeat_interleave(HQ // HK, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5 + attn_bias
    i, j, lengths = torch.arange(SQ)[:, None], torch.arange(SK), key_lengths[:, None, None, None]
    hidden = j >= lengths
    if causal:
        hidden = hidden | (j > i + lengths - SQ)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhij,bjhd->bihd", F.dropout(weights, 0.0), v), weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(B, HQ, SQ, SK), (SQ, SK), (HQ, 1, SK), (B, 1, 1, SK)], ids=str)
def test_is_the_documented_torch(qkv: Inputs, shape: tuple[int, ...], causal: bool) -> None:
    """Output, weights and gradients; that of the bias has its own shape."""
    bias, lengths = torch.randn(shape).requires_grad_(), torch.tensor([SK, SQ])
    out, weights = attention(*qkv, attn_bias=bias, key_lengths=lengths, causal=causal, return_attn_weights=True)
    wanted = as_documented(*qkv, bias, lengths, causal)
    torch.testing.assert_close((out, weights), wanted)
    pull = torch.randn_like(out), torch.randn_like(weights)
    for got, want, g in zip((out, weights), wanted, pull, strict=True):
        leaves = [*qkv, bias] if got is out else [*qkv[:2], bias]
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, g, retain_graph=True),
            torch.autograd.grad(want, leaves, g, retain_graph=True),
            rtol=2e-5,
            atol=2e-6,
        )


def test_is_torch_sdpa(qkv: Inputs) -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attention(*qkv, softmax_scale=0.3), wanted)


def test_what_is_returned(qkv: Inputs) -> None:
    out = attention(*qkv)
    assert out.shape == (B, SQ, HQ, D)
    with_lse = attention(*qkv, return_lse=True)
    assert [x.shape for x in with_lse] == [out.shape, (B, HQ, SQ)]
    everything = attention(*qkv, return_lse=True, return_attn_weights=True, dropout_p=0.5)
    assert [x.shape for x in everything] == [out.shape, (B, HQ, SQ), (B, HQ, SQ, SK)]
    torch.testing.assert_close(everything[2].sum(-1), torch.ones(B, HQ, SQ))  # before dropout
    scores = torch.einsum("bihd,bjhd->bhij", qkv[0], qkv[1].repeat_interleave(2, 2)) * D**-0.5
    torch.testing.assert_close(with_lse[1], scores.logsumexp(-1))
    torch.testing.assert_close(everything[2], scores.softmax(-1))


def test_packed_is_each_sequence() -> None:
    lengths_q, lengths_k = [3, 0, 4], [5, 1, 2]
    q, k, v = torch.randn(7, HQ, D), torch.randn(8, HK, D), torch.randn(8, HK, D)
    offsets = {"cu_seqlens_q": torch.tensor([0, 3, 3, 7]), "cu_seqlens_k": torch.tensor([0, 5, 6, 8])}
    out, lse, weights = attention(q, k, v, causal=True, **offsets, return_lse=True, return_attn_weights=True)
    assert [tuple(x.shape) for x in (out, lse, weights)] == [(7, HQ, D), (HQ, 7), (3, HQ, 4, 5)]
    for n, (i, j) in enumerate(zip(q.split(lengths_q), k.split(lengths_k), strict=True)):
        values, rows = v.split(lengths_k)[n], slice(sum(lengths_q[:n]), sum(lengths_q[: n + 1]))
        one = attention(i[None], j[None], values[None], causal=True, return_lse=True, return_attn_weights=True)
        torch.testing.assert_close((out[rows], lse[:, rows]), (one[0][0], one[1][0]))
        torch.testing.assert_close(weights[n, :, : lengths_q[n], : lengths_k[n]], one[2][0])
        assert (weights[n, :, lengths_q[n] :] == 0).all()
        assert (weights[n, :, :, lengths_k[n] :] == 0).all()
    longer = attention(q, k, v, causal=True, **offsets, max_seqlen_q=9, max_seqlen_k=9)
    torch.testing.assert_close(longer, out)


def test_window_and_slopes(qkv: Inputs) -> None:
    """The same as a bias that says so."""
    distance = (torch.arange(SK) - (SK - SQ) - torch.arange(SQ)[:, None]).float()
    far = torch.zeros(SQ, SK).masked_fill((distance < -2) | (distance > 1), -torch.inf)
    torch.testing.assert_close(attention(*qkv, window_size=(2, 1)), attention(*qkv, attn_bias=far))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    bias = -slopes[:, None, None] * distance.abs()
    torch.testing.assert_close(attention(*qkv, alibi_slopes=slopes), attention(*qkv, attn_bias=bias))
    by_row = torch.stack([slopes, 2 * slopes])
    wanted = attention(*qkv, attn_bias=torch.stack([bias, 2 * bias]))
    torch.testing.assert_close(attention(*qkv, alibi_slopes=by_row), wanted)


def test_seeds(qkv: Inputs) -> None:
    """Dropout follows torch's generator, or one's own, which leaves torch's alone."""
    torch.manual_seed(3)
    one, two = attention(*qkv, dropout_p=0.5), attention(*qkv, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attention(*qkv, dropout_p=0.5), one)
    assert not torch.equal(one, two)
    state = torch.get_rng_state()
    own = [attention(*qkv, dropout_p=0.5, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*own)
    attention(*qkv)  # which draws nothing
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(qkv: Inputs, dtype: torch.dtype) -> None:
    half = tuple(x.detach().to(dtype).requires_grad_() for x in qkv)
    bias = torch.randn(SQ, SK).requires_grad_()
    out, lse = attention(*half, attn_bias=bias, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(out.sum(), [*half, bias])
    assert [g.dtype for g in grads] == [dtype, dtype, dtype, torch.float32]
    wanted = attention(*(x.double() for x in half), attn_bias=bias)
    torch.testing.assert_close(out.double(), wanted.double(), rtol=2e-2, atol=1e-2)


def test_autocast(qkv: Inputs) -> None:
    """As torch's: q, k and v are cast, float64 stays."""
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(qkv[0].bfloat16(), *qkv[1:], return_lse=True, attn_bias=torch.zeros(SQ, SK))
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        assert attention(*(x.double() for x in qkv)).dtype == torch.float64
        grad = torch.autograd.grad(attention(*qkv).sum(), qkv[0])[0]
    assert grad.dtype == torch.float32
    wanted = attention(*(x.bfloat16() for x in qkv))
    torch.testing.assert_close(out, wanted)


def test_under_a_compiler(qkv: Inputs) -> None:
    torch._dynamo.reset()
    lengths = torch.tensor([SK, 3])

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, key_lengths=lengths, causal=True, window_size=(3, -1))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*qkv), step(*qkv)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), qkv), torch.autograd.grad(wanted.sum(), qkv))


def test_gradient_penalty(qkv: Inputs) -> None:
    """A second derivative, of the output and of the weights."""
    double = [x.detach().double().requires_grad_() for x in qkv]

    def penalty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = attention(q, k, v, causal=True, return_attn_weights=True)
        grad = torch.autograd.grad(out.square().sum() + weights.square().sum(), q, create_graph=True)[0]
        return grad.square().sum()

    assert torch.autograd.gradcheck(penalty, double, fast_mode=True)


x, y = torch.zeros(B, SQ, HQ, D), torch.zeros(B, SK, HK, D)
ints, offsets = torch.tensor([1, 1]), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "dropout_p: got a Tensor; .* a mask belongs in attn_bias", (x, y, y), {"dropout_p": x}),
        (TypeError, "dropout_p: got str", (x, y, y), {"dropout_p": "0.1"}),
        (ValueError, "dropout_p: got 1.0", (x, y, y), {"dropout_p": 1.0}),
        (ValueError, "k: got 3 heads, wanted a number that divides q's 4", (x, y[:, :, [0, 0, 0]], y), {}),
        (ValueError, "k: got a batch of 1", (x, y[:1], y[:1]), {}),
        (ValueError, "k: got heads of size 4", (x, y[..., :4], y[..., :4]), {}),
        (ValueError, "v: got shape", (x, y, y[:, 1:]), {}),
        (ValueError, "q: got shape .* wanted \\(B, S, H, D\\)", (x[0], y, y), {}),
        (ValueError, "q: got shape .* with cu_seqlens", (x, y, y), {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}),
        (TypeError, "k: got bfloat16, wanted float32", (x, y.bfloat16(), y), {}),
        (TypeError, "q: got int64", (x.long(), y, y), {}),
        (TypeError, "v: got list", (x, y, []), {}),
        (ValueError, "v: got a tensor on meta", (x, y, y.to("meta")), {}),
        (ValueError, "cu_seqlens_k: got None", (x[0], y[0], y[0]), {"cu_seqlens_q": offsets}),
        (
            ValueError,
            "cu_seqlens_k: got 1 sequences, wanted 2",
            (x[0], y[0], y[0]),
            {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets[:2]},
        ),
        (
            TypeError,
            "cu_seqlens_q: got float32",
            (x[0], y[0], y[0]),
            {"cu_seqlens_q": offsets.float(), "cu_seqlens_k": offsets},
        ),
        (
            ValueError,
            "cu_seqlens_q",
            (x[0], y[0], y[0]),
            {"cu_seqlens_q": torch.tensor([0, 4, 9]), "cu_seqlens_k": offsets},
        ),
        (ValueError, "max_seqlen_q: got 4 without", (x, y, y), {"max_seqlen_q": 4}),
        (ValueError, "key_lengths: got shape", (x, y, y), {"key_lengths": ints[:1]}),
        (TypeError, "key_lengths: got float32", (x, y, y), {"key_lengths": ints.float()}),
        (ValueError, "key_lengths: got 9", (x, y, y), {"key_lengths": ints * 9}),
        (TypeError, "attn_bias: got a bool mask", (x, y, y), {"attn_bias": torch.ones(SQ, SK).bool()}),
        (ValueError, "attn_bias: got shape .* broadcasts to", (x, y, y), {"attn_bias": torch.zeros(SK, SQ)}),
        (ValueError, "attn_bias: got shape .* at most 4", (x, y, y), {"attn_bias": torch.zeros(1, 1, 1, 1, 1)}),
        (ValueError, "alibi_slopes: got shape", (x, y, y), {"alibi_slopes": torch.zeros(3)}),
        (TypeError, "window_size: got 3", (x, y, y), {"window_size": 3}),
        (ValueError, "window_size: got \\(-2, 0\\)", (x, y, y), {"window_size": (-2, 0)}),
        (ValueError, "softcap: got -1", (x, y, y), {"softcap": -1}),
    ],
)
def test_complaints(error: type[Exception], match: str, arguments: Any, options: dict[str, Any]) -> None:
    """Each names the argument, what came, and what was wanted."""
    with pytest.raises(error, match=match):
        attention(*arguments, **options)


def test_explains_itself(qkv: Inputs) -> None:
    args = *(x.detach() for x in qkv), *(None,) * 6, SQ, SK, 1.0, False, -1, -1, 0.0, 0.0
    assert "eager     ok" in fastseq.explain("attention", *args)
