"""For all tests: the same random numbers and threads at the start of each; those for a GPU, skipped and counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Tiny tensors gain nothing from a second thread, and lose much where other tests run beside these.
ONE_THREAD = {"benchmarks", "flash_attn", "models", "profiling", "recipes"}


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(2 if alone and request.path.parent.name not in ONE_THREAD else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that ops choose in this test, one a call."""
    from fastseq.registry import Backend, Op

    names: list[str] = []
    choose = Op.choose

    def spy(op: Op, *args: Any) -> Backend:
        backend = choose(op, *args)
        names.append(backend.name)
        return backend

    monkeypatch.setattr(Op, "choose", spy)
    return names


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `pytest -m gpu` runs these alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu:
        return
    from fastseq.reasons import no_cuda

    reason = no_cuda()
    for item in gpu if reason is not None else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Nobody shall take a run for more than it was: the GPU tests that were skipped, and why."""
    skipped = (r for r in terminalreporter.stats.get("skipped", []) if "gpu" in getattr(r, "keywords", ()))
    for reason, count in Counter(r.longrepr[2].removeprefix("Skipped: ") for r in skipped).items():
        terminalreporter.write_line(f"{count} GPU tests skipped: {reason}")
