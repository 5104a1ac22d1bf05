"""Attention: the reference against softmax with whole masks, the dropout's bits, and every backend on what is hard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.flash_attn import flash_attn_func
from fastseq.ops.attention import dot_product as ops
from fastseq.ops.attention.dot_product import eager, reference
from fastseq.ops.attention.dropout import keep_mask, kept_scale, threshold
from fastseq.testing import backend_of, compare, to_device

INF, NAN = math.inf, math.nan
NUMBERS = {"max_q": 0, "max_k": 0, "scale": 0.35, "causal": False, "window_left": -1, "window_right": -1}
NUMBERS |= {"softcap": 0.0, "dropout": 0.0}
TENSORS = ("bias", "slopes", "cu_seqlens_q", "cu_seqlens_k", "key_lengths", "seed")


@pytest.fixture(
    params=[
        pytest.param(b.name, marks=[pytest.mark.gpu] * (b.device == "cuda"))
        for b in ops.attention.backends
        if b.name
        not in ("reference", "flash_attn", "sdpa")  # the last two have no float32; see test_attention_adapters
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced; what it is for."""
    chosen = backend_of(ops.attention, request.param)
    reason = chosen.available()
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with fastseq.use(request.param):
        yield chosen.device or "cpu"


def arguments(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Any]:
    """The op's arguments, from those that are not as usual."""
    numbers = {**NUMBERS, "max_q": q.shape[1], "max_k": k.shape[1], **options}
    return [q, k, v, *(options.get(name) for name in TENSORS), *(numbers[name] for name in NUMBERS)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def inputs(
    b: int, sq: int, sk: int, hq: int, hk: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    return normal(b, sq, hq, d, dtype=dtype), normal(b, sk, hk, d, dtype=dtype), normal(b, sk, hk, d, dtype=dtype)


def seen(lq: int, lk: int, causal: bool = False, left: int = -1, right: int = -1) -> Tensor:
    """(lq,lk) which keys a query sees."""
    mask = torch.ones(lq, lk, dtype=torch.bool)
    for i in range(lq):
        for j in range(lk):
            behind = (lk - 1 - j) - (lq - 1 - i)  # both counted from the end
            mask[i, j] = not ((causal and behind < 0) or (left >= 0 and behind > left) or (0 <= right < -behind))
    return mask


def plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over a whole mask for one sequence (L,H,D): output, logsumexp (H,L) and weights."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * args.get("scale", 0.35)
    if args.get("softcap"):
        scores = args["softcap"] * torch.tanh(scores / args["softcap"])
    if args.get("bias") is not None:
        scores = scores + args["bias"]
    if args.get("slopes") is not None:
        lq, lk = mask.shape
        distance = (torch.arange(lk) - (lk - lq) - torch.arange(lq)[:, None]).abs()
        scores = scores - args["slopes"][:, None, None] * distance
    scores = scores.masked_fill(~mask, -INF)
    weights = scores.softmax(-1).nan_to_num()
    if args.get("factors") is not None:
        return torch.einsum("hij,jhd->ihd", weights * args["factors"], v), scores.logsumexp(-1), weights
    return torch.einsum("hij,jhd->ihd", weights, v), scores.logsumexp(-1), weights


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_left": 2, "window_right": 1},
    {"causal": True, "window_left": 1, "window_right": 3},
    {"softcap": 0.7, "causal": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 6, 4, 2, 3), (1, 6, 4, 2, 1, 5)])
