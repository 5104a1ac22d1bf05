"""The strict class refuses what pytorch-crf 0.7.2 refuses, in the same words, and takes the rest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torchcrf

from fastseq.integrations.torchcrf import CRF

B, T, K = 3, 5, 4


def outcome(cls: Any, method: str, batch_first: bool, arguments: dict[str, Any]) -> Any:
    """What a call gives: a value, or the words of its ValueError."""
    torch.manual_seed(0)
    crf = cls(K, batch_first)
    try:
        return getattr(crf, method)(**arguments)
    except ValueError as error:
        return str(error)


def mask(batch_first: bool, *off: tuple[int, int]) -> torch.Tensor:
    on = torch.ones(B, T, dtype=torch.bool)
    for b, t in off:
        on[b, t] = False
    return on if batch_first else on.t()


@pytest.mark.parametrize("method", ["forward", "decode"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_same_complaints(method: str, batch_first: bool) -> None:
    leading = (B, T) if batch_first else (T, B)
    good = {"emissions": torch.randn(*leading, K), "tags": torch.randint(K, leading)}
    bad: list[dict[str, Any]] = [
        {},
        {"emissions": torch.randn(B, T)},
        {"emissions": torch.randn(1, B, T, K)},
        {"emissions": torch.randn(*leading, K + 1)},
        {"tags": torch.zeros(leading[::-1], dtype=torch.int64)},
        {"tags": torch.zeros(B, dtype=torch.int64)},
        {"mask": mask(not batch_first)},
        {"mask": torch.ones(T, dtype=torch.bool)},
        {"mask": mask(batch_first, (1, 0))},
        {"mask": mask(batch_first, *((b, 0) for b in range(B)))},
        {"mask": mask(batch_first, (1, T - 1), (2, T - 1))},
        {"mask": mask(batch_first, *itertools.product(range(B), range(T)))},
        {"reduction": "avg"},
        {"reduction": ""},
        {"reduction": "avg", "emissions": torch.randn(B, T)},
        {"tags": torch.zeros(B, dtype=torch.int64), "mask": mask(batch_first, (1, 0))},
    ]
    errors = 0
    for change in bad:
        arguments = good | change
        if method == "decode":
            arguments = {k: v for k, v in arguments.items() if k not in ("tags", "reduction")}
        want = outcome(torchcrf.CRF, method, batch_first, arguments)
        got = outcome(CRF, method, batch_first, arguments)
        errors += isinstance(want, str)
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want)
        else:
            assert got == want
    assert errors == (14 if method == "forward" else 10)


@pytest.mark.parametrize("num_tags", [0, -1])
def test_same_complaint_of_the_constructor(num_tags: int) -> None:
    for cls in (CRF, torchcrf.CRF):
        with pytest.raises(ValueError, match=f"^invalid number of tags: {num_tags}$"):
            cls(num_tags)


def test_partial_labels_and_weights_still_work() -> None:
    crf = CRF(K, batch_first=True)
    x = torch.randn(B, T, K)
    assert crf(x, torch.ones(B, T, K, dtype=torch.bool)).abs() < 1e-4
    tags = torch.randint(K, (B, T))
    torch.testing.assert_close(crf(x, tags, tag_weights=torch.ones(K)), crf(x, tags))
