"""`fastseq.nn.CRF` beyond pytorch-crf: masks, constraints, decoders, dtypes, and what torch does to it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fastseq.nn import CRF

T, K = 4, 3
NOT_AFTER_0 = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
CONSTRAINTS = {
    "allowed_transitions": NOT_AFTER_0,
    "allowed_start": torch.tensor([True, True, False]),
    "allowed_end": torch.tensor([False, True, True]),
}


def scores(crf: CRF) -> tuple[Tensor, Tensor, Tensor]:
    """The parameters with the constraints written into them, by hand."""
    minus = torch.tensor(-math.inf, dtype=crf.transitions.dtype)
    parameters = crf.transitions, crf.start_transitions, crf.end_transitions
    allowed = crf.allowed_transitions, crf.allowed_start, crf.allowed_end
    return tuple(  # type: ignore[return-value]
        p.detach() if a is None else p.detach().where(a, minus) for p, a in zip(parameters, allowed, strict=True)
    )


def rows_of(crf: CRF, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row's emissions at the positions that are on."""
    return [row[on] for row, on in zip(x, mask, strict=True)]


@pytest.fixture(params=[{}, CONSTRAINTS], ids=["free", "constrained"])
def crf(request: pytest.FixtureRequest) -> CRF:
    return CRF(K, batch_first=True, **request.param).double()


@pytest.fixture
def x() -> Tensor:
    """(16,T,K): a row for each mask."""
    return torch.randn(2**T, T, K, dtype=torch.float64)


@pytest.fixture
def masks() -> Tensor:
    """(16,T): every mask that there is."""
    return torch.tensor(list(itertools.product([False, True], repeat=T)))


def test_every_mask_equals_the_compacted_row(crf: CRF, x: Tensor, masks: Tensor) -> None:
    tags = torch.ones(2**T, T, dtype=torch.int64)  # a path of ones meets every constraint
    value = crf(x, tags, masks, "none")
    by_tags = crf(x, tags.masked_fill(~masks, -100), None, "none")
    assert value[0] == 0
    torch.testing.assert_close(value, by_tags)
    for b in range(1, 2**T):
        short = x[b : b + 1, masks[b]]
        torch.testing.assert_close(value[b], crf(short, tags[b : b + 1, masks[b]]))


def test_decoders_match_enumeration(crf: CRF, x: Tensor, masks: Tensor, enumerate_paths: Any) -> None:
    log_z, (best, score), entropy = crf.log_partition(x, masks), crf.viterbi(x, masks), crf.entropy(x, masks)
    marginals, (top, top_scores), paths = (
        crf.marginals(x, masks),
        crf.nbest(x, 5, masks),
        crf.decode(x, masks),
    )
    assert score[0] == entropy[0] == top_scores[0, 0] == 0
    assert paths[0] == []
    assert (best == -100).equal(~masks)
    assert not marginals[~masks].any()
    for b, row in enumerate(rows_of(crf, x, masks)):
        if not len(row):
            continue
        every, s = enumerate_paths(row, *scores(crf))
        p = s.softmax(0)
        torch.testing.assert_close(log_z[b], s.logsumexp(0))
        torch.testing.assert_close(entropy[b], torch.special.entr(p).sum())
        expected = torch.stack([(p[:, None] * (every == k)).sum(0) for k in range(K)], 1)
        torch.testing.assert_close(marginals[b, masks[b]], expected)
        order = s.argsort(descending=True)[:5]
        exist = s[order] > -math.inf
        torch.testing.assert_close(top_scores[b, : len(order)], s[order])
        assert torch.equal(top[b][: len(order)][exist][:, masks[b]], every[order[exist]])
        assert (top_scores[b, len(order) :] == -math.inf).all()
        assert paths[b] == every[order[0]].tolist() == best[b, masks[b]].tolist()
        torch.testing.assert_close(score[b], s[order[0]])


def test_samples_have_the_right_frequencies(crf: CRF, enumerate_paths: Any) -> None:
    x = torch.randn(1, T, K, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    paths = crf.sample(x, 20_000, mask, torch.Generator().manual_seed(1))
    assert paths.shape == (20_000, 1, T)
    assert (paths[:, 0, 1] == -100).all()
    every, s = enumerate_paths(x[0, mask[0]], *scores(crf))
    ids = (paths[:, 0, mask[0]] * torch.tensor([K * K, K, 1])).sum(1)
    frequencies = torch.bincount(ids, minlength=len(every)) / 20_000
    assert (frequencies - s.softmax(0)).abs().max() < 0.015
    assert not frequencies[s == -math.inf].any()
    again = crf.sample(x, 20_000, mask, torch.Generator().manual_seed(1))
    assert torch.equal(paths, again)


def test_layout_is_only_of_the_inputs(crf: CRF, x: Tensor, masks: Tensor) -> None:
    seconds = CRF(K, **{n: getattr(crf, n) for n in CONSTRAINTS}).double()
    seconds.load_state_dict(crf.state_dict())
    xt, mt = x.transpose(0, 1), masks.t()
    for name in ("log_partition", "marginals", "entropy", "viterbi", "decode"):
        torch.testing.assert_close(getattr(seconds, name)(xt, mt), getattr(crf, name)(x, masks))
    torch.testing.assert_close(seconds.nbest(xt, 3, mt), crf.nbest(x, 3, masks))
    draw = [
        c.sample(*a, generator=torch.Generator().manual_seed(0))
        for c, a in ((seconds, (xt, 2, mt)), (crf, (x, 2, masks)))
    ]
    assert torch.equal(*draw)
    allowed, weights = torch.rand(2**T, T, K) < 0.7, torch.rand(2**T, T)
    torch.testing.assert_close(seconds(xt, allowed.transpose(0, 1), mt, "none"), crf(x, allowed, masks, "none"))
    tags = torch.ones(2**T, T, dtype=torch.int64)
    torch.testing.assert_close(
        seconds(xt, tags.t(), mt, token_weights=weights.t()), crf(x, tags, masks, token_weights=weights)
    )


def test_forbidden_paths_are_impossible_and_get_no_gradient() -> None:
    crf = CRF(K, True, **CONSTRAINTS)
    x = torch.randn(3, T, K)
    tags = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [2, 1, 1, 1]])
    assert crf(x, tags, None, "none").isinf().tolist() == [False, True, True]
    crf(x[:1], tags[:1]).backward()
    assert not crf.transitions.grad[~NOT_AFTER_0].any()
    assert not crf.start_transitions.grad[2].any()
    assert not crf.end_transitions.grad[0].any()
    assert crf.transitions.grad[NOT_AFTER_0].all()


