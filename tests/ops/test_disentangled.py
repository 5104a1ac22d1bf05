"""Disentangled attention against the formula on whole matrices, and against Hugging Face's own module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseq
from fastseq.functional import disentangled_attention, relative_slots
from fastseq.ops.attention import disentangled
from fastseq.ops.attention.disentangled.reference import _hash
from fastseq.registry import OPS
from fastseq.testing import backend_of

BACKENDS = [
    pytest.param((b.name, device), id=f"{b.name}-{device}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for b in OPS["disentangled_attention"].backends
    if b.name != "reference"
    for device in ([b.device] if b.device else ["cpu", "cuda"])
]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Any:
    name, device = request.param
    reason = backend_of(OPS["disentangled_attention"], name).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(name):
        yield device


def case(
    b: int, s: int, h: int, d: int, p: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    shapes = [(b, s, h, d)] * 3 + [(p, h, d)] * 2
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for shape in shapes]


def formula(
    q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, slots: Tensor, kept: Any = 1
) -> Tensor:
    """The docstring's lines, for all rows and heads, in float64."""
    places = torch.arange(q.shape[1], device=q.device)
    slot = slots.long()[places[:, None] - places + len(slots) // 2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT
    if pos_key is not None:
        met = torch.einsum("bhid,phd->bhip", q, pos_key.double())
        scores = scores + met.gather(3, slot.expand(scores.shape))
    if pos_query is not None:
        met = torch.einsum("bhjd,phd->bhjp", k, pos_query.double())
        scores = scores + met.gather(3, slot.t().expand(scores.shape)).mT
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    p = (scores / (q.shape[-1] * terms) ** 0.5).softmax(-1)
    return ((p * kept) @ v).transpose(1, 2)


@pytest.mark.parametrize("terms", [(), (3,), (4,), (3, 4)], ids=["content", "c2p", "p2c", "both"])
@pytest.mark.parametrize(("s", "d", "buckets"), [(5, 3, 4), (70, 16, 16), (130, 64, 32), (33, 17, -1)])
def test_values_and_gradients(device: str, s: int, d: int, buckets: int, terms: tuple[int, ...]) -> None:
    slots, p = relative_slots(s, position_buckets=buckets, max_position=24, device=device)
    given = case(2, s, 2, d, p, device=device)
    args: list[Any] = [x if i < 3 or i in terms else None for i, x in enumerate(given)]
    leaves = [x for x in args if x is not None]
    weights = torch.randn(2, s, 2, d, device=device)
    got, wanted = disentangled_attention(*args, slots=slots), formula(*args, slots)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((got * weights).sum(), leaves)
    for g, w in zip(found, torch.autograd.grad((wanted * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_good_as_they_can_be(device: str, dtype: torch.dtype) -> None:
    """The error is at most twice that of the exact result, rounded."""
    slots, p = relative_slots(100, position_buckets=16, max_position=64, device=device)
    args = case(2, 100, 2, 32, p, dtype, device)
    got, wanted = disentangled_attention(*args, slots=slots), formula(*args, slots)
    rounded = (wanted.to(dtype).double() - wanted).abs().max()
    assert (got.double() - wanted).abs().max() <= 2 * rounded + 1e-3
    for g, w in zip(
        torch.autograd.grad(got.double().square().sum(), args),
        torch.autograd.grad(wanted.square().sum(), [*args]),
        strict=True,
    ):
        torch.testing.assert_close(g.double(), w.double(), rtol=3e-2, atol=float(w.abs().max()) * 1e-2)


def test_packed_and_padded_are_the_rows_alone(device: str) -> None:
    lengths = [40, 1, 0, 17]
    slots, p = relative_slots(40, position_buckets=8, max_position=32, device=device)
    q, k, v, pos_key, pos_query = case(4, 40, 2, 8, p, device=device)
    tables = pos_key, pos_query
    weights = torch.randn(4, 40, 2, 8, device=device)
    alone = [
        disentangled_attention(*(x[i : i + 1, :n] for x in (q, k, v)), *tables, slots=slots)
        for i, n in enumerate(lengths)
    ]
    loss = sum(
        ((a * weights[i, :n]).sum() for i, (a, n) in enumerate(zip(alone, lengths, strict=True))),
        torch.zeros((), device=device),
    )
    wanted = torch.autograd.grad(loss, (q, k, v, *tables))
    there = torch.arange(40, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = disentangled_attention(q, k, v, *tables, slots=slots, lengths=torch.tensor(lengths, device=device))
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    packed = disentangled_attention(q[there], k[there], v[there], *tables, slots=slots, cu_seqlens=bounds)
    assert not padded[~there].any()
    for got in (padded[there], packed):
        torch.testing.assert_close(got, torch.cat([a[0] for a in alone]), rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad((got * weights[there]).sum(), (q, k, v, *tables))
        for g, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=2e-5, atol=5e-5)


def test_dropout_is_the_hash(device: str) -> None:
    """Values and gradients with dropout are those of the formula with the mask that the hash says."""
    seed, share, n, s, h = 0x1234_5678_9ABC_DEF0, 0.3, 2, 37, 2
    threshold = round(share * 65536)
    mask = [
        [[[_hash(seed, b * h + g, i, j) >= threshold for j in range(s)] for i in range(s)] for g in range(h)]
        for b in range(n)
    ]
    kept = torch.tensor(mask, device=device) * (65536 / (65536 - threshold))
    assert abs(float((kept > 0).double().mean()) - 0.7) < 0.02
    slots, p = relative_slots(s, position_buckets=8, max_position=32, device=device)
    args = case(n, s, h, 8, p, device=device)
    seeds = torch.tensor([seed], device=device)
    got = disentangled.attend(*args, slots, None, None, seeds, s, 24**-0.5, share)[0]
    wanted = formula(*args, slots, kept)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(got.square().sum(), args)
    for g, w in zip(found, torch.autograd.grad(wanted.square().sum(), args), strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-4)


def test_dropout_is_reproducible_and_differentiable_twice() -> None:
    slots, p = relative_slots(5, position_buckets=4, max_position=8)
    args = case(2, 5, 2, 3, p, torch.float64)

    def call(*values: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return disentangled_attention(*values, slots=slots, dropout_p=0.4, generator=generator)

    assert torch.equal(call(*args), call(*args))
    assert torch.autograd.gradcheck(call, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, args, fast_mode=True)


def test_lse_is_that_of_the_scores(device: str) -> None:
    slots, p = relative_slots(9, position_buckets=4, max_position=8, device=device)
    q, k, v, *_ = case(2, 9, 2, 4, p, device=device)
    lse = disentangled.attend(q, k, v, None, None, slots, None, None, None, 9, 0.3, 0.0)[1]
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 0.3
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(lse.sum(), (q, k))
    for g, w in zip(found, torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_nan_in_a_table_stays_in_its_head(device: str) -> None:
    slots, p = relative_slots(12, position_buckets=8, max_position=32, device=device)
    args = [x.detach() for x in case(2, 12, 2, 4, p, device=device)]
    clean = disentangled_attention(*args, slots=slots)
    args[3][int(slots[len(slots) // 2 + 3]), 1] = torch.nan  # the slot of distance 3: rows from the fourth on meet it
    out = disentangled_attention(*args, slots=slots)
    assert out[:, 3:, 1].isnan().all()
    assert torch.equal(out[:, :, 0], clean[:, :, 0])


@pytest.mark.parametrize("share_att_key", [True, False])
@pytest.mark.parametrize("pos_att_type", [["c2p", "p2c"], ["c2p"], ["p2c"], []], ids="|".join)
@pytest.mark.parametrize("buckets", [8, -1])
def test_hugging_face_module(buckets: int, pos_att_type: list[str], share_att_key: bool) -> None:
    """Outputs and the gradients to the hidden states and the relative embeddings are those of transformers' module."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = transformers.DebertaV2Config(
        hidden_size=24,
        num_attention_heads=3,
        relative_attention=True,
        position_buckets=buckets,
        share_att_key=share_att_key,
        max_relative_positions=20,
        pos_att_type=pos_att_type,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    module = DisentangledSelfAttention(config).double()
    span, lengths = module.pos_ebd_size, torch.tensor([50, 31])
    hidden, relative = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 50, 24), (2 * span, 24))
    )
    there = torch.arange(50) < lengths[:, None]
    wanted = module(hidden, (there[:, None, :, None] & there[:, None, None]), rel_embeddings=relative)[0]

    def heads(linear: Any, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (3, 8))

    tables: list[Any] = [None, None]
    for i, (term, own, shared) in enumerate(
        (("c2p", "pos_key_proj", module.key_proj), ("p2c", "pos_query_proj", module.query_proj))
    ):
        if term in pos_att_type:
            tables[i] = heads(shared if share_att_key else getattr(module, own), relative)
    q, k, v = (heads(linear, hidden) for linear in (module.query_proj, module.key_proj, module.value_proj))
    got = disentangled_attention(q, k, v, *tables, position_buckets=buckets, max_position=20, lengths=lengths).flatten(
        2
    )
    torch.testing.assert_close(got[there], wanted[there], rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(got)[there]
    leaves = [hidden, relative, module.query_proj.weight, module.key_proj.bias]
    found = torch.autograd.grad((got[there] * weights).sum(), leaves, allow_unused=True)
    for g, w in zip(
        found, torch.autograd.grad((wanted[there] * weights).sum(), leaves, allow_unused=True), strict=True
    ):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("buckets", "most"), [(256, 512), (8, 20), (7, 64), (32, 18), (-1, 16)])
def test_slots_are_those_of_transformers(buckets: int, most: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    slots, p = relative_slots(2000, position_buckets=buckets, max_position=most)
    reach = len(slots) // 2
    d = torch.arange(-reach, reach + 1)
    span = buckets if buckets > 0 else most
    wanted = make_log_bucket_position(d, buckets, most).long() if buckets > 0 else d
    assert p == 2 * span
    assert reach >= 1999
    assert torch.equal(slots.long(), (wanted + span).clamp(0, p - 1))
    assert bool((slots[1:] >= slots[:-1]).all())


def test_slots_are_kept_and_compile() -> None:
    same = {"position_buckets": 8, "max_position": 32}
    assert relative_slots(50, **same)[0] is relative_slots(100, **same)[0]
    args, same = case(2, 6, 2, 4, 16), {"position_buckets": 8, "max_position": 33}
    compiled = torch.compile(disentangled_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **same), disentangled_attention(*args, **same))


def test_slots_that_are_kept_are_anybodys() -> None:
    """Made first in inference mode or among fake tensors, they serve training later."""
    args, most = case(2, 6, 2, 4, 16), {"position_buckets": 8, "max_position": 34}
    with FakeTensorMode() as mode:
        assert disentangled_attention(*(mode.from_tensor(x) for x in args), **most).shape == (2, 6, 2, 4)
    with torch.inference_mode():
        relative_slots(6, **most)
    disentangled_attention(*args, **most).sum().backward()
    assert all(x.grad is not None for x in args)


def test_autocast() -> None:
    args = case(2, 6, 2, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = disentangled_attention(*args, position_buckets=8, max_position=32)
    assert got.dtype == torch.bfloat16
    rounded = [x.bfloat16() for x in args]
    torch.testing.assert_close(got, disentangled_attention(*rounded, position_buckets=8, max_position=32))


def wrong(**changes: Any) -> Any:
    q, k, v, pos_key, pos_query = (x.detach() for x in case(2, 6, 2, 4, 16))
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "pos_key": pos_key, "pos_query": pos_query}
    named.update(position_buckets=8, max_position=32)
    named.update(changes)
    return disentangled_attention(**named)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 4)}, ValueError, r"k: got shape \(2, 5, 2, 4\)"),
        ({"v": torch.zeros(2, 6, 2, 4).double()}, TypeError, "v: got float64, wanted float32"),
        ({"q": torch.zeros(6, 4)}, ValueError, r"q: got shape \(6, 4\)"),
        ({"q": 3}, TypeError, "q: got int"),
        ({"pos_key": torch.zeros(16, 2, 5)}, ValueError, r"pos_key: got shape \(16, 2, 5\)"),
        ({"pos_query": torch.zeros(15, 2, 4)}, ValueError, "pos_query: got 15 slots, wanted 16"),
        ({"max_position": None}, ValueError, "slots: got neither slots nor max_position"),
        ({"position_buckets": 9}, ValueError, "pos_key: got 16 slots, wanted 18"),
        ({"max_position": 5}, ValueError, "max_position: got 5, wanted at least 6"),
        ({"position_buckets": 1}, ValueError, "position_buckets: got 1"),
        (
            {"slots": torch.zeros(9, dtype=torch.int32)},
            ValueError,
            "slots: got 9 slots, wanted an odd number, at least 11",
        ),
        ({"slots": torch.arange(12)}, ValueError, "slots: got 12 slots"),
        ({"slots": torch.arange(17)}, ValueError, "slots: got slots from 0 to 16"),
        ({"slots": torch.arange(11).flip(0)}, ValueError, "that fall somewhere"),
        ({"slots": torch.zeros(11)}, TypeError, "slots: got float32"),
        ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths: got shape \(3,\)"),
        ({"lengths": torch.tensor([1, 7])}, ValueError, "lengths: got"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "q: got shape .* with cu_seqlens"),
        ({"dropout_p": torch.ones(2, 6)}, TypeError, "dropout_p: got a Tensor"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong(**changes)


def test_packed_errors() -> None:
    q = torch.zeros(6, 2, 4)
    for bounds, message in (([0, 4, 7], "cu_seqlens"), ([0, 4, 3], "cu_seqlens")):
        with pytest.raises(ValueError, match=message):
            disentangled_attention(q, q, q, None, None, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="lengths: got both"):
        disentangled_attention(q, q, q, None, None, cu_seqlens=torch.tensor([0, 6]), lengths=torch.tensor([6]))
    with pytest.raises(ValueError, match="max_length"):
        disentangled_attention(q, q, q, None, None, cu_seqlens=torch.tensor([0, 6]), max_seqlen=3)
