"""What breaks a CRF that is only right on ordinary numbers: every backend against a float64 log-domain oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq.ops import crf
from fastseq.testing import backend_of, to_device

INF = math.inf
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def oracle(x: Tensor, tags: Tensor, mask: Tensor, a: Tensor, s: Tensor, e: Tensor) -> tuple[Tensor, list[Tensor]]:
    """nll (B,) and gradients of its sum by log-domain forward-backward in numpy and float64; rows padded right."""
    x64, a64, s64, e64 = (np.asarray(v.detach().double().cpu()) for v in (x, a, s, e))
    tags = tags.cpu()
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
            log_z - s64[path[0]] - e64[path[-1]] - row[np.arange(length), path].sum() - a64[path[:-1], path[1:]].sum()
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
    values = crf.nll(x, tags, mask, a, s, e).cpu()
    total, *got = to_device(crf.nll_grad(x, tags, mask, a, s, e, None, 1.0), "cpu")
    torch.testing.assert_close(total.double(), wanted.sum(), rtol=value, atol=1e-5)
    torch.testing.assert_close(values.double(), wanted, rtol=value, atol=1e-5)
    torch.testing.assert_close(got[0].double(), grads[0], rtol=0, atol=gradient)
    for g, w in zip(got[1:], grads[1:], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("b", "t", "k"),
    [(2, 1024, 9), (2, 1024, 25), (1, 1024, 64), (1, 20000, 3), (2, 12, 160), (1, 3, 1024), (3, 1, 7), (2, 9, 1)],
)
def test_long_and_wide(backend: str, b: int, t: int, k: int, random_case: Any) -> None:
    if backend == "emulator" and k == 1024:
        t = 2  # 6 s a position
    case = random_case(b, t, k)
    reason = backend_of(crf.nll, backend).why_not(*case)
    if reason is not None:
        pytest.skip(reason)
    check(case)


@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_large_scores(backend: str, scale: float, random_case: Any) -> None:
    check(random_case(4, 40, 6, scale=scale))


@pytest.mark.parametrize("low", [-100.0, -1e4, -INF])
def test_low_transitions(backend: str, low: float, random_case: Any) -> None:
    x, tags, mask, a, s, e = random_case(4, 200, 5)
    a[0, 1:3], a[3, 3], s[2], e[1] = low, low, low, low
    tags[:] = torch.tensor([0, 3, 4]).repeat(67)[:200]
    check((x, tags, mask, a, s, e))


@pytest.mark.parametrize("nats", [80.0, 100.0, 1000.0, 1e5])
@pytest.mark.parametrize("where", ["end", "middle", "edge"])
def test_the_lost_path(backend: str, nats: float, where: str, random_case: Any) -> None:
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
    tags = torch.tensor([1, 2]).repeat(3, 20).to(x.device)
    check((x, tags, mask, a, s, e))


def test_a_great_component_that_nothing_reaches(backend: str, random_case: Any) -> None:
    """Unreachable tags score 50 nats a step more: their beta grows without bound, and must not matter."""
    x, tags, mask, a, s, e = random_case(3, 60, 4)
    x[:, :, 2:] += 50
    a[:2, 2:], s[2:] = -INF, -INF
    check((x, tags % 2, mask, a, s, e))


def test_infeasible_gold_and_dead_rows(backend: str, random_case: Any) -> None:
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
def test_nan_stays_in_its_row(bad: float, has: Any, random_case: Any) -> None:
    x, tags, mask, a, s, e = random_case(5, 12, 4)
    mask[2] = True

    def rows() -> list[Tensor]:
        entropies = [crf.entropy(x, mask, a, s, e)] if has("crf_entropy") else []
        return [crf.nll(x, tags, mask, a, s, e), crf.viterbi(x, mask, a, s, e)[1], *entropies]

    clean = rows()
    grad = crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)[1]
    x[2, 5, 1] = bad
    x[4, 11] = bad if not mask[4, 11] else x[4, 11]  # where off, nobody looks
    others = torch.tensor([0, 1, 3, 4])
    for before, after in zip(clean, rows(), strict=True):
        assert bool(after[2].isnan())
        torch.testing.assert_close(after[others], before[others])
    after = crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)[1]
    torch.testing.assert_close(after[others], grad[others])
    assert bool(after[2].isnan().all())


def test_tags_out_of_range(backend: str, device: str, has: Any, random_case: Any) -> None:
    """On a CPU an error; in a GPU's kernels, which cannot raise, NaN in that row; and never a look at what is off."""
    if (backend, device) == ("eager", "cuda"):
        pytest.skip("in plain torch on a GPU nobody looks: it is torch's own assertion, which ends the process")
    x, tags, mask, a, s, e = random_case(2, 4, 3)
    mask[1, 2:] = False
    tags[1, 3] = 17  # off: not looked at
    clean = crf.nll(x, tags, mask, a, s, e)
    assert bool(clean.isfinite().all())
    for wrong in (3, -1, -101, 2**40):
        tags[0, 1] = wrong
        if backend in ("cpu", "eager"):
            for op in (crf.nll, crf.token_nll):
                with pytest.raises(ValueError, match="tags"):
                    op(x, tags, mask, a, s, e) if has(op.name) else crf.nll(x, tags, mask, a, s, e)
            continue
        values = crf.nll(x, tags, mask, a, s, e)
        total, *grads = crf.nll_grad(x, tags, mask, a, s, e, torch.tensor([0.0, 1.0], device=device), 1.0)
        assert values.isnan().tolist() == [True, False]
        assert bool(values[1] == clean[1])
        torch.testing.assert_close(total, clean[1])
        assert all(bool(g.isfinite().all()) for g in grads)  # the row has weight 0


def test_a_row_of_weight_zero_is_left_out(backend: str, random_case: Any) -> None:
    """Even one whose nll is infinite or NaN."""
    x, tags, mask, a, s, e = random_case(3, 4, 3)
    mask[:] = True
    wanted = crf.nll_grad(x[:1], tags[:1], None, a, s, e, None, 2.0)
    x[1, 2], x[2, 1, 0] = -INF, math.nan
    got = crf.nll_grad(x, tags, mask, a, s, e, torch.tensor([1.0, 0.0, 0.0], device=x.device), 2.0)
    torch.testing.assert_close(got[1][:1], wanted[1])
    assert bool((got[1][1:] == 0).all())
    for g, w in zip((got[0], *got[2:]), (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(g, w)