def test_constraints_can_be_changed_and_move_with_the_module() -> None:
    crf = CRF(K, True, **CONSTRAINTS)
    assert {"transitions", "start_transitions", "end_transitions"} == set(crf.state_dict())
    x = torch.randn(2, T, K)
    free = CRF(K, True)
    free.load_state_dict(crf.state_dict())
    crf.allow()
    assert torch.equal(crf.log_partition(x), free.log_partition(x))
    assert CRF(K, **CONSTRAINTS).to("meta").allowed_start.device.type == "meta"
    with torch.device("meta"):
        assert CRF(K).transitions.is_meta


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_tags": 0}, ValueError, "invalid number of tags: 0"),
        ({"num_tags": -2}, ValueError, "invalid number of tags: -2"),
        (
            {"num_tags": 3, "allowed_start": torch.ones(4, dtype=torch.bool)},
            ValueError,
            r"allowed_start: .*\(4,\)",
        ),
        (
            {"num_tags": 3, "allowed_transitions": torch.ones(3, 3)},
            TypeError,
            "allowed_transitions: .*float32",
        ),
        ({"num_tags": 3, "allowed_end": [True, True, False]}, TypeError, "allowed_end: got list"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CRF(**arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_emissions_and_half_modules(dtype: torch.dtype) -> None:
    crf = CRF(K, True)
    x, tags = torch.randn(5, T, K).to(dtype), torch.randint(K, (5, T))
    value = crf(x, tags, reduction="none")
    torch.testing.assert_close(value, crf(x.float(), tags, reduction="none"))
    assert value.dtype == crf.marginals(x).dtype == crf.viterbi(x)[1].dtype == torch.float32
    x.requires_grad_()
    crf(x, tags).backward()
    assert x.grad.dtype == dtype
    half = CRF(K, True).to(dtype)
    half(x, tags).backward()
    assert half.transitions.grad.dtype == dtype
    assert half.transitions.grad.any()


def test_autocast_leaves_half_emissions_and_float_parameters_alone() -> None:
    crf, encoder = CRF(K, True), torch.nn.Linear(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        x = encoder(torch.randn(2, T, 6))
        assert x.dtype == torch.bfloat16
        loss = -crf(x, torch.randint(K, (2, T)), reduction="mean")
    assert loss.dtype == torch.float32
    loss.backward()
    assert encoder.weight.grad.any()


def test_float64_on_either_side_makes_float64() -> None:
    x, tags = torch.randn(2, T, K), torch.randint(K, (2, T))
    crf = CRF(K, True)
    assert crf(x.double(), tags).dtype == torch.float64
    assert crf.double()(x, tags).dtype == torch.float64
    assert crf.log_partition(x.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do(b: int, t: int) -> None:
    crf = CRF(K, True)
    x, tags = torch.randn(b, t, K, requires_grad=True), torch.zeros(b, t, dtype=torch.int64)
    for mask in (None, torch.ones(b, t, dtype=torch.bool)):
        for reduction in ("sum", "mean", "token_mean"):
            value = crf(x, tags, mask, reduction)
            assert value == 0
            assert not torch.autograd.grad(value, x)[0].any()
            with torch.no_grad():
                assert crf(x, tags, mask, reduction) == 0
        assert crf(x, tags, mask, "none").equal(torch.zeros(b))
        assert crf.decode(x, mask) == [[]] * b
        assert crf.nbest(x, 2, mask)[0].shape == (b, 2, t)
        assert crf.sample(x, 4, mask).shape == (4, b, t)
        assert crf.marginals(x, mask).shape == (b, t, K)
        assert crf.entropy(x, mask).equal(torch.zeros(b))


def test_parametrized_and_replicated_and_functional() -> None:
    class Symmetric(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return a + a.t()

    crf = CRF(K, True)
    x, tags = torch.randn(2, T, K), torch.randint(K, (2, T))
    doubled = {name: 2 * p.detach() for name, p in crf.named_parameters()}
    value = torch.func.functional_call(crf, doubled, (x, tags))
    replica = crf._replicate_for_data_parallel()  # parameters are plain attributes of it
    for name, p in doubled.items():
        setattr(replica, name, p)
    torch.testing.assert_close(replica(x, tags), value)
    plain = crf(x, tags)
    parametrize.register_parametrization(crf, "transitions", Symmetric())
    assert crf(x, tags) != plain
    crf(x, tags).backward()
    assert crf.parametrizations.transitions.original.grad.any()
