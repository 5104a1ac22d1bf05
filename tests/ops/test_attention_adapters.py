"""The adapters of flash_attn's kernels, with a stand-in for those: the same signatures and the same habits, in torch.

The habits: logsumexp is +inf where nothing is visible, and where a NaN is; tokens of no sequence are left as they were;
rows begin at multiples of 16 bytes; a gradient of the logsumexp there is none.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops.attention import dot_product as ops
from fastseq.ops.attention.dot_product import eager, flash_package, reference, sdpa
from fastseq.testing import backend_of, compare, sample_inputs

INF, NAN = math.inf, math.nan


def ranges(x: Tensor, offsets: Tensor | None) -> list[slice]:
    """Where each sequence of (tokens,H,D) is."""
    bounds = [0, len(x)] if offsets is None else offsets.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert x.stride(-1) == 1
        assert all(s % 8 == 0 for s in x.stride()[:-1])
        assert x.data_ptr() % 16 == 0
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256


def scores(q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int, softcap: float) -> Tensor:
    """(H,lq,lk) of one sequence, -inf where hidden."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    t = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
    t = softcap * (t / softcap).tanh() if softcap else t
    lq, lk = t.shape[1:]
    distance = torch.arange(lk) - torch.arange(lq)[:, None] - (lk - lq)
    right = 0 if causal else right
    hidden = ((distance > right) & (right >= 0)) | ((distance < -left) & (left >= 0))
    return t.masked_fill(hidden, -INF)


def their_forward(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
    """Fill out (lq,H,D) and lse (H,lq) of one sequence."""
    t = scores(q, k, *options)
    lse.copy_(t.logsumexp(-1).nan_to_num(INF, INF, INF))
    p = t.softmax(-1).where((t != -INF).any(-1, keepdim=True) | t.isnan().any(-1, keepdim=True), 0)
    out.copy_(torch.einsum("hij,jhd->ihd", p, v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)))


def their_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *options: Any
) -> tuple[Tensor, ...]:
    """The gradients of one sequence, from what the forward pass left."""
    group, heads = q.shape[1] // k.shape[1], k.shape[1]
    g, q64, out = grad_out.double(), q.double(), out.double()
    k64, v64 = (x.double().repeat_interleave(group, 1) for x in (k, v))
    t, softcap = scores(q, k, scale, *options), options[-1]
    p = (t - lse.double()[..., None]).exp().masked_fill(t == -INF, 0)
    dp = torch.einsum("ihd,jhd->hij", g, v64)
    dt = (p * (dp - (g * out).sum(-1).T[..., None])).masked_fill(t == -INF, 0) * scale
    dt = dt * (1 - (t.masked_fill(t == -INF, 0) / softcap).square()) if softcap else dt
    dk, dv = torch.einsum("hij,ihd->jhd", dt, q64), torch.einsum("hij,ihd->jhd", p, g)
    return torch.einsum("hij,jhd->ihd", dt, k64), *(x.unflatten(1, (heads, group)).sum(2) for x in (dk, dv))


def run_forward(q: Tensor, k: Tensor, v: Tensor, offsets: Any, *options: Any) -> tuple[Tensor, Tensor]:
    """Dense (B,S,H,D) or packed (tokens,H,D)."""
    check(q, k, v)
    out = torch.full(q.shape, NAN, dtype=q.dtype)
    shape = (q.shape[0], q.shape[2], q.shape[1]) if offsets[0] is None else (q.shape[1], q.shape[0])
    lse = torch.full(shape, NAN)
    whole = (out, lse, q, k, v) if offsets[0] is None else tuple(x[None] for x in (out, lse, q, k, v))
    for o, norm, *rows in zip(*whole, strict=True):
        for at_q, at_k in zip(ranges(rows[0], offsets[0]), ranges(rows[1], offsets[1]), strict=True):
            their_forward(o[at_q], norm[:, at_q], rows[0][at_q], rows[1][at_k], rows[2][at_k], *options)
    return out, lse


def run_backward(given: tuple[Tensor, ...], grads: list[Tensor], offsets: Any, *options: Any) -> None:
    check(*given[:5])
    whole = (*given, *grads) if offsets[0] is None else tuple(x[None] for x in (*given, *grads))
    for g, q, k, v, out, lse, *made in zip(*whole, strict=True):
        for i, j in zip(ranges(q, offsets[0]), ranges(k, offsets[1]), strict=True):
            found = their_backward(g[i], q[i], k[j], v[j], out[i], lse[:, i], *options)
            for to, at, x in zip(made, (i, j, j), found, strict=True):
                to[at] = x


