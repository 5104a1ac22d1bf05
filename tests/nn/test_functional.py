"""`fastseq.functional.crf_*`: partial labels, weights, derivatives of derivatives, and every complaint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import functional as F
from fastseq.registry import BackendError

B, T, K = 6, 4, 3
Parameters = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, K, dtype=torch.float64)


@pytest.fixture
def parameters() -> Parameters:
    """transitions, one of them forbidden, start and end."""
    transitions = torch.randn(K, K, dtype=torch.float64)
    transitions[1, 0] = -math.inf
    return transitions, torch.randn(K, dtype=torch.float64), torch.randn(K, dtype=torch.float64)


@pytest.fixture
def mask() -> Tensor:
    """Full, right and left padding, a hole, one position, none."""
    return torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()


def partial_by_enumeration(x: Tensor, allowed: Tensor, parameters: Parameters, every_path: Any) -> Tensor:
    """log p of the set for one row, (L,K) and (L,K)."""
    if not len(x):
        return x.new_zeros(())
    paths, scores = every_path(x, *parameters)
    inside = allowed[torch.arange(len(x)), paths].all(1)
    return scores[inside].logsumexp(0) - scores.logsumexp(0)


def test_partial_labels_match_enumeration(
    x: Tensor, parameters: Parameters, mask: Tensor, enumerate_paths: Any
) -> None:
    for density in (0.3, 0.8):
        allowed = torch.rand(B, T, K) < density
        got = F.crf_log_likelihood(x, allowed, *parameters, mask, "none")
        for b in range(B):
            want = partial_by_enumeration(x[b, mask[b]], allowed[b, mask[b]], parameters, enumerate_paths)
            torch.testing.assert_close(got[b], want)


def test_partial_labels_at_their_limits(x: Tensor, parameters: Parameters, mask: Tensor) -> None:
    x.requires_grad_()
    tags = torch.tensor([[0, 2, 1, 1]]).expand(B, T)  # avoids the forbidden transition, holes included
    single = torch.nn.functional.one_hot(tags, K).bool()
    for reduction in ("none", "sum", "mean", "token_mean"):
        torch.testing.assert_close(
            F.crf_log_likelihood(x, single, *parameters, mask, reduction),
            F.crf_log_likelihood(x, tags, *parameters, mask, reduction),
        )
    everything, nothing = torch.ones_like(single), torch.zeros_like(single)
    assert not F.crf_log_likelihood(x, everything, *parameters, mask, "none").any()
    empty = F.crf_log_likelihood(x, nothing, *parameters, mask, "none")
    assert empty.tolist() == [-math.inf] * 5 + [0.0]
    hopeless = torch.full_like(parameters[0], -math.inf), *parameters[1:]  # no path at all: log Z is -inf too
    empty = F.crf_log_likelihood(x, everything, *hopeless, mask, "none")
    assert empty.tolist() == [-math.inf] * 4 + [0.0, 0.0]
    empty.sum().backward()
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
def test_weights_of_one_change_nothing(x: Tensor, parameters: Parameters, mask: Tensor, reduction: str) -> None:
    tags = torch.tensor([[0, 2, 1, 1]]).expand(B, T)
    leaves = [x, *parameters]
    for leaf in leaves:
        leaf.requires_grad_()
    want = F.crf_log_likelihood(x, tags, *parameters, mask, reduction)
    ones = {"token_weights": torch.ones(B, T), "tag_weights": torch.ones(K)}
    got = F.crf_log_likelihood(x, tags, *parameters, mask, reduction, **ones)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), atol=1e-12, rtol=1e-9
    )


def test_weights_are_of_the_chain_rule(x: Tensor, parameters: Parameters, mask: Tensor, enumerate_paths: Any) -> None:
    tags = torch.tensor([[0, 2, 1, 1]]).expand(B, T)
    token_weights, tag_weights = torch.rand(B, T), torch.rand(K)
    got = F.crf_log_likelihood(x, tags, *parameters, mask, "none", token_weights=token_weights, tag_weights=tag_weights)
    split = F.crf_token_log_likelihood(x, tags, *parameters, mask)
    assert not split[~mask].any()
    for b in range(B):
        on = mask[b].nonzero()[:, 0].tolist()
        if not on:
            assert got[b] == 0
            continue
        paths, scores = enumerate_paths(x[b, on], *parameters)
        y, total, before = tags[b, on], 0.0, scores.logsumexp(0)
        for i, t in enumerate(on):
            upto = scores[(paths[:, : i + 1] == y[: i + 1]).all(1)].logsumexp(0)
            torch.testing.assert_close(split[b, t], upto - before)
            total += float(token_weights[b, t] * tag_weights[y[i]]) * (upto - before)
            before = upto
        torch.testing.assert_close(got[b], total, atol=1e-6, rtol=1e-6)  # the weights are float32


def test_an_impossible_tag_of_no_weight_costs_nothing(x: Tensor, parameters: Parameters) -> None:
    tags = torch.tensor([[2, 2, 1, 0]]).expand(B, T)  # ends in the forbidden transition
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(B, T)
    value = F.crf_log_likelihood(x.requires_grad_(), tags, *parameters, token_weights=weights)
    assert value.isfinite()
    value.backward()
    assert x.grad.isfinite().all()
    assert F.crf_log_likelihood(x, tags, *parameters) == -math.inf


def test_token_mean_counts_what_is_on(x: Tensor, parameters: Parameters, mask: Tensor) -> None:
    tags = torch.tensor([[0, 2, 1, 1]]).expand(B, T)
    total = F.crf_log_likelihood(x, tags, *parameters, mask)
    mean = F.crf_log_likelihood(x, tags, *parameters, mask, "token_mean")
    torch.testing.assert_close(mean, total / mask.sum())
    x.requires_grad_()
    for m in (None, torch.ones_like(mask)):
        off = F.crf_log_likelihood(x, tags.masked_fill(~mask, -100), *parameters, m, "token_mean")
        torch.testing.assert_close(off, mean)


def test_marginals_are_differentiable(x: Tensor, mask: Tensor) -> None:
    parameters = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((K, K), (K,), (K,))]
    inputs = x.requires_grad_(), *parameters
    assert torch.autograd.gradcheck(lambda *a: F.crf_marginals(*a, mask), inputs, fast_mode=True)
    want = torch.autograd.grad(F.crf_log_partition(*inputs, mask).sum(), x)[0]
    torch.testing.assert_close(F.crf_marginals(*inputs, mask), want)


def test_entropy_and_loss_are_differentiable(x: Tensor, mask: Tensor) -> None:
    parameters = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((K, K), (K,), (K,))]
    inputs = x.requires_grad_(), *parameters
    tags = torch.randint(K, (B, T))
    assert torch.autograd.gradcheck(lambda *a: F.crf_entropy(*a, mask), inputs, fast_mode=True)
    for reduction in ("none", "mean", "token_mean"):

        def loss(x: Tensor, *p: Tensor, r: str = reduction) -> Tensor:
            return F.crf_log_likelihood(x, tags, *p, mask, r)

        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


def test_vmap_over_models(x: Tensor, mask: Tensor) -> None:
    tags = torch.randint(K, (B, T))
    many = torch.randn(5, K, K, dtype=torch.float64), *torch.randn(2, 5, K, dtype=torch.float64)
    for function in (
        lambda *p: F.crf_log_partition(x, *p, mask),
        lambda *p: F.crf_log_likelihood(x, tags, *p, mask, "mean"),
        lambda *p: F.crf_viterbi(x, *p, mask),
    ):
        got = torch.func.vmap(function)(*many)
        each = [function(*p) for p in zip(*many, strict=True)]
        pairs = zip(got, zip(*each, strict=True), strict=True) if isinstance(got, tuple) else [(got, each)]
        for together, apart in pairs:
            torch.testing.assert_close(together, torch.stack(list(apart)))


# ---- complaints -----------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "emissions": torch.zeros(B, T, K),
    "transitions": torch.zeros(K, K),
    "start": torch.zeros(K),
    "end": torch.zeros(K),
}
TAGGED = GOOD | {"tags": torch.zeros(B, T, dtype=torch.int64)}

MODEL_ERRORS = [
    (
        {"emissions": torch.zeros(B, T)},
        ValueError,
        r"emissions: got shape \(6, 4\), wanted \(B, T, K\), batch first",
    ),
    ({"emissions": torch.zeros(1, B, T, K)}, ValueError, r"emissions: got shape \(1, 6, 4, 3\)"),
    (
        {"emissions": torch.zeros(B, T, K).long()},
        TypeError,
        "emissions: got int64, wanted float64 or float32 or",
    ),
    ({"emissions": torch.zeros(B, T, K).cfloat()}, TypeError, "emissions: got complex64"),
    ({"emissions": [[[0.0]]]}, TypeError, "emissions: got list, wanted a tensor"),
    ({"emissions": None}, TypeError, "emissions: got NoneType, wanted a tensor"),
    (
        {"transitions": torch.zeros(K, K + 1)},
        ValueError,
        r"transitions: got shape \(3, 4\), wanted \(K, K\) = \(3, 3\)",
    ),
    ({"transitions": torch.zeros(K)}, ValueError, r"transitions: got shape \(3,\)"),
    ({"transitions": torch.zeros(K, K).int()}, TypeError, "transitions: got int32"),
    ({"transitions": None}, TypeError, "transitions: got NoneType"),
    ({"start": torch.zeros(K + 1)}, ValueError, r"start: got shape \(4,\), wanted \(K,\) = \(3,\)"),
    ({"end": torch.zeros(())}, ValueError, r"end: got shape \(\), wanted \(K,\)"),
    ({"end": torch.zeros(K, device="meta")}, ValueError, "end: got a tensor on meta, wanted cpu"),
    (
        {"transitions": torch.zeros(K, K, device="meta")},
        ValueError,
        "transitions: got a tensor on meta, wanted cpu",
    ),
    (
        {"mask": torch.ones(T, B).bool()},
        ValueError,
        r"mask: got shape \(4, 6\), wanted \(B, T\), batch first, = \(6, 4\)",
    ),
    ({"mask": torch.ones(B).bool()}, ValueError, r"mask: got shape \(6,\)"),
    ({"mask": torch.ones(B, T)}, TypeError, "mask: got float32, wanted bool or uint8"),
    ({"mask": torch.ones(B, T).long()}, TypeError, "mask: got int64, wanted bool or uint8"),
    ({"mask": [[True] * T] * B}, TypeError, "mask: got list, wanted a tensor"),
    ({"mask": torch.ones(B, T, device="meta").bool()}, ValueError, "mask: got a tensor on meta, wanted cpu"),
]

FUNCTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (F.crf_log_partition, GOOD),
    (F.crf_marginals, GOOD),
    (F.crf_entropy, GOOD),
    (F.crf_viterbi, GOOD),
    (F.crf_nbest, GOOD | {"n": 2}),
    (F.crf_sample, GOOD | {"num_samples": 2}),
    (F.crf_log_likelihood, TAGGED),
    (F.crf_token_log_likelihood, TAGGED),
]

OTHER_ERRORS = [
    (F.crf_nbest, GOOD | {"n": 0}, ValueError, "n: got 0, wanted at least 1"),
    (F.crf_nbest, GOOD | {"n": 1.5}, TypeError, "n: got float, wanted an int"),
    (F.crf_sample, GOOD | {"num_samples": -1}, ValueError, "num_samples: got -1"),
    (F.crf_sample, GOOD | {"num_samples": True}, TypeError, "num_samples: got bool"),
    (
        F.crf_log_likelihood,
        TAGGED | {"reduction": "avg"},
        ValueError,
        "reduction: got 'avg', wanted one of none, sum",
    ),
    (F.crf_log_likelihood, TAGGED | {"reduction": None}, ValueError, "reduction: got None"),
    *(
        (function, TAGGED | {"tags": tags}, error, words)
        for function in (F.crf_log_likelihood, F.crf_token_log_likelihood)
        for tags, error, words in (
            (
                torch.zeros(T, B).long(),
                ValueError,
                r"tags: got shape \(4, 6\), wanted \(B, T\), batch first, = \(6, 4\)",
            ),
            (torch.zeros(B, T, K).long(), ValueError, r"tags: got shape \(6, 4, 3\)"),
            (torch.zeros(B, T), TypeError, "tags: got float32, wanted int64"),
            ([[0] * T] * B, TypeError, "tags: got list, wanted a tensor"),
            (torch.zeros(B, T, device="meta").long(), ValueError, "tags: got a tensor on meta"),
            (torch.full((B, T), K), ValueError, "tags: "),
            (torch.full((B, T), -1), ValueError, "tags: "),
        )
    ),
    (F.crf_log_likelihood, TAGGED | {"tags": torch.ones(B, T).bool()}, ValueError, r"tags: .* for bool tags"),
    (
        F.crf_token_log_likelihood,
        TAGGED | {"tags": torch.ones(B, T, K).bool()},
        ValueError,
        "tags: got shape",
    ),
    (
        F.crf_log_likelihood,
        TAGGED | {"token_weights": torch.ones(T, B)},
        ValueError,
        "token_weights: got shape",
    ),
    (
        F.crf_log_likelihood,
        TAGGED | {"token_weights": torch.ones(B, T).long()},
        TypeError,
        "token_weights: got int64",
    ),
    (F.crf_log_likelihood, TAGGED | {"tag_weights": torch.ones(K + 1)}, ValueError, "tag_weights: got shape"),
    (
        F.crf_log_likelihood,
        TAGGED | {"tag_weights": 2.0},
        TypeError,
        "tag_weights: got float, wanted a tensor",
    ),
    (
        F.crf_log_likelihood,
        TAGGED | {"tags": torch.ones(B, T, K).bool(), "tag_weights": torch.ones(K)},
        ValueError,
        "token_weights, tag_weights: got bool tags as well",
    ),
]


@pytest.mark.parametrize(
    ("function", "arguments", "error", "words"),
    [(f, good | bad, *rest) for (f, good), (bad, *rest) in itertools.product(FUNCTIONS, MODEL_ERRORS)] + OTHER_ERRORS,
)
def test_complaints(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        function(**arguments)


@pytest.mark.parametrize("backend", ["eager", "cpu", "reference"])
@pytest.mark.parametrize("tag", [-1, K, -101])
def test_tag_ids_out_of_range_on_every_backend(backend: str, tag: int, mask: Tensor) -> None:
    tags = torch.zeros(B, T, dtype=torch.int64)
    tags[~mask] = tag  # where the mask is off, nothing is looked at
    arguments = TAGGED | {"tags": tags, "emissions": torch.zeros(B, T, K, requires_grad=True)}
    with fastseq.use(backend):
        try:
            assert F.crf_log_likelihood(**arguments, mask=mask).isfinite()
        except BackendError as error:
            pytest.skip(f"not here: {error}")
        for reduction in ("none", "sum"):
            with pytest.raises(ValueError, match="tags"):
                F.crf_log_likelihood(**arguments, reduction=reduction)
