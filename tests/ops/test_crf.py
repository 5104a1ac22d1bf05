"""The CRF ops: the reference against full enumeration, and every backend on what the reference is too slow for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.ops import crf
from fastseq.ops.crf import reference
from fastseq.registry import OPS
from fastseq.testing import backend_of

INF = math.inf
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced; skips what this machine does not have."""
    reason = backend_of(OPS["crf_nll"], request.param).available()
    if reason is not None:
        pytest.skip(reason)
    with fastseq.use(request.param):
        yield request.param


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
        return torch.tensor(draw(st.lists(of, min_size=count, max_size=count)), dtype=torch.float64).view(
            shape
        )

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
        gold = dict((path, score) for score, path in paths)[tuple(tags[row][on].tolist())]
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
        paths = dict((p, score) for score, p in every_path(case, row, on))
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


def test_samples_have_the_exact_distribution(backend: str) -> None:
    x, a, s, e = torch.randn(2, 5, 3), torch.randn(3, 3), torch.randn(3), torch.randn(3)
    a[0, 1] = -INF
    mask = torch.tensor([[True] * 5, [False, True, False, True, True]])
    drawn = crf.sample(torch.rand(20000, 2, 5), x, mask, a, s, e)
    for row in range(2):
        paths = every_path((x, x, x, a, s, e), row, mask[row])
        log_z = log_sum([score for score, _ in paths])
        base = 3 ** torch.arange(int(mask[row].sum()) - 1, -1, -1)
        counts = torch.bincount((drawn[:, row][:, mask[row]] * base).sum(1), minlength=len(paths)) / 20000
        p = torch.tensor([math.exp(score - log_z) for score, _ in paths])
        assert bool(((counts - p).abs() <= 5 * (p / 20000).sqrt() + 5 * (p > 0) / 20000).all())


def test_samples_at_the_ends_of_the_uniforms(backend: str) -> None:
    """0 gives the first possible tag, and the greatest number below 1 the last possible one."""
    x, a, s, e = torch.zeros(1, 2, 4), torch.zeros(4, 4), torch.zeros(4), torch.tensor([-INF, 0.0, 0.0, -INF])
    x[0, 0, 0], x[0, 0, 3] = -INF, -INF
    for uniform, tag in ((0.0, 1), (1.0 - 2.0**-24, 2)):
        assert crf.sample(torch.full((1, 1, 2), uniform), x, None, a, s, e).tolist() == [[[tag, tag]]]


# ---- hazards: loss and gradients against a float64 oracle ------------------------------------------------------------


