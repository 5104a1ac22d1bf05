"""Every public function on random calls: FASTSEQ_FUZZ_MINUTES=60 pytest tests/fuzz -s takes that long, else seconds."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import time
from pathlib import Path
from random import Random

import calls
import pytest
import torch
from harness import CALLS, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

for _, _module, _ in pkgutil.iter_modules(calls.__path__):
    importlib.import_module(f"calls.{_module}")

MINUTES = float(os.environ.get("FASTSEQ_FUZZ_MINUTES", "0"))
LAST_CALL = os.environ.get("FASTSEQ_FUZZ_LAST_CALL")
"""A file for each call's words, before it is made: what is in it after a crash is the call that crashed."""

EXAMPLES = 40
ROUND = 400  # calls of one run of hypothesis, in the long way
PUBLIC = (
    "functional",
    "nn",
    "flash_attn",
    "flash_attn.bert_padding",
    "host",
    "models",
    "integrations.torchcrf",
)


def public_names() -> set[str]:
    """The functions, constructors and methods of the public modules that take an argument, by name."""
    found = set()
    for module in PUBLIC:
        here = importlib.import_module(f"fastseq.{module}")
        for name in here.__all__:
            thing = getattr(here, name)
            if inspect.isclass(thing) and not issubclass(thing, tuple):
                methods = {n: m for n, m in vars(thing).items() if inspect.isfunction(m) and n[0] != "_"}
                found |= {f"{module}.{name}.{n}" for n, m in methods.items() if takes_arguments(m, 1)}
                found |= {f"{module}.{name}"} if "__init__" in vars(thing) else set()
            elif inspect.isfunction(thing) and takes_arguments(thing, 0):
                found.add(f"{module}.{name}")
    return found


def takes_arguments(function: object, own: int) -> bool:
    return len(inspect.signature(function).parameters) > own  # type: ignore[arg-type]


def log(words: str) -> None:
    if LAST_CALL:
        Path(LAST_CALL).write_text(words + "\n", "utf-8")


def test_every_public_function_is_here() -> None:
    assert set(CALLS) == public_names()


@pytest.mark.timeout(0 if MINUTES else 300)
@pytest.mark.parametrize("name", sorted(CALLS))
def test_nothing_but_documented_errors(name: str) -> None:
    torch.set_num_threads(1)
    count, end = 0, time.monotonic() + MINUTES * 60 / len(CALLS)

    def one(random: Random) -> None:
        nonlocal count
        count += 1
        check(CALLS[name], random, log)

    if not MINUTES:
        rule = settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        rule(given(st.randoms(use_true_random=False))(one))()
        return
    while time.monotonic() < end:
        rule = settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        rule(given(st.randoms(use_true_random=False))(one))()
    print(f"\n{count:8d} calls of {name}")