def test_reference_is_softmax_with_a_whole_mask(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Outputs, and gradients by autograd through it; with bias, slopes and lengths."""
    b, sq, sk, hq = shape[:4]
    q, k, v = (x.requires_grad_() for x in inputs(*shape, dtype=torch.float64))  # type: ignore[arg-type]
    bias = normal(1, hq, sq, sk, dtype=torch.float64).requires_grad_()
    slopes, lengths = normal(b, hq, dtype=torch.float64).abs(), torch.tensor([sk - 1, sk][:b], dtype=torch.int32)
    args = arguments(q, k, v, bias=bias, slopes=slopes, key_lengths=lengths, **options)
    rows = []
    for n, lk in enumerate(lengths.tolist()):
        mask = seen(
            sq, lk, *(options.get(x, y) for x, y in [("causal", False), ("window_left", -1), ("window_right", -1)])
        )
        here = {**options, "bias": bias[0, :, :, :lk], "slopes": slopes[n]}
        rows.append(plainly(q[n], k[n, :lk], v[n, :lk], mask, here)[:2])
    wanted_out, wanted_lse = (torch.stack(x) for x in zip(*rows, strict=True))
    out, lse = reference.attention(*args)
    compare((out, lse), (wanted_out.detach(), wanted_lse.detach()))
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -INF, 0)
    objective = (grad_out * wanted_out).sum() + (grad_lse * wanted_lse.masked_fill(lse == -INF, 0)).sum()
    wanted = torch.autograd.grad(objective, (q, k, v, bias))
    wanted = [w.nan_to_num() for w in wanted]  # of queries that see nothing
    compare(reference.attention_grad(grad_out, grad_lse, out, lse, *args, True), wanted)


def test_packed_sequences_are_each_their_own(device: str) -> None:
    """Also the dropout's: it counts positions from the beginning of the sequence."""
    lengths_q, lengths_k, shorter = [3, 0, 7, 40], [5, 2, 7, 33], [5, 1, 4, 33]
    q, k, v = (
        normal(1, sum(lengths_q) + 2, 4, 6),
        normal(1, sum(lengths_k) + 3, 2, 6),
        normal(1, sum(lengths_k) + 3, 2, 6),
    )
    starts_q, starts_k = ([1 + sum(x[:n]) for n in range(len(x) + 1)] for x in (lengths_q, lengths_k))
    bias, slopes, seed = normal(4, 1, 41, 33), torch.rand(4, 4), torch.tensor([987654321987654321])
    options: dict[str, Any] = {"causal": True, "dropout": 0.4, "seed": seed, "slopes": slopes, "bias": bias}
    offsets = {"cu_seqlens_q": torch.tensor(starts_q).int(), "cu_seqlens_k": torch.tensor(starts_k).int()}
    more = {"key_lengths": torch.tensor(shorter).int(), "max_q": 41, "max_k": 33}
    args = to_device(arguments(q, k, v, **options, **offsets, **more), device)
    out, lse = to_device(ops.attention(*args), "cpu")
    compare((out[:, 0], lse[..., 0]), (torch.zeros(1, 4, 6), torch.full((1, 4), -INF)))  # a token of no sequence
    for n, (lq, lk) in enumerate(zip(lengths_q, shorter, strict=True)):
        own_q, own_k = slice(starts_q[n], starts_q[n] + lq), slice(starts_k[n], starts_k[n] + lk)
        kept = keep_mask(seed, n * 4 + torch.arange(4), torch.arange(lq), lk, 0.4)
        here = {"bias": bias[n, :, :lq, :lk], "slopes": slopes[n], "factors": kept * kept_scale(0.4)}
        wanted = plainly(q[0, own_q], k[0, own_k], v[0, own_k], seen(lq, lk, causal=True), here)
        compare((out[0, own_q], lse[0, :, own_q]), wanted[:2])


def test_key_lengths_are_shorter_keys(device: str) -> None:
    q, k, v = inputs(3, 5, 9, 4, 2, 8)
    lengths = torch.tensor([9, 0, 4], dtype=torch.int32)
    k[2, 4:], v[2, 4:], k[1] = NAN, NAN, NAN
    args = to_device(arguments(q, k, v, key_lengths=lengths, causal=True), device)
    out, lse = to_device(ops.attention(*args), "cpu")
    for n, length in enumerate(lengths.tolist()):
        wanted = plainly(q[n], k[n, :length], v[n, :length], seen(5, length, causal=True), {})
        compare((out[n], lse[n]), wanted[:2])


def test_causal_is_aligned_bottom_right(device: str) -> None:
    """As flash_attn has it since 2.1; a query that is before all keys has output 0."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    q, k, v = inputs(1, 3, 5, 1, 1, 4)
    out, lse = to_device(ops.attention(*to_device(arguments(q, k, v, causal=True), device)), "cpu")
    compare((out[0], lse[0]), plainly(q[0], k[0], v[0], mask, {})[:2])
    out, lse = to_device(ops.attention(*to_device(arguments(k, q, q, causal=True), device)), "cpu")
    assert (out[0, :2] == 0).all()
    assert (lse[0, 0, :2] == -INF).all()
    compare((out[0, 2:], lse[0, :, 2:]), plainly(k[0, 2:], q[0], q[0], seen(3, 3, causal=True), {})[:2])


@pytest.mark.parametrize("options", [{"causal": True}, {"window_left": 3, "window_right": 0}], ids=str)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_what_is_hidden_is_not_read(device: str, poison: float, options: dict[str, Any]) -> None:
    """The last query, key and value are hidden from all earlier ones: those have the same bits as without."""
    args = to_device(arguments(*inputs(2, 37, 37, 4, 2, 16), **options), device)
    poisoned = [a.clone() if isinstance(a, Tensor) else a for a in args]
    for x in poisoned[:3]:
        x[:, -1] = poison
    clean, dirty = ops.attention(*args), ops.attention(*poisoned)
    compare((dirty[0][:, :-1], dirty[1][..., :-1]), (clean[0][:, :-1], clean[1][..., :-1]), 0.0)
    assert dirty[0][:, -1].isnan().all()
    grad_out = torch.randn_like(clean[0])
    grad_out[:, -1] = 0
    unhurt = ops.attention_grad(grad_out, None, *clean, *args, False)
    hurt = ops.attention_grad(grad_out, None, *dirty, *poisoned, False)
    compare(hurt[0][:, :-1], unhurt[0][:, :-1], 0.0)
    far = slice(0, 32)  # keys that the last query does not see in the window
    if "window_left" in options:
        compare([h[:, far] for h in hurt[1:3]], [u[:, far] for u in unhurt[1:3]], 0.0)


@pytest.mark.parametrize(
    ("seed", "dropout"), [(0, 0.1), (-1, 0.5), (2**63 - 1, 0.3), (-(2**63), 0.999999), (123456789123, 1.0 - 2**-17)]
)
def test_dropout_is_the_documented_hash(seed: int, dropout: float) -> None:
    """Bit for bit, in Python's integers; for words of every place in a block of 32 keys."""
    heads, rows, keys = torch.tensor([[0, 7], [2**31 - 1, 100000]]), torch.tensor([0, 1, 65537, 2**20 + 3]), 71
    mask = keep_mask(torch.tensor([seed]), heads, rows, keys, dropout)
    wanted = [
        [[reference.keeps(seed, nh, i, j, threshold(dropout)) for j in range(keys)] for i in rows.tolist()]
        for nh in heads.flatten().tolist()
    ]
    assert torch.equal(mask, torch.tensor(wanted).view(2, 2, len(rows), keys))


def test_dropout_is_as_it_is_written() -> None:
    """The definition once more, a line a line, so that the two implementations cannot be wrong together."""
    word = 0xFFFFFFFF

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & word
        return x ^ (x >> 16)

    seed, n, h, heads, i = 0x0123456789ABCDEF, 3, 2, 5, 9
    lo, hi, nh = seed & word, seed >> 32, n * heads + h
    a = mix((mix((mix(lo) + nh) & word) + i) & word)
    b = mix(mix((mix(hi ^ 0x9E3779B9) + nh) & word) ^ i)
    levels = []
    for j in range(64):
        x = (a + (j // 32 * 16 + j % 16) * 0x9E3779B9) & word
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
        x = (((x ^ (x >> 15)) + b) * 0x846CA68B) & word
        x ^= x >> 16
        levels.append(x >> 16 if j % 32 >= 16 else x & 0xFFFF)
    kept = keep_mask(torch.tensor([seed]), torch.tensor([nh]), torch.tensor([i]), 64, 0.25)
    assert kept.flatten().tolist() == [level >= 16384 for level in levels]
    for j in (5, 20):  # a key of the low halves, and one of the high: its own level is the last that keeps it
        for level, keeps in ((levels[j], True), (levels[j] + 1, False)):
            kept = keep_mask(torch.tensor([seed]), torch.tensor([nh]), torch.tensor([i]), 64, level / 65536)
            assert bool(kept[0, 0, j]) == keeps


def test_dropout_is_random_enough() -> None:
    """The rate; and no two rows, heads, seeds or neighbours are alike: correlations of 2^17 entries within 5 sigma."""
    heads, rows, keys = torch.arange(8), torch.arange(64), 256
    one = keep_mask(torch.tensor([42]), heads, rows, keys, 0.3).double()
    other = keep_mask(torch.tensor([43]), heads, rows, keys, 0.3).double()
    upper = keep_mask(torch.tensor([42 + (1 << 32)]), heads, rows, keys, 0.3).double()
    sigma = (0.3 * 0.7 / one.numel()) ** 0.5
    assert abs(float(one.mean()) - 0.7) < 5 * sigma
    assert (one.mean((1, 2)) - 0.7).abs().max() < 5 * sigma * 8**0.5
    assert (one.mean((0, 1)) - 0.7).abs().max() < 5.5 * sigma * 256**0.5
    pairs = {"seed": (one, other), "upper half": (one, upper), "heads": (one[1:], one[:-1])}
    pairs |= {"rows": (one[:, 1:], one[:, :-1]), "keys": (one[..., 1:], one[..., :-1])}
    pairs |= {"halves of a word": (one[..., :16], one[..., 16:32])}
    for name, (a, b) in pairs.items():
        correlation = float(((a - 0.7) * (b - 0.7)).mean()) / 0.21
        assert abs(correlation) < 5 / a.numel() ** 0.5, name


def test_dropout_in_steps() -> None:
    assert [threshold(p) for p in (0.0, 1e-6, 0.1, 0.3, 0.5, 1 - 1e-9)] == [0, 0, 6554, 19661, 32768, 65535]
    assert kept_scale(0.5) == 2.0
    q, k, v = inputs(1, 3, 4, 1, 1, 2)
    without = reference.attention(*arguments(q, k, v))
    compare(reference.attention(*arguments(q, k, v, dropout=1e-6, seed=torch.tensor([1]))), without, 0.0)


def test_dropout_keeps_the_mean(device: str) -> None:
    q, k, v = inputs(1, 1, 40, 1, 1, 8)
    whole = to_device(arguments(q, k, v), device)
    mean = torch.stack(
        [
            ops.attention(*to_device(arguments(q, k, v, dropout=0.5, seed=torch.tensor([s])), device))[0]
            for s in range(300)
        ]
    ).mean(0)
    spread = float((v.square().sum(1).max() / 40) ** 0.5)
    assert (mean - ops.attention(*whole)[0]).abs().max() < 6 * spread * (1 / 300) ** 0.5


@pytest.mark.parametrize("kind", ["packed", "dropout", "slopes", "dead rows"])
def test_second_derivatives(kind: str) -> None:
    """What is not among the small samples of the contract tests."""
    q, k, v = inputs(1, 5, 5, 2, 1, 2, dtype=torch.float64)
    bias = normal(1, 2, 3, 3, dtype=torch.float64) if kind == "packed" else normal(1, 1, 5, 5, dtype=torch.float64)
    options: dict[str, Any] = {
        "packed": {"cu_seqlens_q": torch.tensor([0, 2, 5]).int(), "cu_seqlens_k": torch.tensor([1, 2, 5]).int()}
        | {"max_q": 3, "max_k": 3, "softcap": 1.0},
        "dropout": {"dropout": 0.4, "seed": torch.tensor([5])},
        "slopes": {"slopes": torch.rand(2)},
        "dead rows": {"key_lengths": torch.tensor([3]).int(), "causal": True},
    }[kind]
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]

    def outputs(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.attention(*arguments(*x[:3], bias=x[3], **options))
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


def test_third_derivatives() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 3, 3, 1, 1, 2, dtype=torch.float64))

    def second(q: Tensor, k: Tensor) -> Tensor:
        out, lse = ops.attention(*arguments(q, k, v, causal=True))
        first = torch.autograd.grad((out.square().sum() + lse.sum()), q, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), k, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (q, k), fast_mode=True)