def oracle(
    x: Tensor, tags: Tensor, mask: Tensor, a: Tensor, s: Tensor, e: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """nll (B,) and gradients of its sum by log-domain forward-backward in numpy and float64; rows padded right."""
    x64, a64, s64, e64 = (np.asarray(v.detach().double()) for v in (x, a, s, e))
    values, grads = [], [np.zeros_like(v) for v in (x64, a64, s64, e64)]
    lse = np.logaddexp.reduce
    for b, length in enumerate(mask.sum(1).tolist()):
        row, path = x64[b, :length], tags[b, :length].numpy()
        alpha, beta = np.empty_like(row), np.empty_like(row)
        alpha[0], beta[-1] = s64 + row[0], e64
        for t in range(1, length):
            alpha[t] = lse(alpha[t - 1][:, None] + a64, 0) + row[t]
            beta[-t - 1] = lse(a64 + row[-t] + beta[-t], 1)
        log_z = lse(alpha[-1] + e64)
        values.append(
            log_z
            - s64[path[0]]
            - e64[path[-1]]
            - row[np.arange(length), path].sum()
            - a64[path[:-1], path[1:]].sum()
        )
        p = np.exp(alpha + beta - lse(alpha + beta, 1)[:, None])
        for t in range(1, length):
            pair = alpha[t - 1][:, None] + a64 + row[t] + beta[t]
            grads[1] += np.exp(pair - lse(pair, axis=None))
        p[np.arange(length), path] -= 1
        np.add.at(grads[1], (path[:-1], path[1:]), -1)
        grads[0][b, :length] = p
        grads[2] += p[0]
        grads[3] += p[-1]
    return torch.tensor(values), [torch.tensor(g) for g in grads]


def check(case: Case, *, gradient: float = 1e-5, value: float = 1e-6) -> None:
    """nll_grad is the oracle's: emission gradients to `gradient` absolute, log-likelihood to `value` relative."""
    x, tags, mask, a, s, e = case
    wanted, grads = oracle(*case)
    total, *got = crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)
    torch.testing.assert_close(total.double(), wanted.sum(), rtol=value, atol=1e-5)
    torch.testing.assert_close(crf.nll(x, tags, mask, a, s, e).double(), wanted, rtol=value, atol=1e-5)
    torch.testing.assert_close(got[0].double(), grads[0], rtol=0, atol=gradient)
    for g, w in zip(got[1:], grads[1:], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


def random_case(b: int, t: int, k: int, *, scale: float = 1.0) -> Case:
    """Float32, ragged on the right, the first row full."""
    lengths = torch.randint((t + 1) // 2, t + 1, (b, 1))
    lengths[0] = t
    tensors = [torch.randn(shape) * scale for shape in ((b, t, k), (k, k), (k,), (k,))]
    return tensors[0], torch.randint(k, (b, t)), torch.arange(t) < lengths, *tensors[1:]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("b", "t", "k"),
    [(2, 1024, 9), (2, 1024, 25), (1, 1024, 64), (1, 20000, 3), (1, 3, 1024), (3, 1, 7), (2, 9, 1)],
)
def test_long_and_wide(backend: str, b: int, t: int, k: int) -> None:
    check(random_case(b, t, k))


@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_large_scores(backend: str, scale: float) -> None:
    check(random_case(4, 40, 6, scale=scale))


@pytest.mark.parametrize("low", [-100.0, -1e4, -INF])
def test_low_transitions(backend: str, low: float) -> None:
    x, tags, mask, a, s, e = random_case(4, 200, 5)
    a[0, 1:3], a[3, 3], s[2], e[1] = low, low, low, low
    tags[:] = torch.tensor([0, 3, 4]).repeat(67)[:200]
    check((x, tags, mask, a, s, e))


@pytest.mark.parametrize("nats", [80.0, 100.0, 1000.0, 1e5])
@pytest.mark.parametrize("where", ["end", "middle", "edge"])
def test_the_lost_path(backend: str, nats: float, where: str) -> None:
    """Tag 1 falls `nats` behind tag 0 over 20 steps; then tag 0 dies, at the end, inside, or for want of an edge."""
    x, tags, mask, a, s, e = random_case(3, 40, 3)
    mask[:] = True
    a[0, 1:], a[1:, 0], a[0, 2] = -INF, -INF, 0.0
    x[0, :20, 0] += nats / 20
    if where == "end":
        e[0], a[0, 2] = -INF, -INF
    elif where == "middle":
        x[0, 25, 0], a[0, 2] = -INF, -INF
    else:
        a[0, 2], x[0, 30, 2], x[0, 30, 0] = -INF, 5.0, -INF
    tags = torch.tensor([1, 2]).repeat(3, 20)
    check((x, tags, mask, a, s, e))


def test_a_great_component_that_nothing_reaches(backend: str) -> None:
    """Unreachable tags score 50 nats a step more: their beta grows without bound, and must not matter."""
    x, tags, mask, a, s, e = random_case(3, 60, 4)
    x[:, :, 2:] += 50
    a[:2, 2:], s[2:] = -INF, -INF
    check((x, tags % 2, mask, a, s, e))


def test_infeasible_gold_and_dead_rows(backend: str) -> None:
    x, tags, mask, a, s, e = random_case(3, 6, 4)
    mask[:] = True
    a[0, 1] = -INF
    tags[0, :2] = torch.tensor([0, 1])
    x[1, 3] = -INF
    values = crf.nll(x, tags, mask, a, s, e)
    assert values.isinf().tolist() == [True, True, bool(((tags[2, :-1] == 0) & (tags[2, 1:] == 1)).any())]
    assert crf.nll(x, None, mask, a, s, e)[1] == -INF
    _, grad, *_ = crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)
    assert bool((grad[1] == 0).all())
    expected = crf.nll_grad(x, None, mask, a, s, e, None, 1.0)[1][0]
    observed = torch.nn.functional.one_hot(tags[0], 4)
    torch.testing.assert_close(grad[0], expected - observed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_stays_in_its_row(backend: str, bad: float) -> None:
    x, tags, mask, a, s, e = random_case(5, 12, 4)
    mask[2] = True
    clean = [crf.nll(x, tags, mask, a, s, e), crf.entropy(x, mask, a, s, e), crf.viterbi(x, mask, a, s, e)[1]]
    grad = crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)[1]
    x[2, 5, 1] = bad
    x[4, 11] = bad if not mask[4, 11] else x[4, 11]  # where off, nobody looks
    spoilt = [
        crf.nll(x, tags, mask, a, s, e),
        crf.entropy(x, mask, a, s, e),
        crf.viterbi(x, mask, a, s, e)[1],
    ]
    others = torch.tensor([0, 1, 3, 4])
    for before, after in zip(clean, spoilt, strict=True):
        assert bool(after[2].isnan())
        torch.testing.assert_close(after[others], before[others])
    after = crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)[1]
    torch.testing.assert_close(after[others], grad[others])
    assert bool(after[2].isnan().all())


def test_tags_out_of_range(backend: str) -> None:
    x, tags, mask, a, s, e = random_case(2, 4, 3)
    mask[1, 2:] = False
    tags[1, 3] = 17  # off: not looked at
    crf.nll(x, tags, mask, a, s, e)
    for wrong in (3, -1, -101, 2**40):
        tags[0, 1] = wrong
        for call in (lambda: crf.nll(x, tags, mask, a, s, e), lambda: crf.token_nll(x, tags, mask, a, s, e)):
            if call.__code__.co_names[1] == "token_nll" and backend == "cpu":
                continue
            with pytest.raises(ValueError, match="tags"):
                call()


