"""The interface: signatures, return values, conventions, errors, and the functions of bert_padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import flash_attn
from fastseq.flash_attn import bert_padding, flash_attn_func, flash_attn_varlen_func
from fastseq.ops.attention.dropout import kept_scale

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {  # of flash_attn 2.8
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
    "bert_padding.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "bert_padding.pad_input": "hidden_states, indices, batch, seqlen",
    "bert_padding.unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "bert_padding.index_first_axis": "input, indices",
    "bert_padding.index_put_first_axis": "values, indices, first_axis_dim",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    function: Any = flash_attn
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters.values()
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(words) == SIGNATURES[name]
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_it_is_an_attribute_of_the_package() -> None:
    assert fastseq.flash_attn is flash_attn
    assert set(flash_attn.__all__) == {name.partition(".")[0] for name in SIGNATURES}


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_types_that_flash_attn_has_not(dtype: torch.dtype, formula: Callable[..., Any]) -> None:
    q, k, v = qkv(2, 9, 4, 7, dtype=dtype)
    k, v = k[:, :6, :2], v[:, :6, :2]
    out, lse, nothing = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    wanted, sums = formula(q, k, v, causal=True)
    assert out.dtype == lse.dtype == nothing.dtype == dtype
    assert nothing.shape == (0,)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)
    assert bool((lse[:, :, :3] == torch.inf).all())  # more queries than keys: the first see nothing
    assert not out[:, :3].any()


def test_second_derivatives() -> None:
    q, k, v = qkv(1, 3, 2, 2, dtype=torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = flash_attn_func(q, k, v, causal=True, softcap=2.0)
        return result

    assert torch.autograd.gradgradcheck(call, (q, k, v), fast_mode=True)


def test_the_results_of_dropout(formula: Callable[..., Any]) -> None:
    """S_dmask has the probabilities and, as signs, what was dropped; the seed is torch's."""
    q, k, v = qkv(2, 40, 2, 8)
    torch.manual_seed(3)
    out, lse, signed = flash_attn_func(q, k, v, 0.25, return_attn_probs=True)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, 0.25), out)
    assert not torch.equal(flash_attn_func(q, k, v, 0.25), out)
    assert signed.shape == (2, 2, 128, 128)
    assert not signed[:, :, 40:].any()
    assert not signed[..., 40:].any()
    p = signed[:, :, :40, :40]
    dropped = p.signbit()
    assert abs(float(dropped.float().mean()) - 0.25) < 0.05
    torch.testing.assert_close(p.abs().sum(-1), torch.ones(2, 2, 40))
    wanted, sums = formula(q, k, v, kept=~dropped * kept_scale(0.25))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)


def test_varlen_results_of_dropout() -> None:
    q, k, v = (x.flatten(0, 1) for x in qkv(2, 20, 2, 8))
    bounds = torch.tensor([0, 3, 40], dtype=torch.int32)
    out, lse, signed = flash_attn_varlen_func(q, k, v, bounds, bounds, 37, 37, 0.5, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 40)
    assert signed.shape == (2, 2, 128, 128)
    torch.testing.assert_close(signed[0].abs().sum(-1)[:, :3], torch.ones(2, 3))
    assert not signed[0, :, 3:].any()


def test_negative_windows_are_none() -> None:
    q, k, v = qkv(1, 9, 2, 4)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(-7, -2)), flash_attn_func(q, k, v))