class Interface(types.ModuleType):
    """What flash_attn.flash_attn_interface has of 2.7 and later."""

    def _flash_attn_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, ...]:
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        options = softmax_scale, causal, window_size_left, window_size_right, softcap
        return *run_forward(q, k, v, (None, None), *options), q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        assert max_seqlen_q >= max(cu_seqlens_q.diff())
        assert max_seqlen_k >= max(cu_seqlens_k.diff())
        options = softmax_scale, causal, window_size_left, window_size_right, softcap
        random = q.new_empty(0), torch.empty(2, dtype=torch.int64)
        return *run_forward(q, k, v, (cu_seqlens_q, cu_seqlens_k), *options), *random

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, alibi_slopes) == (0.0, None)
        options = softmax_scale, causal, window_size_left, window_size_right, softcap
        run_backward((dout, q, k, v, out, softmax_lse), [dq, dk, dv], (None, None), *options)
        return torch.empty(0)

    def _flash_attn_varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, alibi_slopes) == (0.0, None)
        offsets = cu_seqlens_q, cu_seqlens_k
        options = softmax_scale, causal, window_size_left, window_size_right, softcap
        run_backward((dout, q, k, v, out, softmax_lse), [dq, dk, dv], offsets, *options)
        return torch.empty(0)


def _aten_forward(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    *_: Any,
    **o: Any,
) -> tuple[Tensor, ...]:
    assert dropout == 0
    options = o["scale"], causal, o["window_size_left"], o["window_size_right"], 0.0
    out, lse = run_forward(q, k, v, (cu_q, cu_k), *options)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, nothing


def _aten_backward(*args: Any, **o: Any) -> tuple[Tensor, ...]:
    given, offsets, causal = args[:6], args[6:8], args[11]
    grads = [torch.full(x.shape, NAN, dtype=x.dtype) for x in args[1:4]]
    options = o["scale"], causal, o["window_size_left"], o["window_size_right"], 0.0
    run_backward(given, grads, offsets, *options)
    return tuple(grads)


@pytest.fixture(params=["flash_attn", "sdpa"])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Each adapter, over a stand-in for its kernels."""
    torch.set_num_threads(1)  # a second one only costs on tensors this small
    if request.param == "flash_attn":
        package = types.ModuleType("flash_attn")
        package.flash_attn_interface = Interface("flash_attn.flash_attn_interface")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        yield flash_package
        return
    library = torch.library.Library("aten", "IMPL")  # on a CPU, torch has none of these
    library.impl("_flash_attention_forward", _aten_forward, "CPU")
    library.impl("_flash_attention_backward", _aten_backward, "CPU")
    yield sdpa
    library._destroy()


def test_is_the_reference(adapter: Any) -> None:
    """On all samples that it does not refuse."""
    dtype, tolerance = (torch.bfloat16, 1e-2) if adapter is sdpa else (torch.float16, 2e-3)
    ran = 0
    for args in sample_inputs("attention", dtype=dtype):
        if adapter.limits(*args) is None:
            compare(adapter.attention(*args), reference.attention(*args), tolerance)
            ran += 1
    assert ran >= 14
    ran = 0
    for args in sample_inputs("attention_grad", dtype=dtype):
        if adapter.limits_of_grad(*args) is None:
            compare(adapter.attention_grad(*args), reference.attention_grad(*args), tolerance)
            ran += 1
    assert ran >= 5


def test_refuses_what_it_has_not() -> None:
    for args in sample_inputs("attention", dtype=torch.bfloat16):
        q, k, _, bias, slopes, _, _, key_lengths, _, *numbers = args
        refused = any(x is not None for x in (bias, slopes, key_lengths)) or numbers[7] > 1e-5
        refused = refused or q.shape[-1] % 8 != 0 or not q.numel() or not k.numel()
        refused = refused or (args[5] is not None and len(args[5]) == 1)
        assert (flash_package.limits(*args) is not None) == refused
        assert (sdpa.limits(*args) is not None) == (refused or numbers[6] > 0)
    args = next(sample_inputs("attention", dtype=torch.float32))
    assert "float32" in str(sdpa.limits(*args))
    grads = next(sample_inputs("attention_grad", dtype=torch.bfloat16))
    assert "logsumexp" in str(sdpa.limits_of_grad(*grads))


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "no package with a version"), ("2.6.3", "2.7 or later"), ("2.8.0.post2", None), ("3.0.0b1", None)],
)
def test_which_package(version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    def version_of(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(flash_package, "no_cuda", lambda: None)
    flash_package.missing.cache_clear()
    found = flash_package.missing()
    flash_package.missing.cache_clear()
    assert found is None if reason is None else reason in str(found)


def test_says_that_the_package_is_not_there() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    assert "flash_attn is not installed" in ops.attention.explain(*next(sample_inputs("attention")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_kernels(name: str, dtype: torch.dtype) -> None:
    """Shapes of more than one tile, against eager on the same GPU."""
    forward, backward = (backend_of(op, name) for op in (ops.attention, ops.attention_grad))
    if (reason := forward.available()) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3
    for b, sq, sk, hq, hk, d, causal, left in [(2, 200, 200, 8, 8, 64, True, -1), (2, 100, 333, 8, 2, 128, True, 64)]:
        q = torch.randn(b, sq, hq, d, device="cuda", dtype=dtype)
        k, v = torch.randn(2, b, sk, hk, d, device="cuda", dtype=dtype).unbind(0)
        args = q, k, v, *(None,) * 6, sq, sk, d**-0.5, causal, left, -1, 0.0, 0.0
        assert forward.refusal(*args) is None
        results = forward.run(*args)
        compare(results, eager.attention(*args), tolerance)
        args = torch.randn_like(q), None, *results, *args, False
        compare(backward.run(*args), eager.attention_grad(*args), tolerance)