def test_a_row_of_weight_zero_is_left_out(backend: str) -> None:
    """Even one whose nll is infinite or NaN."""
    x, tags, mask, a, s, e = random_case(3, 4, 3)
    mask[:] = True
    wanted = crf.nll_grad(x[:1], tags[:1], None, a, s, e, None, 2.0)
    x[1, 2], x[2, 1, 0] = -INF, math.nan
    got = crf.nll_grad(x, tags, mask, a, s, e, torch.tensor([1.0, 0.0, 0.0]), 2.0)
    torch.testing.assert_close(got[1][:1], wanted[1])
    assert bool((got[1][1:] == 0).all())
    for g, w in zip((got[0], *got[2:]), (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(g, w)


# ---- Viterbi ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "t", "k"), [(8, 30, 9), (3, 17, 33), (2, 40, 2)])
def test_viterbi_is_pytorch_crfs_to_the_last_tie(backend: str, b: int, t: int, k: int) -> None:
    """Small integers, so that there are ties everywhere, and plain random numbers."""
    peer = pytest.importorskip("torchcrf").CRF(k, batch_first=True)
    for draw in (torch.randn, lambda *shape: torch.randint(-1, 2, shape).float()):
        _, _, mask, *_ = random_case(b, t, k)
        x = draw(b, t, k)
        for p in peer.parameters():
            p.data = draw(*p.shape)
        paths, _ = crf.viterbi(
            x, mask, *(p.detach() for p in (peer.transitions, peer.start_transitions, peer.end_transitions))
        )
        assert [p[m].tolist() for p, m in zip(paths, mask, strict=True)] == peer.decode(x, mask)


# ---- cost: memory and operations -------------------------------------------------------------------------------------


class _Record(TorchDispatchMode):
    """The names of the ops called, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:  # an alias: autograd makes one for each tensor it keeps
            self.names.append(str(func))
        for o in out if isinstance(out, tuple | list) else (out,):
            if isinstance(o, Tensor):
                self.largest = max(self.largest, o.untyped_storage().nbytes() // o.element_size())
        return out


def _leaves(case: Case) -> Case:
    return tuple(v.requires_grad_() if v.is_floating_point() else v for v in case)  # type: ignore[return-value]


def test_a_training_step_is_few_ops(backend: str) -> None:
    x, tags, mask, a, s, e = _leaves(random_case(4, 64, 9))
    with _Record() as record:
        crf.nll_grad(x, tags, mask, a, s, e, None, 0.25)[0].backward()
    assert len(record.names) <= 12, record.names
    with _Record() as record:
        crf.viterbi(x, mask, a, s, e)
    assert len(record.names) <= 4, record.names


def test_little_is_kept_for_the_backward_pass(backend: str) -> None:
    x, tags, mask, a, s, e = _leaves(random_case(16, 64, 32))
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)[0].backward()
        total = sum(kept.values())
    assert total <= 2.5 * x.nbytes


def test_eager_makes_nothing_of_size_b_t_k_k() -> None:
    case = random_case(4, 64, 16)
    for run in (
        lambda: crf.eager.nll_grad(*case, None, 1.0),
        lambda: crf.eager.viterbi(case[0], *case[2:]),
        lambda: crf.eager.entropy(case[0], *case[2:]),
        lambda: crf.eager.token_nll(*case),
    ):
        with _Record() as record:
            run()
        assert record.largest <= 4 * case[0].numel()


def test_viterbi_never_waits_for_a_device() -> None:
    """On the meta device there are no values to wait for: what reads one fails."""
    x, _, mask, a, s, e = (v.to("meta") for v in random_case(3, 5, 4))
    paths, scores = crf.eager.viterbi(x, mask, a, s, e)
    assert (paths.shape, scores.shape) == ((3, 5), (3,))
    assert crf.eager.nbest(x, mask, a, s, e, 3)[0].shape == (3, 3, 5)


class _Module(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def test_export() -> None:
    x, tags, mask, a, s, e = random_case(2, 5, 3)
    for function, args in ((crf.nll, (x, tags, mask, a, s, e)), (crf.viterbi, (x, mask, a, s, e))):
        exported = torch.export.export(_Module(function), args)
        torch.testing.assert_close(exported.module()(*args), function(*args))


def test_hessian(backend: str) -> None:
    """The double backward is the covariance of the tag indicators, by enumeration."""
    x, a, s, e = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 3, 2), (2, 2), (2,), (2,)))
    hessian = torch.autograd.functional.hessian(lambda v: crf.nll(v, None, None, a, s, e).sum(), x).view(6, 6)
    paths = every_path((x, x, x, a, s, e), 0, torch.ones(3, dtype=torch.bool))
    log_z = log_sum([score for score, _ in paths])
    p = torch.tensor([math.exp(score - log_z) for score, _ in paths], dtype=torch.float64)
    seen = torch.nn.functional.one_hot(torch.tensor([path for _, path in paths]), 2).double().flatten(1)
    mean = p @ seen
    torch.testing.assert_close(hessian, (seen * p[:, None]).t() @ seen - mean[:, None] * mean)
