"""flash_attn's own test rule on random cases of its parameter space: outputs, logsumexps, gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastseq import flash_attn
from fastseq.ops.attention.dropout import kept_scale

SIZES = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (16, 31, 64, 77, 129, 256, 509)


class Case(NamedTuple):
    """What is drawn at random."""

    function: str
    dtype: torch.dtype
    d: int
    heads: tuple[int, int]
    lengths: tuple[tuple[int, int], ...]  # of queries and keys, a pair a sequence
    causal: bool
    window: tuple[int, int]
    softcap: float
    alibi: bool
    dropout: float


def draw(number: int, longest: int = 77) -> Case:
    r = random.Random(number)
    function = ("func", "kvpacked_func", "qkvpacked_func")[number % 3]
    varlen = number % 2 == 1
    kv = r.choice((1, 2))
    heads = (kv, kv) if function == "qkvpacked_func" else (kv * r.choice((1, 2, 3) if kv == 1 else (1, 2)), kv)
    sizes = [n for n in LENGTHS if n <= longest]  # with one key, torch is exact: the rule is about more
    pairs = [(r.choice([1, 3, *sizes]), r.choice(sizes)) for _ in range(r.choice((1, 2)))]
    pairs = [(b, b) if function == "qkvpacked_func" or r.random() < 0.3 else (a, b) for a, b in pairs]
    if not varlen:
        pairs = pairs[:1] * min(len(pairs), 2)
    elif r.random() < 0.3:
        pairs.insert(1, (0, 0))
    window = r.choice([(-1, -1)] * 3 + [(5, 0), (3, 7), (40, 13), (-1, 3), (20, -1)])
    return Case(
        ("varlen_" if varlen else "") + function,
        r.choice((torch.bfloat16, torch.float16)),
        r.choice(SIZES),
        heads,
        tuple(pairs),
        r.random() < 0.4,
        window,
        r.choice((0.0, 0.0, 15.0)),
        r.random() < 0.3,
        r.choice((0.0, 0.0, 0.17)),
    )


def rows_of(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """A (1,length,...) for each sequence, of (B,S,...) or (total,...)."""
    return list(x.split(1)) if x.dim() == 4 else [part[None] for part in x.split(lengths)]


def call(case: Case, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Any:
    function = getattr(flash_attn, f"flash_attn_{case.function}")
    varlen, axis = case.function.startswith("varlen"), -3
    lengths: list[Any] = []
    if varlen:
        bounds = [torch.tensor([0, *n], device=q.device).cumsum(0).int() for n in zip(*case.lengths, strict=True)]
        most = [max(n) for n in zip(*case.lengths, strict=True)]
        lengths = [bounds[0], most[0]] if "qkv" in case.function else [*bounds, *most]
    if "qkv" in case.function:
        tensors = [torch.stack((q, k, v), axis)]
    elif "kv" in case.function:
        tensors = [q, torch.stack((k, v), axis)]
    else:
        tensors = [q, k, v]
    named = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap, "alibi_slopes": slopes}
    return function(*tensors, *lengths, case.dropout, return_attn_probs=True, **named)


def check(
    case: Case,
    formula: Callable[..., Any],
    rule: Callable[..., None],
    randn: Callable[..., Tensor],
    device: str = "cpu",
) -> None:
    (hq, hk), d, varlen = case.heads, case.d, case.function.startswith("varlen")
    lq, lk = (list(n) for n in zip(*case.lengths, strict=True))
    shapes = [(sum(n),) if varlen else (len(n), n[0]) for n in (lq, lk)]
    q = randn(*shapes[0], hq, d, dtype=case.dtype, device=device)
    k, v = (randn(*shapes[1], hk, d, dtype=case.dtype, device=device) for _ in range(2))
    slopes = (torch.rand(len(lq), hq) * 0.3).to(device) if case.alibi else None
    out, lse, signed = call(case, q, k, v, slopes)
    assert out.shape == q.shape
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32

    named: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}

    def whole(upcast: bool) -> tuple[Tensor, Tensor]:
        outs, sums = [], []
        parts = zip(rows_of(q, lq), rows_of(k, lk), rows_of(v, lk), strict=True)
        for n, (q_n, k_n, v_n) in enumerate(parts):
            kept = None
            if case.dropout:
                kept = ~signed[n : n + 1, :, : q_n.shape[1], : k_n.shape[1]].signbit() * kept_scale(case.dropout)
            slope = None if slopes is None else slopes[n]
            found = formula(q_n, k_n, v_n, slopes=slope, kept=kept, upcast=upcast, **named)
            outs.append(found[0][0] if varlen else found[0])
            sums.append(found[1][0] if varlen else found[1])
        return torch.cat(outs), torch.cat(sums, -1 if varlen else 0)

    (wanted, sums), (rough, _) = whole(True), whole(False)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-4, atol=1e-4)
    rule("out", out, wanted, rough)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad(x, (q, k, v), weights.to(x.dtype)) for x in (out, wanted, rough)]
    for name, got, want, low in zip("qkv", *grads, strict=True):
        rule(f"d{name}", got, want.double(), low)


@pytest.mark.parametrize("number", range(96))
def test_random_case(number: int, formula: Any, rule: Any, randn: Any) -> None:
    check(draw(number), formula, rule, randn)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1000, 1500))
def test_more_random_cases(number: int, formula: Any, rule: Any, randn: Any) -> None:
    check(draw(number, longest=509), formula, rule, randn)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(2000, 2024))
def test_random_case_on_a_gpu(number: int, formula: Any, rule: Any, randn: Any) -> None:
    check(draw(number, longest=509), formula, rule, randn, "cuda")


def test_the_cases_have_everything() -> None:
    cases = [draw(number) for number in range(96)]
    assert len({c.function for c in cases}) == 6
    assert {c.d for c in cases} == set(SIZES)
    assert {c.dtype for c in cases} == {torch.bfloat16, torch.float16}
    assert any(q > k > 0 and c.causal for c in cases for q, k in c.lengths)
    assert any(c.dropout and c.softcap and c.alibi for c in cases)
    assert any((0, 0) in c.lengths for c in cases)