def test_paged_varlen_is_packed() -> None:
    """Values and gradients through a block table are those of packed keys."""
    pages, lengths = torch.randn(7, 4, 2, 8, requires_grad=True), [6, 0, 9]
    table = torch.tensor([[5, 1, 99], [0, 0, 0], [2, 6, 3]], dtype=torch.int32)
    q, bounds_q = torch.randn(8, 4, 8), torch.tensor([0, 2, 4, 8], dtype=torch.int32)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = torch.cat([pages[table[n, : -(-size // 4)].long()].flatten(0, 1)[:size] for n, size in enumerate(lengths)])
    sizes = bounds_q, bounds, 4, 9
    got = flash_attn_varlen_func(q, pages, pages * 2, *sizes, causal=True, block_table=table)
    wanted = flash_attn_varlen_func(q, packed, packed * 2, *sizes, causal=True)
    assert torch.equal(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), pages), torch.autograd.grad(wanted.square().sum(), pages)
    )


def test_it_compiles_whole() -> None:
    q, k, v = qkv(2, 9, 2, 4)
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True))


X = torch.zeros(2, 5, 4, 8)
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "named", "error", "message"),
    [
        ((X, X, X, torch.ones(2, 5)), {}, TypeError, "dropout_p: got a Tensor.*4th positional argument"),
        ((X, X, X), {"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        (
            (X, X[:, :, :3], X[:, :, :3]),
            {},
            ValueError,
            "k: got 3 heads, wanted a number that divides the 4 heads of q",
        ),
        ((X, X[:1], X[:1]), {}, ValueError, r"k: got shape \(1, 5, 4, 8\)"),
        ((X, X, X[:, :4]), {}, ValueError, r"v: got shape \(2, 4, 4, 8\)"),
        ((X, X, X.double()), {}, TypeError, "v: got float64, wanted float32"),
        ((X, X[..., :7], X), {}, ValueError, "k: got shape"),
        ((X[0], X, X), {}, ValueError, r"q: got shape \(5, 4, 8\), wanted \(B, Sq, Hq, D\)"),
        ((X, None, X), {}, TypeError, "k: got NoneType"),
        ((X, X, X), {"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes: got shape \(3,\)"),
        ((X, X, X), {"window_size": 3}, TypeError, "window_size: got 3"),
        ((X, X, X), {"causal": torch.ones(2)}, TypeError, r"causal: got a float32 tensor.*wanted True or False"),
        ((X, X, X), {"return_attn_probs": torch.ones(2)}, TypeError, "return_attn_probs: got a float32 tensor"),
    ],
    ids=str,
)
def test_errors(args: Any, named: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_attn_func(*args, **named)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": BOUNDS[:2]}, ValueError, r"cu_seqlens_k: got shape \(3,\)"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 6])}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.tensor([0.0, 2, 5])}, TypeError, "cu_seqlens_k: got float32"),
        ({"max_seqlen_q": 2}, ValueError, "max_"),
        ({"q": X}, ValueError, r"q: got shape \(2, 5, 4, 8\), wanted \(total_q, Hq, D\)"),
        ({"k": X[:, :, :3, None], "v": X[:, :, :3, None]}, ValueError, "k: got shape"),
        ({"block_table": torch.zeros(2, 1).int()}, ValueError, r"k: got shape \(5, 4, 8\), wanted \(pages"),
    ],
    ids=str,
)
def test_varlen_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    named: dict[str, Any] = {"q": X[0], "k": X[0], "v": X[0], "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}
    named.update({"max_seqlen_q": 3, "max_seqlen_k": 3, **changes})
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**named)


def test_packed_errors() -> None:
    with pytest.raises(ValueError, match=r"kv: got shape \(2, 5, 4, 8\), wanted \(B, Sk, 2, Hk, D\)"):
        flash_attn.flash_attn_kvpacked_func(X, X)
    with pytest.raises(ValueError, match=r"qkv: got shape \(2, 5, 4, 8\), wanted \(total, 3, H, D\)"):
        flash_attn.flash_attn_varlen_qkvpacked_func(X, BOUNDS, 3)


def test_unpad_and_pad() -> None:
    hidden = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    packed, indices, bounds, longest, used = bert_padding.unpad_input(hidden, mask)
    assert torch.equal(packed, hidden[mask.bool()])
    assert indices.tolist() == [0, 1, 11, 12, 14]
    assert bounds.tolist() == [0, 2, 2, 5]
    assert bounds.dtype == used.dtype == torch.int32
    assert longest == 3
    assert used.tolist() == [2, 0, 3]
    padded = bert_padding.pad_input(packed, indices, 3, 5)
    assert torch.equal(padded, hidden * mask[..., None])
    weights = torch.randn_like(hidden)
    (found,) = torch.autograd.grad((padded * weights).sum(), hidden)
    assert torch.equal(found, weights * mask[..., None])


def test_unused_places_are_packed_and_not_counted() -> None:
    hidden = torch.randn(2, 4, 3)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    packed, indices, bounds, longest, used = bert_padding.unpad_input(hidden, mask.bool(), unused.bool())
    assert torch.equal(packed, hidden[(mask + unused).bool()])
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert (bounds.tolist(), longest, used.tolist()) == ([0, 3, 7], 4, [2, 1])


def test_concatenated_sequences() -> None:
    hidden = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, bounds, longest = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    assert torch.equal(packed, torch.cat([hidden[0, :5], hidden[1, :5], hidden[2]]))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert (bounds.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)


def test_padding_errors() -> None:
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 4\), wanted \(B, S\) = \(2, 5\)"):
        bert_padding.unpad_input(X, torch.ones(2, 4))
    with pytest.raises(ValueError, match="hidden_states: got shape"):
        bert_padding.unpad_input(X[0, 0], torch.ones(4, 8))
    with pytest.raises(ValueError, match="values: got shape"):
        bert_padding.index_put_first_axis(torch.zeros(3), torch.tensor([0, 1, 2]), 4)