def test_weights_are_the_softmax() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 3, 5, 2, 1, 4, dtype=torch.float64))
    lengths = torch.tensor([5, 2], dtype=torch.int32)
    weights = ops.weights(*arguments(q, k, v, causal=True, key_lengths=lengths))
    wanted = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    for n, lk in enumerate(lengths.tolist()):
        wanted[n, :, :, :lk] = plainly(q[n], k[n, :lk], v[n, :lk], seen(3, lk, causal=True), {})[2]
    compare(weights, wanted.detach())
    pull = torch.randn_like(weights)
    got = torch.autograd.grad((weights * pull).sum(), (q, k))
    compare(got, [g.nan_to_num() for g in torch.autograd.grad((wanted * pull).sum(), (q, k))])


def test_nothing_of_the_size_of_scores_is_kept(device: str) -> None:
    """What backward keeps is q, k, v, out and lse."""
    kept: list[Tensor] = []
    q, k, v = (x.to(device).requires_grad_() for x in inputs(2, 64, 64, 2, 2, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.attention(*arguments(q, k, v, dropout=0.1, seed=torch.tensor([1], device=device)))
    assert sum(x.numel() for x in kept) <= 4 * q.numel() + 2 * 2 * 64 + 1


class _Largest(TorchDispatchMode):
    """The number of bytes of the largest tensor that any op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def test_eager_goes_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1.1 MiB of scores and blocks of 256 KiB, no tensor has more than twice that: distances are int64."""
    monkeypatch.setitem(eager.BLOCK_BYTES, "cpu", 1 << 18)
    q, k, v = inputs(1, 384, 384, 2, 1, 8)
    args = arguments(q, k, v, causal=True)
    with torch.no_grad(), _Largest() as mode:
        out, lse = eager.attention(*args)
        eager.attention_grad(torch.ones_like(out), None, out, lse, *args, False)
    assert 1 << 17 <= mode.bytes <= 1 << 19


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("cu_seqlens_q", {"cu_seqlens_q": [0, 3, 2]}),
        ("cu_seqlens_q", {"cu_seqlens_q": [0, 3, 6]}),
        ("cu_seqlens_k", {"cu_seqlens_k": [-1, 3, 5]}),
        ("cu_seqlens_q", {"max_q": 2}),
        ("key_lengths", {"key_lengths": [4, 2]}),
        ("key_lengths", {"key_lengths": [-1, 2]}),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit(device: str, match: str, options: dict[str, Any]) -> None:
    if device != "cpu":
        pytest.skip("nobody waits for a GPU to see it")
    usual = {"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 3, 5], "key_lengths": [3, 2], "max_q": 3, "max_k": 3}
    given = {n: x if isinstance(x, int) else torch.tensor(x).int() for n, x in {**usual, **options}.items()}
    args = arguments(*inputs(1, 5, 5, 1, 1, 4), **given)
    with pytest.raises(ValueError, match=match):
        ops.attention(*args)
    out, lse = torch.zeros(1, 5, 1, 4), torch.zeros(1, 1, 5)
    with pytest.raises(ValueError, match=match):
        ops.attention_grad(out, None, out, lse, *args, False)
    with fastseq.use("reference"), pytest.raises(ValueError, match=match):
        ops.attention(*args)


@pytest.mark.parametrize("backend", ["eager", "reference", None])
def test_no_query_heads(backend: str | None) -> None:
    """Found by fuzzing: a key head that no query head shares, which flash_attn's names allow."""
    q, k, v = inputs(2, 3, 4, 0, 1, 4)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with fastseq.use(backend) if backend else nullcontext():
        out = flash_attn_func(*leaves, causal=True)
        out.sum().backward()
    assert out.shape == (2, 3, 0, 4)
    assert not any(x.grad.any() for x in leaves if x.grad is not None)
