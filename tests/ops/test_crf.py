"""The CRF ops: the reference, samples and second derivatives against full enumeration; Viterbi against its peer."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq.ops import crf
from fastseq.ops.crf import reference
from fastseq.testing import to_device

INF = math.inf
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# ---- the reference against enumeration -------------------------------------------------------------------------------

ordinary = st.floats(-4, 4, width=32)
hostile = st.one_of(ordinary, ordinary, st.sampled_from([-INF, -INF, -1e4, -100.0, 0.0, 60.0, 1e3, 1e4]))


@st.composite
def cases(draw: Any) -> Case:
    """Emissions (2,T,K), tags, mask, transitions, start, end in float64; T to 4, K to 3; ordinary or hostile."""
    steps, k = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    numbers = draw(st.sampled_from([ordinary, hostile]))

    def tensor(*shape: int, of: Any = numbers) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(of, min_size=count, max_size=count)), dtype=torch.float64).view(shape)

    tags = tensor(2, steps, of=st.sampled_from([*range(k)] * 3 + [-100])).long()
    mask = tensor(2, steps, of=st.sampled_from([1, 1, 0])).bool()
    return tensor(2, steps, k), tags, mask, tensor(k, k), tensor(k), tensor(k)


def every_path(case: Case, row: int, on: Tensor) -> list[tuple[float, tuple[int, ...]]]:
    """(score, path) of all K^L paths of a row, in the order of itertools.product."""
    x, _, _, a, s, e = (np.asarray(v) for v in case)
    x = x[row][np.asarray(on)]
    scored = []
    for path in itertools.product(range(len(s)), repeat=len(x)):
        score = 0.0
        if path:
            score = s[path[0]] + e[path[-1]] + sum(x[t, y] for t, y in enumerate(path))
            score += sum(a[i, j] for i, j in itertools.pairwise(path))
        scored.append((float(score), path))
    return scored


def log_sum(scores: list[float]) -> float:
    top = max(scores)
    return top if top == -INF else top + math.log(sum(math.exp(s - top) for s in scores))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_reference_sums_are_those_over_all_paths(case: Case) -> None:
    x, tags, mask, a, s, e = case
    values = reference.nll(x, tags, mask, a, s, e)
    partitions = reference.nll(x, None, mask, a, s, e)
    tokens = reference.token_nll(x, tags, mask, a, s, e)
    entropies = reference.entropy(x, mask, a, s, e)
    for row in range(2):
        on = mask[row] & (tags[row] != -100)
        paths = every_path(case, row, on)
        log_z = log_sum([score for score, _ in paths])
        gold = {path: score for score, path in paths}[tuple(tags[row][on].tolist())]
        nll = INF if gold == -INF or log_z == -INF else log_z - gold
        assert float(values[row]) == pytest.approx(nll, rel=1e-9, abs=1e-6)
        assert float(tokens[row].sum()) == pytest.approx(nll, rel=1e-9, abs=1e-6)
        assert bool((tokens[row][~on] == 0).all())
        paths = every_path(case, row, mask[row])
        log_z = log_sum([score for score, _ in paths])
        assert float(partitions[row]) == pytest.approx(log_z, rel=1e-9, abs=1e-6)
        log_p = [score - log_z for score, _ in paths if score > -INF]
        assert float(entropies[row]) == pytest.approx(-sum(math.exp(v) * v for v in log_p), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_reference_gradient_is_expected_minus_observed(case: Case, with_tags: bool) -> None:
    x, tags, mask, a, s, e = case
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    _, *got = reference.nll_grad(x, tags if with_tags else None, mask, a, s, e, weights, 3.0)
    wanted = [torch.zeros_like(v) for v in (x, a, s, e)]
    for row in range(2):
        on = mask[row] & (tags[row] != -100) if with_tags else mask[row]
        paths = every_path(case, row, on)
        log_z = log_sum([score for score, _ in paths])
        if log_z == -INF or not bool(on.any()):
            continue
        counted = [(math.exp(score - log_z), path) for score, path in paths]
        if with_tags:
            counted.append((-1.0, tuple(tags[row][on].tolist())))
        for p, path in counted:
            p *= 3.0 * float(weights[row])
            wanted[2][path[0]] += p
            wanted[3][path[-1]] += p
            for t, y in zip(on.nonzero().flatten().tolist(), path, strict=True):
                wanted[0][row, t, y] += p
            for i, j in itertools.pairwise(path):
                wanted[1][i, j] += p
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 5))
def test_reference_searches_find_the_best_of_all_paths(case: Case, n: int) -> None:
    x, _, mask, a, s, e = case
    path, best = reference.viterbi(x, mask, a, s, e)
    some, scores = reference.nbest(x, mask, a, s, e, n)
    for row in range(2):
        on = mask[row]
        paths = {p: score for score, p in every_path(case, row, on)}
        ranked = sorted(paths.values(), reverse=True)
        assert float(best[row]) == pytest.approx(ranked[0], rel=1e-9, abs=1e-6)
        assert paths[tuple(path[row][on].tolist())] == pytest.approx(ranked[0], rel=1e-9, abs=1e-6)
        assert bool((path[row][~on] == -100).all())
        wanted = [score for score in ranked[:n] if score > -INF]
        found = [tuple(p[on].tolist()) for p in some[row][: len(wanted)]]
        assert scores[row].tolist() == pytest.approx(wanted + [-INF] * (n - len(wanted)), rel=1e-9, abs=1e-6)
        assert [paths[p] for p in found] == pytest.approx(wanted, rel=1e-9, abs=1e-6)
        assert len(set(found)) == len(found)
        assert bool((some[row][len(wanted) :] == -100).all())


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(has: Any, device: str) -> Any:
    """The op on tensors that are on the CPU; skips where the forced backend does not have it."""
    if not has("crf_sample"):
        pytest.skip("the backend has no crf_sample")
    return lambda *args: crf.sample(*to_device(args, device)).cpu()


def test_samples_have_the_exact_distribution(sample: Any) -> None:
    x, a, s, e = torch.randn(2, 5, 3), torch.randn(3, 3), torch.randn(3), torch.randn(3)
    a[0, 1] = -INF
    mask = torch.tensor([[True] * 5, [False, True, False, True, True]])
    drawn = sample(torch.rand(20000, 2, 5), x, mask, a, s, e)
    for row in range(2):
        paths = every_path((x, x, x, a, s, e), row, mask[row])
        log_z = log_sum([score for score, _ in paths])
        base = 3 ** torch.arange(int(mask[row].sum()) - 1, -1, -1)
        counts = torch.bincount((drawn[:, row][:, mask[row]] * base).sum(1), minlength=len(paths)) / 20000
        p = torch.tensor([math.exp(score - log_z) for score, _ in paths])
        assert bool(((counts - p).abs() <= 5 * (p / 20000).sqrt() + 5 * (p > 0) / 20000).all())


def test_samples_at_the_ends_of_the_uniforms(sample: Any) -> None:
    """0 gives the first possible tag, and the greatest number below 1 the last possible one."""
    x, a, s, e = torch.zeros(1, 2, 4), torch.zeros(4, 4), torch.zeros(4), torch.tensor([-INF, 0.0, 0.0, -INF])
    x[0, 0, 0], x[0, 0, 3] = -INF, -INF
    for uniform, tag in ((0.0, 1), (1.0 - 2.0**-24, 2)):
        assert sample(torch.full((1, 1, 2), uniform), x, None, a, s, e).tolist() == [[[tag, tag]]]


# ---- Viterbi ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "t", "k"), [(8, 30, 9), (3, 17, 33), (2, 40, 2)])
def test_viterbi_is_pytorch_crfs_to_the_last_tie(
    backend: str, device: str, b: int, t: int, k: int, random_case: Any
) -> None:
    """Small integers, so that there are ties everywhere, and plain random numbers."""
    peer = pytest.importorskip("torchcrf").CRF(k, batch_first=True)
    for draw in (torch.randn, lambda *shape: torch.randint(-1, 2, shape).float()):
        mask, x = random_case(b, t, k)[2].cpu(), draw(b, t, k)
        for p in peer.parameters():
            p.data = draw(*p.shape)
        model = (p.detach() for p in (peer.transitions, peer.start_transitions, peer.end_transitions))
        paths = crf.viterbi(*to_device((x, mask, *model), device))[0].cpu()
        assert [p[m].tolist() for p, m in zip(paths, mask, strict=True)] == peer.decode(x, mask)


def test_hessian(backend: str, device: str) -> None:
    """The double backward is the covariance of the tag indicators, by enumeration."""
    x, a, s, e = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 3, 2), (2, 2), (2,), (2,)))

    def total(v: Tensor) -> Tensor:
        return crf.nll(*to_device((v, None, None, a, s, e), device)).sum().cpu()

    hessian = torch.autograd.functional.hessian(total, x).view(6, 6)
    paths = every_path((x, x, x, a, s, e), 0, torch.ones(3, dtype=torch.bool))
    log_z = log_sum([score for score, _ in paths])
    p = torch.tensor([math.exp(score - log_z) for score, _ in paths], dtype=torch.float64)
    seen = torch.nn.functional.one_hot(torch.tensor([path for _, path in paths]), 2).double().flatten(1)
    mean = p @ seen
    torch.testing.assert_close(hessian, (seen * p[:, None]).t() @ seen - mean[:, None] * mean)


def test_a_second_backward_does_not_see_what_was_done_to_the_first_gradient() -> None:
    """The gradient is handed over without a copy; with retain_graph the user may change it before the next pass."""
    leaf = torch.randn(5, 2, 3).requires_grad_()
    a, s, e = torch.randn(3, 3), torch.randn(3), torch.randn(3)
    loss = -crf.log_likelihood(leaf.transpose(0, 1), torch.zeros(2, 5, dtype=torch.int64), None, a, s, e, None, 1.0)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    first = leaf.grad.clone()
    leaf.grad.zero_()
    loss.backward()
    torch.testing.assert_close(leaf.grad, first, rtol=0, atol=0)
