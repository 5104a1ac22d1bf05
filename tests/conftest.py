"""Fixtures for all tests: the same random numbers and the same threads at the start of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# Tiny tensors gain nothing from a second thread, and lose much where other tests run beside these.
ONE_THREAD = {"benchmarks", "models", "recipes"}


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1 if request.path.parent.name in ONE_THREAD else 2)
    yield
    torch.set_num_threads(threads)
