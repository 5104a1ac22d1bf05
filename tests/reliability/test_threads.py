"""Two Python threads that call the same op at once, on different inputs: the results of one thread, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.registry import OPS, Backend, Op
from fastseq.testing import backend_of, compare, sample_inputs

ROUNDS = 2


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """What each gives, run in a thread of its own; all begin together."""
    barrier, results = threading.Barrier(len(work)), [None] * len(work)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            torch.set_num_threads(1)
            barrier.wait()
            results[number] = work[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def forward_and_backward(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The outputs, and where there is a derivative, the gradients of the first one's sum."""
    if op.backward is None or op.name.endswith("_grad"):  # second derivatives are plain torch's
        output = op(*args)
        return [output] if isinstance(output, Tensor) else list(output)
    leaves = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    output = op(*leaves)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(outputs[0].sum(), wanted, allow_unused=True) if outputs[0].requires_grad else ()
    return [x.detach() for x in (*outputs, *found) if x is not None]


def fits(op: Op, backend: Backend, args: tuple[Any, ...]) -> bool:
    """Whether the backend runs it; a decoder whose rows share a memory has no gradient."""
    return backend.refusal(*args) is None and (op.name != "pointer_decoder" or len(args[0]) == len(args[1]))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_two_threads_have_the_bits_of_one(name: str, backend: str) -> None:
    op = OPS[name]
    reason = backend_of(op, backend).available()
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    chosen = backend_of(op, backend)
    samples = [[a for a in sample_inputs(name, seed=s) if fits(op, chosen, a)][::8] for s in (0, 1)]

    def work(number: int) -> list[list[Tensor]]:
        with fastseq.use(backend):
            return [forward_and_backward(op, args) for args in samples[number] for _ in range(ROUNDS)]

    torch.set_num_threads(1)
    alone = [work(0), work(1)]
    together = at_once(lambda: work(0), lambda: work(1))
    for got, wanted in zip(together, alone, strict=True):
        for g, w in zip(got, wanted, strict=True):
            compare(g, w, 0.0)


def test_use_does_not_leak_into_another_thread() -> None:
    """Each thread chooses for itself, while the other is inside a `use` of its own."""
    x, a, s = torch.randn(2, 3, 4), torch.randn(4, 4), torch.randn(4)
    inside, done = threading.Barrier(3), threading.Barrier(3)
    found: dict[str, str] = {}

    def forced(backend: str) -> None:
        with fastseq.use(backend):
            inside.wait()
            found[backend] = OPS["crf_nll"].choose(x, None, None, a, s, s).name
            done.wait()

    threads = [threading.Thread(target=forced, args=(backend,)) for backend in ("eager", "reference")]
    for thread in threads:
        thread.start()
    inside.wait()
    here = OPS["crf_nll"].choose(x, None, None, a, s, s).name
    done.wait()
    for thread in threads:
        thread.join()
    assert found == {"eager": "eager", "reference": "reference"}
    assert here != "reference"
    assert here == OPS["crf_nll"].choose(x, None, None, a, s, s).name


def test_modules_are_shared_by_threads() -> None:
    """One CRF, whose parameters two threads read, and whose gradients each takes for itself."""
    crf = fastseq.nn.CRF(5, batch_first=True)
    batches = [(torch.randn(4, 7, 5), torch.randint(5, (4, 7))) for _ in range(2)]

    def work(number: int) -> list[Tensor]:
        x, tags = batches[number]
        found = []
        for _ in range(20):
            found += torch.autograd.grad(-crf(x, tags, reduction="mean"), list(crf.parameters()))
            crf.decode(x)
        return found

    torch.set_num_threads(1)
    alone = [work(0), work(1)]
    together = at_once(lambda: work(0), lambda: work(1))
    compare([g for each in together for g in each], [w for each in alone for w in each], 0.0)
